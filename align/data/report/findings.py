"""What to look at, in plain words: each with the threshold from which on it is told (docs/inspect.md lists them)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from align.config import Config
from align.data.report.schema import UNTOLD, FileFigures, Look
from align.inspect.tokens import inert

MOST_LEFT_OUT = 0.2  # share of the rows read that preparation left out, for other reasons than these and duplicates:
ASKED_FOR = ("max_rows", "mixture", "balance")
MOST_DUPLICATES = 0.1  # share of the rows read that were duplicates
MOST_TOO_LONG = 0.05  # share of sampled rows that a stage will leave out as too long
LEAST_TEST = 30  # rows held out; the trust gate says nothing of a reward model with fewer pairs
LEAST_TRAIN = 100  # rows to train on
MOST_LONGER = 0.65  # share of pairs whose chosen answer is the longer one; below 1 - this, the shorter one
LEAST_TOLD = 30  # pairs, or answers, below which no share is told
LEAST_AGREEMENT = 0.9  # share of pairs labelled several times whose labels agree
MOST_OPENING = 0.1  # share of answers that begin with the same three words
MOST_OTHER_LANGUAGES = 0.05  # share of sampled rows in another language than most
MOST_ONE_SOURCE = 0.9  # share of the rows that come from one of several sources
MOST_AUGMENTED = 0.5  # share of rows that augmentation made


def look_at(config: Config, files: Sequence[FileFigures]) -> list[Look]:
    """All findings, file by file."""
    checks = (_left_out, _duplicates, _few_rows, _unrendered, _too_long, _longer, _agreement, _openings, _languages)
    found = [
        Look(file=file["key"], what=inert(what), threshold=threshold)
        for file in files
        for check in (*checks, _sources, _augmented)
        for what, threshold in check(file)
    ]
    if config.label.source == "dataset" and "preferences" not in {file["key"] for file in files}:
        what = "label.source is dataset, but no preferences were prepared."
        found.append(Look(file="preferences", what=what, threshold="always"))
    return found


Told = Iterator[tuple[str, str]]  # (sentence, threshold)


def percent(share: float) -> str:
    """Never 0 % of something, nor 100 % of less than all."""
    if 0 < share < 0.01:
        return "under 1 %"
    return f"{min(99, round(100 * share)) if share < 1 else 100} %"


def _read(file: FileFigures) -> int:
    return file["steps"][0]["rows_in"] if file["steps"] else file["rows"]


def _left_out(file: FileFigures) -> Told:
    read = _read(file)
    reasons: dict[str, int] = {}
    for step in file["steps"]:
        if step["step"] in ASKED_FOR or "duplicates" in step["step"]:
            continue
        for reason, rows in step["left_out"].items():
            reasons[reason] = reasons.get(reason, 0) + rows
    left = sum(reasons.values())
    if read and left > MOST_LEFT_OUT * read:
        most = max(reasons, key=lambda reason: (reasons[reason], reason))
        yield (
            f"{left:,} of {read:,} rows ({percent(left / read)}) were left out, {reasons[most]:,} of them {most}. "
            "dropped.jsonl holds each with its reason: see whether that is what you want.",
            f"more than {percent(MOST_LEFT_OUT)} of the rows read",
        )


def _duplicates(file: FileFigures) -> Told:
    read = _read(file)
    copies = sum(sum(step["left_out"].values()) for step in file["steps"] if "duplicates" in step["step"])
    if read and copies > MOST_DUPLICATES * read:
        yield (
            f"{copies:,} of {read:,} rows ({percent(copies / read)}) repeat another. Is a source in it twice?",
            f"more than {percent(MOST_DUPLICATES)} of the rows read",
        )


def _few_rows(file: FileFigures) -> Told:
    if file["test"] < LEAST_TEST:
        yield (
            f"Only {file['test']:,} rows are held out: no figure measured on so few can be trusted. Give more data, or "
            "raise data.test_share.",
            f"fewer than {LEAST_TEST} rows held out",
        )
    if file["train"] < LEAST_TRAIN:
        yield (
            f"Only {file['train']:,} rows are left to train on. That shows that a pipeline works, and teaches little.",
            f"fewer than {LEAST_TRAIN} rows to train on",
        )


def _unrendered(file: FileFigures) -> Told:
    if file["unrendered"]:
        yield (
            f"The chat template refuses {file['unrendered']:,} of {file['sampled']:,} sampled rows. "
            "`align check CONFIG` names one, with the reason.",
            "any at all",
        )


def _too_long(file: FileFigures) -> Told:
    for limit in file["limits"]:
        if limit["share"] > MOST_TOO_LONG:
            yield (
                f"{percent(limit['share'])} of the sampled {limit['of']}s are longer than {limit['key']} = "
                f"{limit['limit']:,} tokens and will be left out. Raise it, or shorten the rows.",
                f"more than {percent(MOST_TOO_LONG)} of the sampled rows",
            )


def _longer(file: FileFigures) -> Told:
    pairs = file["pairs"]
    if not pairs or pairs["longer_share"] is None or pairs["longer"] + pairs["shorter"] < LEAST_TOLD:
        return
    share = pairs["longer_share"]
    word = "longer" if share >= 0.5 else "shorter"
    told = max(share, 1 - share)
    if told > MOST_LONGER:
        yield (
            f"The chosen answer is the {word} one in {percent(told)} of the pairs: a model may learn that {word} is "
            "better, and little else.",
            f"more than {percent(MOST_LONGER)} either way, of at least {LEAST_TOLD} pairs",
        )


def _agreement(file: FileFigures) -> Told:
    pairs = file["pairs"]
    if not pairs or pairs["agreement"] is None or pairs["agreement"] >= LEAST_AGREEMENT:
        return
    against = pairs["labelled_again"] - pairs["agreeing"]
    yield (
        f"{against:,} of {pairs['labelled_again']:,} pairs that are labelled more than once are labelled both ways. "
        "Copies that agree may have been left out as duplicates, so read the number, not the share.",
        f"fewer than {percent(LEAST_AGREEMENT)} agree",
    )


def _openings(file: FileFigures) -> Told:
    answers = file["sampled"]
    for opening in file["openings"]:
        if opening["share"] > MOST_OPENING and answers >= LEAST_TOLD:
            yield (
                f"{percent(opening['share'])} of the sampled answers begin with “{opening['name']}”: a model will "
                "begin so too.",
                f"more than {percent(MOST_OPENING)} of at least {LEAST_TOLD} answers",
            )


def _languages(file: FileFigures) -> Told:
    told = [group for group in file["languages"] if group["name"] != UNTOLD]
    rows = sum(group["rows"] for group in told)
    others = sum(group["rows"] for group in told[1:])
    if rows >= LEAST_TOLD and others > MOST_OTHER_LANGUAGES * rows:
        names = ", ".join(f"{group['name']} {group['rows']:,}" for group in told[1:4])
        yield (
            f"Most sampled rows are in {told[0]['name']}, but {percent(others / rows)} are not ({names}). If that is "
            f"not meant, set prepare.languages: [{told[0]['name']}].",
            f"more than {percent(MOST_OTHER_LANGUAGES)} of the sampled rows that are long enough to tell",
        )


def _sources(file: FileFigures) -> Told:
    if len(file["sources"]) > 1 and file["sources"][0]["share"] > MOST_ONE_SOURCE:
        first = file["sources"][0]
        yield (
            f"{percent(first['share'])} of the rows come from {first['name']}: the other sources hardly count. Set "
            "weights, or prepare.balance.",
            f"more than {percent(MOST_ONE_SOURCE)} from one of several sources",
        )


def _augmented(file: FileFigures) -> Told:
    if file["rows"] and file["augmented"] > MOST_AUGMENTED * file["rows"]:
        yield (
            f"{percent(file['augmented'] / file['rows'])} of the rows were made by augmentation from the others.",
            f"more than {percent(MOST_AUGMENTED)} of the rows",
        )
