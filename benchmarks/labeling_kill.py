"""No acknowledged label is lost or doubled: the server is killed with SIGKILL again and again while people label.

    python benchmarks/labeling_kill.py --kills 20 --labels 5000

The app runs as a process of its own on a SQLite file. Annotators send labels over HTTP, each under a key of its own,
and send a label again, under the same key, until it is acknowledged. The server is killed at random moments and started
again. At the end the database must hold every acknowledged key once, and at most the keys in flight beside them.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import harness
from labeling_caps import comparison

from labeling_ui.accounts import Accounts
from labeling_ui.store import LabelStore, Settings

SERVER = """
import sys, time
from labeling_ui.address import Address, Site
from labeling_ui.app import create_app
from labeling_ui.store import LabelStore
import uvicorn
path, port = sys.argv[1], int(sys.argv[2])
app = create_app(LabelStore(path), Site([f"http://127.0.0.1:{port}"]), pages=False)
uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")
"""


class Running:
    """The app's routes in a process of their own, over a database file."""

    def __init__(self, path: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.path, self.origin = path, f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        root = str(Path(__file__).resolve().parent.parent)
        command = [sys.executable, "-c", SERVER, str(self.path), str(self.port)]
        self.process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": root})
        for _ in range(300):
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                if self.process.poll() is not None:
                    raise SystemExit("the server ended at its start") from None
                time.sleep(0.05)
        raise SystemExit("the server did not start within 15 s")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=20)


class Client:
    """One annotator's browser: a cookie and a connection that is kept."""

    def __init__(self, running: Running, cookie: str) -> None:
        self.running, self.cookie = running, cookie
        self.connection: http.client.HTTPConnection | None = None

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        if self.connection is None:
            self.connection = http.client.HTTPConnection("127.0.0.1", self.running.port, timeout=30)
            self.connection.connect()
            assert self.connection.sock is not None
            self.connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        headers = {"Origin": self.running.origin, "Cookie": f"align_session={self.cookie}"}
        try:
            self.connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = self.connection.getresponse()
            return answer.status, json.loads(answer.read())
        except (OSError, http.client.HTTPException):
            self.connection.close()
            self.connection = None
            raise


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--labels", type=int, default=5000)
    parser.add_argument("--annotators", type=int, default=8)
    parser.add_argument("--results", help="Markdown file whose section is written anew")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "labels.db"
        with LabelStore(path) as store:
            project = store.create_project("p", settings=Settings(gold_share=0.0))
            store.add_items(project, [comparison(n) for n in range(args.labels + 100 * args.annotators)])
            cookies = [Accounts(store).local(f"ann-{n}") for n in range(args.annotators)]
        running, acknowledged, kills = Running(path), [], 0
        threads = [
            threading.Thread(target=label, args=(Client(running, cookie), n, args.labels, acknowledged), daemon=True)
            for n, cookie in enumerate(cookies)
        ]
        for thread in threads:
            thread.start()
        drawn, share = random.Random(0), args.labels / (args.kills + 1)
        while any(thread.is_alive() for thread in threads):
            if kills < args.kills and len(acknowledged) >= share * (kills + 1):
                time.sleep(drawn.random() * 0.05)  # anywhere in a request
                running.kill()
                kills += 1
                running.start()
            time.sleep(0.001)
        running.stop()
        with LabelStore(path) as store:
            project = store.project("p")
            keys = [event.key for event in store.events(project)]
            items = [event.item_id for event in store.labels(project)]
    figures = {
        "kills": kills,
        "acknowledged": len(acknowledged),
        "stored": len(keys),
        "lost": len(set(acknowledged) - set(keys)),
        "doubled": len(keys) - len(set(keys)) + len(items) - len(set(items)),
    }
    text = harness.markdown(list(figures), [[str(value) for value in figures.values()]])
    claim = "`benchmarks/labeling_kill.py`: the server killed with SIGKILL while people label; SQLite, over HTTP."
    harness.finish("labeling_kill", claim, figures, text, args.results)
    if figures["lost"] or figures["doubled"] or kills < args.kills:
        raise SystemExit("a label was lost or doubled, or too few kills fell into the run")


def label(client: Client, number: int, most: int, acknowledged: list[str]) -> None:
    step = 0
    while len(acknowledged) < most:
        try:
            status, told = client.ask("GET", "/api/next?project=p")
            if status != 200 or told["item"] is None:
                return
            lease = told["item"]["lease"]
            while len(acknowledged) < most and lease is not None:
                step += 1
                body = {"project": "p", "lease": lease, "key": f"{number}-{step}", "value": 1 + step % 7}
                while True:  # as the page does: the same label under the same key until it is answered
                    try:
                        status, told = client.ask("POST", "/api/label", body)
                        break
                    except (OSError, http.client.HTTPException):
                        time.sleep(0.05)
                if status == 200:
                    acknowledged.append(told["saved"])
                    lease = told["item"] and told["item"]["lease"]
                else:
                    break
        except (OSError, http.client.HTTPException):
            time.sleep(0.05)


if __name__ == "__main__":
    main()
