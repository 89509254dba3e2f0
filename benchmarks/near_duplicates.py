"""Near-duplicates of `align data prepare`: recall and precision on planted ones, time and memory, beside text-dedup.

    python benchmarks/near_duplicates.py --rows 10000,100000,1000000
    pip install --target peer --no-deps text-dedup==0.4.0 "click-option-group<0.6"
    python benchmarks/near_duplicates.py --rows 100000 --peer peer --rounds 3

Rows are made-up English: 50,000 words whose frequencies follow Zipf's law, 30 to 170 of them (a hundred on average) in
sentences. Of all rows,

- 10 % are copies of another row, each changed in one of the ways in `EDITS`, where a rate of 3 % means that every word
  has this chance to be replaced, deleted or given a new neighbour, and at least one is;
- 5 % have three quarters of their words, in one piece, from another row, and 5 % are a template of 50 words, one of
  twenty, with 20 words of their own: both are alike to others, and no duplicates.

Recall is the share of the copies that are put together with their original, precision the share of the rows put
together with the first of their cluster that are copies of the same original (or it). "Of alike" is recall among the
copies that are still as alike to their original as the threshold says: what is missing there, the method misses. A side
reads the rows from JSONL, finds the duplicates with two worker processes, and writes the rows that stay; sides
alternate, each in a process of its own. Time is without imports. Memory is the peak of the process and, for each
worker, that of the largest one.

text-dedup is run with the same shingles (two words), 128 permutations, the same threshold and its fastest hash (xxh3):
with its defaults (five words, 0.7) it finds less. It takes rows for duplicates that share a band, unchecked.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness

COPIES, NEIGHBOURS, TEMPLATED = 0.10, 0.05, 0.05  # shares of the rows
WORDS, LEAST, MOST = 50_000, 30, 170
# Edits by name: (share of words edited, case changed, punctuation changed, words put before)
EDITS: dict[str, tuple[float, bool, bool, int]] = {
    "case": (0, True, False, 0),
    "punctuation": (0, False, True, 0),
    "prefix of 1 to 5 words": (0, False, False, 5),
    "1 % of words": (0.01, False, False, 0),
    "2 % of words": (0.02, False, False, 0),
    "3 % of words": (0.03, False, False, 0),
    "4 % of words": (0.04, False, False, 0),
    "case, punctuation, 2 % of words": (0.02, True, True, 0),
}
CHUNK = 2_000  # rows that go to a worker at a time
PEER_MOST = 100_000  # rows: more take the peer long


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--rows", default="10000,100000")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threshold", type=float, default=0.8)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer", help="folder with text-dedup 0.4.0 and click-option-group")
    parser.add_argument("--results", help="Markdown file whose section is written anew")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps({"ours": ours, "peer": peer, "make": make}[args.side](args)))
        return
    runs = []
    for count in map(int, args.rows.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            side(args, "make", count, folder, f"{count} rows")
            sides = ["ours", "peer"] if args.peer and count <= PEER_MOST else ["ours"]
            for number, name in harness.rounds(sides, args.rounds):
                told = side(args, name, count, folder, f"{count} rows, round {number + 1} of {args.rounds}: {name}")
                runs.append(
                    {"rows": count, "round": number, "side": name, **told, **quality(Path(folder), args.threshold)}
                )
    report(args, runs)


def side(args: argparse.Namespace, name: str, rows: int, folder: str, say: str) -> dict[str, Any]:
    given = ["--side", name, "--rows", str(rows), "--folder", folder]
    for key in ("threshold", "processes", "seed", "peer"):
        given += [f"--{key}", str(getattr(args, key))]
    told: dict[str, Any] = harness.side_record(__file__, given, 1, say)
    return told


def report(args: argparse.Namespace, runs: list[dict[str, Any]]) -> None:
    table, ratios = [], {}
    for count in dict.fromkeys(run["rows"] for run in runs):
        here = [run for run in runs if run["rows"] == count]
        for name in dict.fromkeys(run["side"] for run in here):
            own = [run for run in here if run["side"] == name]
            seconds = harness.middle([run["seconds"] for run in own])
            assert seconds is not None
            found = [f"{own[0][key]:.4f}" for key in ("recall", "recall_alike", "precision")]
            peak = max(run["peak"] for run in own) / 2**20
            rate = f"{count / seconds['median']:,.0f}"
            table.append([f"{count:,}", name, *found, harness.spread(seconds, digits=1), rate, f"{peak:,.0f}"])
        if any(run["side"] == "peer" for run in here):
            ratios[count] = harness.ratio(here, "peer", "ours", "seconds")
    text = harness.markdown(["rows", "side", "recall", "of alike", "precision", "s", "rows/s", "peak MiB"], table)
    last = [run for run in runs if run["side"] == "ours"][-1]
    text += f"\n\nRecall of ours at {last['rows']:,} rows by edit:\n\n"
    edits = [[name, f"{told['recall']:.4f}", f"{told['similarity']:.3f}"] for name, told in last["edits"].items()]
    text += harness.markdown(["edit", "recall", "mean similarity"], edits)
    text += "\n\nSeconds of it: " + ", ".join(f"{name} {spent:.1f}" for name, spent in last["parts"].items()) + "."
    for count, ratio in ratios.items():
        text += f"\n\ntext-dedup over ours at {count:,} rows, seconds: {harness.spread(ratio)}."
    claim = "`benchmarks/near_duplicates.py`: near-duplicates found, what they cost, beside text-dedup 0.4.0."
    harness.finish("near duplicates", claim, {"ratios": ratios, "runs": runs}, text, args.results)


# The rows


def make(args: argparse.Namespace) -> dict[str, Any]:
    """rows.jsonl with {"text"}, and truth.npz: of every row its origin, its edit and its similarity to the origin."""
    import numpy as np

    from align.data.prepare.duplicates import jaccard

    count = int(args.rows)
    draw = np.random.default_rng(args.seed)
    vocabulary = made_up_words(draw)
    shares = 1 / np.arange(1, WORDS + 1) ** 1.05
    edges = np.cumsum(shares / shares.sum())
    templates = draw.integers(0, WORDS, (20, 50))

    def some(length: int) -> list[str]:
        return [vocabulary[number] for number in np.searchsorted(edges, draw.random(length)).clip(max=WORDS - 1)]

    # What a row is, is drawn first, so that copies lie anywhere before or after their original.
    kinds = draw.choice(4, count, p=[1 - COPIES - NEIGHBOURS - TEMPLATED, COPIES, NEIGHBOURS, TEMPLATED])
    origin, edit = np.arange(count), np.full(count, -1, np.int8)
    similarity = np.ones(count, np.float32)
    plain = np.flatnonzero(kinds == 0)
    lengths = draw.integers(LEAST, MOST + 1, count)
    sources = {int(row): int(draw.choice(plain)) for row in np.flatnonzero((kinds == 1) | (kinds == 2))}
    wanted = set(sources.values())
    originals: dict[int, str] = {}
    written: list[str] = [""] * count
    for row in plain:
        written[row] = sentences(draw, some(lengths[row]))
        if row in wanted:
            originals[int(row)] = written[row]
    for row, source in sources.items():
        text = originals[source]
        if kinds[row] == 1:
            edit[row] = draw.integers(len(EDITS))
            written[row] = edited(draw, text, *list(EDITS.values())[edit[row]], some)
            origin[row], similarity[row] = source, jaccard(text, written[row])
        else:
            words = text.split()
            part = len(words) // 4
            written[row] = " ".join([*words[: len(words) - part], *sentences(draw, some(part)).split()])
    for row in np.flatnonzero(kinds == 3):
        frame = [vocabulary[number] for number in templates[draw.integers(len(templates))]]
        written[row] = sentences(draw, [*frame, *some(20)])
    with (args.folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in written)
    np.savez(args.folder / "truth.npz", origin=origin, edit=edit, similarity=similarity)
    return {}


def made_up_words(draw: Any) -> list[str]:
    """Different words of one to four syllables; frequent ones are short, as in English."""
    starts = ("b", "c", "d", "f", "g", "h", "l", "m", "n", "p", "r", "s", "t", "v", "w", "st", "tr", "ch")
    vowels, ends = "aeiou", ("", "", "n", "r", "s", "t", "ll")
    found: dict[str, None] = {}
    while len(found) < WORDS:
        syllables = 1 + min(3, int(len(found) ** 0.5) // 40) + int(draw.random() < 0.3)
        parts = [
            starts[draw.integers(18)] + vowels[draw.integers(5)] + ends[draw.integers(7)] for _ in range(syllables)
        ]
        found["".join(parts)] = None
    return [*found]


def sentences(draw: Any, words: list[str]) -> str:
    """The words in sentences of 6 to 18, with commas."""
    told, start = [], 0
    while start < len(words):
        length = 6 + int(12 * draw.random())
        part = words[start : start + length]
        told.append(" ".join(part[: len(part) // 2]).capitalize() + ", " * (len(part) > 10) + " " * (len(part) <= 10))
        told.append(" ".join(part[len(part) // 2 :]) + ". ")
        start += length
    return " ".join("".join(told).split())


def edited(draw: Any, text: str, rate: float, case: bool, punctuation: bool, before: int, some: Any) -> str:
    words = text.split()
    if rate:
        chosen = draw.random(len(words)) < rate
        chosen[draw.integers(len(words))] |= not chosen.any()
        told = []
        for word, hit in zip(words, chosen, strict=True):
            way = draw.integers(3) if hit else None
            told += [word] if way is None else {0: some(1), 1: [], 2: [word, *some(1)]}[int(way)]
        words = told
    if before:
        words = some(1 + int(draw.integers(before))) + words
    text = " ".join(words)
    if punctuation:
        comma, stop = (" -", "!") if draw.random() < 0.5 else ("", "")
        text = text.replace(",", comma).replace(".", stop)
    if case:
        text = text.upper() if draw.random() < 0.5 else text.lower()
    return text


def quality(folder: Path, threshold: float) -> dict[str, Any]:
    """Recall, by edit as well, and precision of what the last side found."""
    import numpy as np

    truth, found = np.load(folder / "truth.npz"), np.load(folder / "found.npy")
    origin, edit = truth["origin"], truth["edit"]
    together = found == found[origin]
    again = found != np.arange(len(found))
    edits = {}
    for number, name in enumerate(EDITS):
        rows = edit == number
        if rows.any():
            edits[name] = {
                "recall": float(together[rows].mean()),
                "similarity": float(truth["similarity"][rows].mean()),
            }
    alike = (edit >= 0) & (truth["similarity"] >= threshold)
    return {
        "recall": float(together[edit >= 0].mean()),
        "recall_alike": float(together[alike].mean()),
        "precision": float((origin[again] == origin[found[again]]).mean()),
        "edits": edits,
    }


# The sides


def ours(args: argparse.Namespace) -> dict[str, Any]:
    import multiprocessing

    import numpy as np

    from align.data.prepare.duplicates import PERMUTATIONS, clusters, sign

    count = int(args.rows)
    started = time.perf_counter()
    signatures = np.empty((count, PERMUTATIONS), np.uint32)
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        filled = 0
        for part in pool.imap(sign, texts(args.folder / "rows.jsonl")):
            signatures[filled : filled + len(part)] = part
            filled += len(part)
    signed = time.perf_counter()
    found = clusters(signatures, args.threshold)
    clustered = time.perf_counter()
    stays = found == np.arange(count)
    with (args.folder / "rows.jsonl").open("rb") as rows, (args.folder / "kept.jsonl").open("wb") as kept:
        kept.writelines(line for line, stay in zip(rows, stays, strict=True) if stay)
    ended = time.perf_counter()
    np.save(args.folder / "found.npy", found)
    parts = {"signing": signed - started, "clustering": clustered - signed, "writing": ended - clustered}
    return {"seconds": ended - started, "parts": parts, "peak": peak(args.processes)}


def texts(path: Path) -> Iterator[list[str]]:
    held: list[str] = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            held.append(json.loads(line)["text"])
            if len(held) == CHUNK:
                yield held
                held = []
    if held:
        yield held


def peer(args: argparse.Namespace) -> dict[str, Any]:
    """text-dedup's own command, in this process; which rows it puts together is in its union-find."""
    import numpy as np

    sys.path.append(args.peer)
    from text_dedup import minhash

    folder, count = args.folder, int(args.rows)
    with tempfile.TemporaryDirectory(dir=folder) as cache:  # a new one every round: nothing is found there
        given = ["--path", "json", "--data_files", f"{folder / 'rows.jsonl'}", "--split", "train", "--column", "text"]
        given += ["--cache_dir", cache, "--output", f"{cache}/kept", "--num_proc", str(args.processes)]
        given += ["--ngram", "2", "--num_perm", "128", "--threshold", str(args.threshold), "--hash_func", "xxh3"]
        started = time.perf_counter()
        minhash.main(given, standalone_mode=False)
        ended = time.perf_counter()
    root = np.array([minhash.uf.find(row) for row in range(count)])
    first = np.full(count, count)
    np.minimum.at(first, root, np.arange(count))
    np.save(folder / "found.npy", first[root])
    return {"seconds": ended - started, "parts": {}, "peak": peak(args.processes)}


def peak(workers: int) -> int:
    """Bytes: of this process, and for every worker that of the largest."""
    return harness.peak() + workers * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


if __name__ == "__main__":
    main()
