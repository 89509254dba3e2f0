"""No item is judged too often: 50 annotators at once, 100 items, caps of 1 and 3, 20 seeds.

    python benchmarks/labeling_caps.py --seeds 20

Every annotator is a thread that asks, labels and asks again without pausing, and sometimes skips, takes back, leaves or
lets a lease expire. At the end every item must have exactly its number of labels, and nobody two on one item.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import harness

from labeling_ui.assignment import Assigner, Refused
from labeling_ui.store import LabelStore, Settings


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--annotators", type=int, default=50)
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--caps", default="1,3")
    parser.add_argument("--results", help="Markdown file whose section is written anew")
    args = parser.parse_args()
    rows, figures = [], []
    for cap in map(int, args.caps.split(",")):
        found = [run(seed, cap, args.annotators, args.items) for seed in range(args.seeds)]
        total = {name: sum(each[name] for each in found) for name in found[0]}
        figures.append({"cap": cap, **total})
        rows.append([str(cap), *(str(total[name]) for name in ("labels", "over", "missing", "twice", "refused"))])
    text = harness.markdown(
        ["cap", "labels", "items over cap", "items under cap", "judged twice by one", "refused"], rows
    )
    claim = (
        f"`benchmarks/labeling_caps.py`: {args.annotators} annotators at once, {args.items} items, {args.seeds} seeds."
    )
    harness.finish("labeling_caps", claim, {"caps": figures}, text, args.results)
    if any(each["over"] or each["missing"] or each["twice"] for each in figures):
        raise SystemExit("an item has too many or too few labels")


def run(seed: int, cap: int, annotators: int, items: int) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder, LabelStore(Path(folder) / "labels.db") as store:
        settings = Settings(overlap=cap, gold_share=0.0, lease_seconds=10.0)
        project = store.create_project("p", settings=settings)
        store.add_items(project, [comparison(n) for n in range(items)])
        assigner, refused, gate = Assigner(store, project), [0] * annotators, threading.Barrier(annotators)

        def work(number: int) -> None:
            drawn, name, step = random.Random(f"{seed} {number}"), f"ann-{number}", 0
            gate.wait()
            while (lease := assigner.next(name)) is not None:
                step += 1
                try:
                    deed = drawn.random()
                    if deed < 0.03:
                        assigner.undo(name, f"{name}-undo-{step}")
                    elif deed < 0.05:
                        assigner.release(name)
                    else:
                        said = {"order": list(lease.order), "value": drawn.randint(1, 7)}
                        assigner.label(name, lease.token, f"{name}-{step}", said)
                except Refused:
                    refused[number] += 1

        # Whoever gave an item back leaves it to those who still ask; a last round picks up what nobody came for.
        for _ in range(2):
            threads = [threading.Thread(target=work, args=(number,)) for number in range(annotators)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            gate.reset()
        given = store.labels(project)
        count = Counter(label.item_id for label in given)
        each = Counter((label.item_id, label.annotator) for label in given)
        return {
            "labels": len(given),
            "over": sum(n > cap for n in count.values()),
            "missing": sum(count[item.id] < cap for item in store.items(project)),
            "twice": sum(n > 1 for n in each.values()),
            "refused": sum(refused),
        }


def comparison(number: int, words: int = 5) -> dict[str, Any]:
    """A comparison of two answers of about so many words."""
    texts = [f"Answer {side} to {number}. " + "Some more words of it. " * (words // 5) for side in "ab"]
    prompt = [{"role": "user", "content": f"Question {number}?"}]
    return {"id": f"c{number}", "prompt": prompt, "split": "train", "answers": [{"text": text} for text in texts]}


if __name__ == "__main__":
    main()
