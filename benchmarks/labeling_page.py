"""From the key to the painted next item, in a real Chromium; and 30 keys without a pause.

    python benchmarks/labeling_page.py --keys 200

The app runs as `align label` runs it, pages and all, on this machine. The page itself takes the time: from the event of
the key to the first animation frame with the next item on the screen. Needs Chromium and the package playwright.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import tempfile
from pathlib import Path

import harness
from labeling_caps import comparison
from labeling_load import share

from labeling_ui.accounts import Accounts
from labeling_ui.address import Address
from labeling_ui.server import serving
from labeling_ui.store import LabelStore, Settings

PRESS = """async (keys) => {
  const box = document.getElementById("align"), taken = [];
  for (let i = 0; i < keys; i += 1) {
    const before = box.dataset.painted, started = performance.now();
    document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "2", code: "Digit2", bubbles: true }));
    while (box.dataset.painted === before) await new Promise((done) => requestAnimationFrame(done));
    taken.push(performance.now() - started);
    await new Promise((done) => setTimeout(done, 100));
  }
  return taken;
}"""
BURST = """async () => {
  const box = document.getElementById("align");
  for (let i = 0; i < 30; i += 1)
    document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "2", code: "Digit2", bubbles: true }));
  while (box.dataset.state !== "saved") await new Promise((done) => requestAnimationFrame(done));
  return document.getElementById("al-message").innerText;
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--keys", type=int, default=200)
    parser.add_argument("--results", help="Markdown file whose section is written anew")
    args = parser.parse_args()
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--disable-sync"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder, LabelStore(Path(folder) / "labels.db") as store:
        project = store.create_project("p", settings=Settings(gold_share=0.0))
        store.add_items(project, [comparison(n, words=120) for n in range(args.keys + 100)])
        with serving(store, Address(port=port)) as site, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
            page = browser.new_page()
            page.goto(f"{site.origins[0]}/join?token={Accounts(store).invite('annotator')}")
            page.fill("#name", "ann")
            page.fill("#password", "correct horse battery")
            page.click("button[type=submit]")
            page.wait_for_function("() => document.getElementById('align')?.dataset.painted")
            taken = page.evaluate(PRESS, args.keys)
            before = store.count_labels(project)
            message = page.evaluate(BURST)
            stored = store.count_labels(project) - before
            browser.close()
    refused = int(message.split()[0]) if message else 0
    figures = {"p50_ms": share(taken, 0.5), "p95_ms": share(taken, 0.95), "stored": stored, "refused": refused}
    row = [f"{figures['p50_ms']:.0f}", f"{figures['p95_ms']:.0f}", f"{stored} stored, {refused} refused"]
    text = harness.markdown(["median ms", "p95 ms", "30 keys at 0 ms gap"], [row])
    claim = f"`benchmarks/labeling_page.py`: key to painted next item, {args.keys} keys, Chromium on this machine."
    harness.finish("labeling_page", claim, figures, text, args.results)
    if stored + refused != 30:
        raise SystemExit("a key was neither stored nor refused")


if __name__ == "__main__":
    main()
