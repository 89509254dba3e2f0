"""How long an annotator waits: save + next with 50 annotators, at one label a second each and without pausing.

    python benchmarks/labeling_load.py --seconds 30

The app runs as a process of its own over a SQLite file with 100,000 items; the annotators are threads of this process,
each with a connection of its own, on the same machine (so that their own time is in the figures). `next` alone is timed
in the store with as many items.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import threading
import time
from pathlib import Path

import harness
from labeling_caps import comparison
from labeling_kill import Client, Running

from labeling_ui.accounts import Accounts
from labeling_ui.assignment import Assigner
from labeling_ui.store import LabelStore, Settings


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--annotators", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--results", help="Markdown file whose section is written anew")
    args = parser.parse_args()
    rows, figures = [], {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "labels.db"
        with LabelStore(path) as store:
            project = store.create_project("p", settings=Settings(gold_share=0.0, overlap=3))
            store.add_items(project, [comparison(n, words=60) for n in range(args.items)])
            taken = nexts(Assigner(store, project))
            figures["next_p95_ms"] = share(taken, 0.95)
            rows.append(
                [f"next, {args.items} items, in the store", "", *(f"{share(taken, p):.1f}" for p in (0.5, 0.95))]
            )
            cookies = [Accounts(store).local(f"ann-{n}") for n in range(args.annotators)]
        running = Running(path)
        for name, pause in (("one label a second", 1.0), ("no pause", 0.0)):
            taken = load(running, cookies, args.seconds, pause)
            rate = len(taken) / args.seconds
            figures[name] = {"p50_ms": share(taken, 0.5), "p95_ms": share(taken, 0.95), "labels_per_s": rate}
            rows.append([f"save + next, {name}", f"{rate:.0f}", *(f"{share(taken, p):.1f}" for p in (0.5, 0.95))])
        running.stop()
    text = harness.markdown(["what", "labels/s", "median ms", "p95 ms"], rows)
    claim = f"`benchmarks/labeling_load.py`: {args.annotators} annotators over HTTP, {args.items} items, SQLite."
    harness.finish("labeling_load", claim, figures, text, args.results)


def nexts(assigner: Assigner, count: int = 400) -> list[float]:
    """Milliseconds of `next` for annotators who label in between."""
    taken = []
    for n in range(count):
        name = f"warm-{n % 20}"
        assigner.release(name)
        started = time.perf_counter()
        lease = assigner.next(name)
        taken.append((time.perf_counter() - started) * 1000)
        assert lease is not None
        assigner.label(name, lease.token, f"w{n}", {"order": list(lease.order), "value": 2})
    return taken


def load(running: Running, cookies: list[str], seconds: float, pause: float) -> list[float]:
    """Milliseconds of every label, from the click to the next item."""
    taken: list[float] = []
    end = time.perf_counter() + seconds

    def work(number: int) -> None:
        drawn, client = random.Random(number), Client(running, cookies[number])
        lease = client.ask("GET", "/api/next?project=p")[1]["item"]["lease"]
        time.sleep(drawn.random() * pause)
        step = 0
        while (started := time.perf_counter()) < end:
            step += 1
            body = {"project": "p", "lease": lease, "key": f"{number}-{pause}-{step}", "value": 1 + step % 7}
            status, told = client.ask("POST", "/api/label", body)
            taken.append((time.perf_counter() - started) * 1000)
            if status != 200:
                raise SystemExit(f"a label was refused: {told}")
            lease = told["item"]["lease"]
            if pause:
                time.sleep(max(0.0, pause * (0.5 + drawn.random()) - (time.perf_counter() - started)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(cookies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return taken


def share(values: list[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


if __name__ == "__main__":
    main()
