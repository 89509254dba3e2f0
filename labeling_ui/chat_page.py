"""The chat page: one message, the answers of one or two models side by side, and a vote that goes to the label store.

The frame is drawn by Gradio and driven by `static/chat.js` through routes of our own, behind the labelling app's gate
and its one-time link. What a model wrote reaches the browser as HTML from `labeling_ui.render` and in no other way.
Who speaks, and what is stored, is the caller's: this module knows models by their place on the screen only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from labeling_ui.accounts import Accounts
from labeling_ui.address import Address, Site
from labeling_ui.app import STATIC, create_app, current
from labeling_ui.assignment import Refused
from labeling_ui.checks import is_storable
from labeling_ui.page import mount
from labeling_ui.render import answer_html, is_blank, visible
from labeling_ui.server import serving
from labeling_ui.store import LabelStore
from reward.records import InputError, Record

# (place from the left, the text so far)
Told = Callable[[int, str], None]
CHOICES = ("left", "tie", "right")

HEAD = """
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="stylesheet" href="/static/label.css">
<link rel="stylesheet" href="/static/chat.css">
<script type="module" src="/static/chat.js"></script>
"""

FRAME = """
<div id="align" class="ch" data-state="loading">
  <header class="al-bar">
    <h1 class="al-title">Chat</h1>
    <span id="al-who" class="al-progress"></span>
    <span id="al-state" class="al-state" role="status" aria-live="polite">Loading…</span>
    <label id="al-hiding" class="ch-hiding" hidden><input type="checkbox" id="al-blind"> Hide names</label>
    <button type="button" id="al-new">New conversation <kbd>N</kbd></button>
    <button type="button" id="al-dark" aria-pressed="false">Dark <kbd>D</kbd></button>
  </header>
  <section id="al-talk" class="ch-talk" aria-label="Conversation"></section>
  <section class="ch-foot" aria-label="Your turn">
    <p id="al-message" class="al-message" role="alert"></p>
    <div id="al-votes" class="ch-votes" role="group" aria-label="Your vote" hidden>
      <button type="button" class="ch-vote" data-choice="left" data-side="left"><span>Left is better</span> <kbd>1</kbd></button>
      <button type="button" class="ch-vote" data-choice="tie"><span>Tie</span> <kbd>2</kbd></button>
      <button type="button" class="ch-vote" data-choice="right" data-side="right"><span>Right is better</span> <kbd>3</kbd></button>
    </div>
    <div class="ch-write">
      <label for="al-text" class="ch-unseen">Your message</label>
      <textarea id="al-text" rows="2" placeholder="Your message (Enter sends)"></textarea>
      <button type="button" id="al-send">Send</button>
      <button type="button" id="al-stop" hidden>Stop</button>
    </div>
    <p class="ch-keys"><kbd>Shift</kbd> <kbd>Enter</kbd> is a new line. Outside the field (<kbd>Esc</kbd> leaves it): <kbd>1</kbd> <kbd>2</kbd> <kbd>3</kbd> vote,
      <kbd>M</kbd> message, <kbd>N</kbd> new conversation, <kbd>D</kbd> dark.</p>
  </section>
</div>
"""  # noqa: E501  a button's label is one line, else the space before its key is lost


class Talk(Protocol):
    """Who speaks, and what becomes of a vote. Every method may be called from any thread.

    A view is `{id, blind, sides, names, turns: [{message, answers: [{text, note}]}], voted, unvotable}`: `names` from
    left to right, None while they are hidden; `voted` the choice; `unvotable` why no vote can be given now, or "".

    Raises:
        Refused, InputError: by every method; the sentence is for whoever sits at the page. Nothing was changed.
    """

    def start(self, blind: bool | None) -> Record:
        """The view of a new conversation; None: blind or not as the program was started."""

    def view(self, conversation: str) -> Record: ...

    def say(self, conversation: str, text: str, told: Told, stopped: Callable[[], bool]) -> Record:
        """The view with one more turn; `told` hears every answer as it grows, `stopped` is asked before every token."""

    def vote(self, conversation: str, choice: str, key: str, seconds: float | None) -> Record:
        """The view after a vote; when this returns, the vote is on the disk. The same key again changes nothing."""


@contextlib.contextmanager
def serving_chat(store: LabelStore, address: Address, talk: Talk) -> Iterator[Site]:
    """The chat app for one person, in a thread of its own, for the time of a block.

    Raises:
        InputError: the address is not of this machine alone, or taken.
    """
    if address.host not in ("127.0.0.1", "localhost") or address.url or address.tls:
        raise InputError(
            f"The host is {address.host}, but the chat page asks for no password: it listens on 127.0.0.1 or localhost "
            "alone; from another machine, come through an SSH tunnel (ssh -L)."
        )
    with serving(store, address, local=True, make=lambda store, site: create_chat_app(store, site, talk)) as site:
        yield site


def create_chat_app(store: LabelStore, site: Site, talk: Talk, *, pages: bool = True) -> FastAPI:
    """The labelling app's gate and log-in over a store, with the chat in place of the labelling pages."""
    app = create_app(store, site, pages=False)
    accounts = Accounts(store)
    _chat_routes(app, talk, lambda request: current(request, accounts, site))
    for name, kind in (("chat.js", "text/javascript"), ("chat.css", "text/css")):

        def served(name: str = name, kind: str = kind) -> Response:
            return FileResponse(STATIC / name, media_type=kind, headers={"Cache-Control": "no-cache"})

        app.get(f"/static/{name}")(served)

    @app.get("/label/")
    def label_page() -> Response:
        return RedirectResponse("/chat/", status_code=303)  # where the one-time link leads to

    if pages:
        mount(app, build_chat_page(), "/chat", HEAD, lambda request: _name(current(request, accounts, site)))
    return app


