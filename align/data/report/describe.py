"""The figures of the data report, from the files that are finished and the counts of the steps that made them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.config import Config
from align.data.names import Kind
from align.data.prepare.steps import StepCount
from align.data.report.findings import look_at
from align.data.report.schema import SCHEMA, UNTOLD, FileFigures, Group, StepFigures, Told
from align.data.report.tally import Tally, groups_of
from reward.records import Record

KINDS: dict[str, Kind] = {"demonstrations": "demonstration", "prompts": "prompt", "preferences": "preference"}
SHOWN = 300  # characters of an example
OPENING = 3  # words
OPENING_SHOWN = 60  # characters: in some languages nothing separates words


def describe(config: Config, counts: Sequence[StepCount], files: Mapping[str, Path], tokenizer: Any | None) -> Told:
    """What is in the files, and what the steps did.

    Rows stream by once. Lengths, languages and openings are those of a sample of at most `SAMPLED` rows of each file.

    Args:
        counts: of every step, in order; `file` is a key of `files`.
        files: finished JSONL by key: demonstrations, prompts, preferences.
        tokenizer: of the base; None counts characters, and tells no costs.
    """
    # Planning knows the model's code, and so torch.
    from align.data.report.costs import Train, costs_of
    from align.data.report.lengths import lengths_of, limits_of, sizes_of

    config = config.prepared()
    figures, train = [], {}
    for key, path in files.items():
        tally = Tally.of(path, KINDS[key], config.seed)
        steps = [_step(count) for count in counts if count.file == key]
        sizes, measured, unrendered = sizes_of(tally.sample, tokenizer)
        figures.append(
            FileFigures(
                key=key,
                kind=KINDS[key],
                rows=tally.rows,
                train=tally.sides["train"],
                test=tally.sides["test"],
                augmented=tally.augmented,
                steps=steps,
                sampled=len(tally.sample),
                unit="characters" if tokenizer is None else "tokens",
                lengths=lengths_of(sizes),
                limits=[] if tokenizer is None else limits_of(config, key, sizes),
                unrendered=unrendered,
                sources=groups_of(tally.sources, tally.rows),
                languages=_languages(tally.sample),
                openings=_openings(tally.sample),
                pairs=tally.pairs(),
            )
        )
        on_train = [size for size, record in zip(sizes, measured, strict=True) if record.get("split") != "test"]
        train[key] = Train(tally.sides["train"], on_train)
    return Told(
        schema=SCHEMA,
        pipeline=config.name,
        seed=config.seed,
        look_at=look_at(config, figures),
        files=figures,
        costs=costs_of(config, train, tokenizer is not None),
    )


def _step(count: StepCount) -> StepFigures:
    return StepFigures(
        step=count.step,
        rows_in=count.rows_in,
        rows_out=count.rows_out,
        left_out=dict(sorted(count.left_out.items(), key=lambda item: (-item[1], item[0]))),
        changed=count.changed,
        examples=[{name: short(text) for name, text in example.items()} for example in count.examples],
    )


def short(text: str) -> str:
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


def _languages(sample: Sequence[Record]) -> list[Group]:
    """As `align.data.prepare.language` tells them: of the last turn and the answer, without code and addresses."""
    from align.data.prepare.language import other_language, text_to_tell

    any_language = frozenset[str]()  # so that every one is another
    codes = Counter(other_language(text_to_tell(record), any_language) or UNTOLD for record in sample)
    return groups_of(codes, len(sample))


def _openings(sample: Sequence[Record]) -> list[Group]:
    """The first words of the answers that are taught, in lower case, where one in a hundred, and two, begin so."""
    texts = [turns[0]["content"] for row in sample if (turns := row.get("completion") or row.get("chosen"))]
    openings = Counter(opening_of(text) for text in texts)
    return groups_of(openings, len(texts), least=max(2, len(texts) // 100), most=10)


def opening_of(text: str) -> str:
    """
    >>> opening_of("Sure,  I can help.")
    'sure, i can'
    """
    return " ".join(text[:1000].casefold().split()[:OPENING])[:OPENING_SHOWN]