def build_chat_page() -> Any:
    """The page as Gradio Blocks."""
    import gradio as gr

    with gr.Blocks(title="Chat", fill_width=True, analytics_enabled=False) as blocks:
        gr.Markdown(FRAME.strip(), sanitize_html=False, latex_delimiters=[], padding=False)
    return blocks


def _name(who: Any) -> str | None:
    return None if who is None else str(who.name)


def _chat_routes(app: FastAPI, talk: Talk, who: Callable[[Any], Any]) -> None:
    stops: dict[str, threading.Event] = {}  # of conversations that are being answered

    def enter(request: Request) -> None:
        if who(request) is None:
            raise Refused("login", "You are not let in any more: open the link printed at the next start.")

    async def body(request: Request) -> Record:
        await run_in_threadpool(enter, request)
        try:
            found = json.loads((await request.body()).decode("utf-8"))
        except (UnicodeError, ValueError, RecursionError) as error:
            raise InputError(f"The request is not JSON in UTF-8 ({error}).") from error
        if not isinstance(found, dict):
            raise InputError("The request must be a JSON object.")
        return found

    def text(found: Record, name: str, longest: int = 200) -> str:
        value = found.get(name)
        if not isinstance(value, str) or not 1 <= len(value) <= longest or not is_storable(value):
            raise InputError(f'The request must hold "{name}", a text of 1 to {longest} characters.')
        return value

    @app.get("/api/chat/conversation")
    def conversation(request: Request, id: str = "") -> Response:
        enter(request)
        try:
            found = talk.view(id)
        except Refused:
            found = talk.start(None)  # of another start of the program, or none yet
        return JSONResponse(page_view(found))

    @app.post("/api/chat/new")
    async def new(request: Request) -> Response:
        found = await body(request)
        return JSONResponse(page_view(await run_in_threadpool(talk.start, found.get("blind") is True)))

    @app.post("/api/chat/say")
    async def say(request: Request) -> Response:
        found = await body(request)
        name, message = text(found, "conversation"), found.get("text")
        if not isinstance(message, str) or not is_storable(message):
            raise InputError("The message holds the character 0 or half of a character: leave it out.")
        return StreamingResponse(answered(name, message), media_type="application/x-ndjson")

    async def answered(name: str, message: str) -> AsyncIterator[str]:
        """A line of JSON for every step of an answer, and one for the end: the view, or what went wrong."""
        loop, lines, stop = asyncio.get_running_loop(), asyncio.Queue[Record](), threading.Event()

        def put(line: Record) -> None:
            with contextlib.suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(lines.put_nowait, line)

        def work() -> None:
            try:
                put(
                    {
                        "view": page_view(
                            talk.say(name, message, lambda place, so_far: put(step(place, so_far)), stop.is_set)
                        )
                    }
                )
            except InputError as error:
                put({"error": visible(str(error)), "reason": getattr(error, "reason", "wrong")})
            except BaseException:
                put({"error": "The program failed; what happened stands in its terminal.", "reason": "failed"})
                raise

        stops[name] = stop
        working = asyncio.ensure_future(run_in_threadpool(work))
        try:
            while True:
                line = await lines.get()
                yield json.dumps(line) + "\n"
                if "place" not in line:
                    await working
                    return
        finally:
            stop.set()  # the browser has gone: nobody reads the rest
            if stops.get(name) is stop:
                del stops[name]

    @app.post("/api/chat/stop")
    async def stop(request: Request) -> Response:
        if (found := stops.get(text(await body(request), "conversation"))) is not None:
            found.set()
        return JSONResponse({})

    @app.post("/api/chat/vote")
    async def vote(request: Request) -> Response:
        found = await body(request)
        choice, seconds = text(found, "choice"), found.get("seconds")
        if choice not in CHOICES:
            raise InputError(f'The vote is {choice!r}: "left", "tie" or "right" is wanted.')
        names = text(found, "conversation"), choice, text(found, "key")
        return JSONResponse(page_view(await run_in_threadpool(talk.vote, *names, seconds)))


def page_view(found: Record) -> Record:
    """A view as the page gets it: what was said as HTML that can do nothing."""
    turns = [
        {"message": said(turn["message"]), "answers": [said(a["text"]) | {"note": a["note"]} for a in turn["answers"]]}
        for turn in found["turns"]
    ]
    names = found["names"] and [visible(name)[:200] for name in found["names"]]
    return found | {"turns": turns, "names": names}


def said(text: str) -> Record:
    return {"html": answer_html(text), "blank": is_blank(text), "characters": len(text)}


def step(place: int, text: str) -> Record:
    return {"place": place, **said(text)}
