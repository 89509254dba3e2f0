"""The labelling app: FastAPI around the store, with the pages of Gradio mounted behind its log-in.

Gradio draws the pages; everything that counts goes through routes of our own: who is logged in, which item is lent,
what is stored. Every request passes one gate (`_Gate`): a known host, for whatever changes something an Origin of our
own, and headers that let a page run no script and load nothing from elsewhere.
"""

from __future__ import annotations

import functools
import json
import logging
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import HTTPConnection

from labeling_ui.accounts import SESSION_SECONDS, Accounts, Annotator, Denied
from labeling_ui.address import Site
from labeling_ui.assignment import Assigner, Lease, Progress, Refused
from labeling_ui.database import DatabaseError
from labeling_ui.render import answer_html, is_blank, visible
from labeling_ui.store import LabelStore, Project
from reward.records import InputError

STATIC = Path(__file__).parent / "static"
LARGEST_BODY, LARGEST_IMPORT = 2_000_000, 200_000_000
LOCAL_NAME = "local"

log = logging.getLogger("labeling_ui")


def create_app(store: LabelStore, site: Site, *, pages: bool = True) -> FastAPI:
    """The app over a store.

    Args:
        pages: whether Gradio's pages are mounted; the routes alone start in a fraction of the time.
    """
    app = FastAPI(title="align label", docs_url=None, redoc_url=None, openapi_url=None)
    accounts = Accounts(store)
    app.state.site_origin = site.origins[0]
    app.state.guards = {}  # path of a page -> who may see it; others are sent to the log-in
    # Gradio adds no permissive CORS of its own where there is a middleware already; this one allows nobody.
    app.add_middleware(CORSMiddleware, allow_origins=[])
    app.add_middleware(_Gate, site=site)
    _errors(app)
    _log_in_routes(app, accounts, site)
    _label_routes(app, accounts, store, site)
    _static_routes(app)
    if pages:
        from labeling_ui.admin import mount_admin
        from labeling_ui.page import mount_page

        mount_page(app, who=lambda request: current(request, accounts, site))
        mount_admin(app, store, accounts, who=lambda request: current(request, accounts, site))
    return app


def current(request: Any, accounts: Accounts, site: Site) -> Annotator | None:
    """Who is logged in, by the cookie of a request (of FastAPI or of Gradio)."""
    return accounts.session(request.cookies.get(site.cookie))


# -- the gate ---------------------------------------------------------------------------------------------------------


class _Gate:
    """Nothing passes that another site could have sent, and nothing leaves without the headers below."""

    def __init__(self, app: Any, site: Site) -> None:
        self.app, self.origins, self.hosts = app, site.origins, {urlsplit(origin).netloc for origin in site.origins}
        self.headers = HEADERS | ({"Strict-Transport-Security": "max-age=31536000"} if site.secure else {})

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        added = self.headers
        if scope["path"].startswith(("/api/", "/log", "/join", "/local")):
            added = added | {"Cache-Control": "no-store"}

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in added.items():
                    headers[name] = value
            await send(message)

        if refused := self._refused(connection, scope.get("method", "GET")):
            # Of a websocket that is refused, servers make the same answer.
            response = JSONResponse({"error": refused, "reason": "forbidden"}, status_code=403)
            await response(scope, receive, with_headers)
        elif _is_large(connection):
            response = JSONResponse({"error": "The request is too large.", "reason": "large"}, status_code=413)
            await response(scope, receive, with_headers)
        elif await _must_log_in(scope, connection):
            await RedirectResponse("/login", status_code=303)(scope, receive, with_headers)
        else:
            await self.app(scope, receive, with_headers)

    def _refused(self, connection: HTTPConnection, method: str) -> str | None:
        # A name of the attacker's that resolves to this machine would make its page our own origin.
        if connection.headers.get("host") not in self.hosts:
            return "This address is not the app's own: open the link that was printed at its start."
        origin = connection.headers.get("origin")
        if origin is not None and origin not in self.origins:
            return "Requests from other pages are refused."
        if method not in ("GET", "HEAD") and origin is None:
            return "A request that changes something must name its Origin."
        # A page of a sibling subdomain is "same-site", and its requests carry our cookie.
        fetched_from = connection.headers.get("sec-fetch-site")
        if fetched_from in ("cross-site", "same-site") and connection.headers.get("sec-fetch-mode") != "navigate":
            return "Requests from other pages are refused."
        return None


async def _must_log_in(scope: Any, connection: HTTPConnection) -> bool:
    guard = scope["app"].state.guards.get(scope["path"].rstrip("/"))
    return guard is not None and await run_in_threadpool(guard, connection) is None


def _is_large(connection: HTTPConnection) -> bool:
    length = connection.headers.get("content-length", "0")
    most = LARGEST_IMPORT if connection.scope["path"] == "/api/admin/import" else LARGEST_BODY
    return not length.isdigit() or int(length) > most


HEADERS = {
    # Gradio's own page begins with an inline script that sets its configuration; see `labeling_ui.page`.
    "Content-Security-Policy": "default-src 'self'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; connect-src 'self'; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}


def _errors(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return JSONResponse({"error": str(error), "reason": error.reason}, status_code=409)

    @app.exception_handler(DatabaseError)
    async def database(request: Request, error: DatabaseError) -> Response:
        log.error("%s", error)
        sentence = "The label database cannot be written just now; your label is kept in this page and sent again."
        return JSONResponse({"error": sentence, "reason": "database"}, status_code=503)

    @app.exception_handler(Denied)
    async def denied(request: Request, error: Denied) -> Response:
        return JSONResponse({"error": str(error), "reason": "denied"}, status_code=403)

    @app.exception_handler(InputError)
    async def wrong(request: Request, error: InputError) -> Response:
        return JSONResponse({"error": str(error), "reason": "wrong"}, status_code=422)


# -- log-in -----------------------------------------------------------------------------------------------------------


def _log_in_routes(app: FastAPI, accounts: Accounts, site: Site) -> None:
    def page(name: str, status: int = 200, **values: str) -> HTMLResponse:
        return HTMLResponse(_template(name, **values), status_code=status)

    def welcome(cookie: str, where: str = "/label/") -> Response:
        response = RedirectResponse(where, status_code=303)
        response.set_cookie(
            site.cookie,
            cookie,
            max_age=int(SESSION_SECONDS),
            httponly=True,
            secure=site.secure,
            samesite="strict",
            path="/",
        )
        return response

    @app.get("/")
    def home(request: Request) -> Response:
        who = current(request, accounts, site)
        return RedirectResponse("/label/" if who else "/login", status_code=303)

    @app.get("/login")
    def login_page() -> Response:
        if site.local:
            return page("local.html")
        return page("login.html", error="")

    @app.post("/login")
    async def log_in(request: Request) -> Response:
        form = await request.form()
        name, password = str(form.get("name", "")), str(form.get("password", ""))
        address = request.client.host if request.client else ""
        try:
            if site.local:
                raise Denied("This app runs for one person: open the link that was printed at its start.")
            cookie = await run_in_threadpool(accounts.log_in, name, password, address)
        except Denied as error:
            return page("login.html", status=403, error=str(error))
        return welcome(cookie)

    @app.get("/join")
    def join_page(token: str = "") -> Response:
        role = accounts.invited_role(token)
        if role is None:
            return page("login.html", status=403, error="This invitation is used or over: ask for a new one.")
        return page("join.html", error="", token=token, role=role)

    @app.post("/join")
    async def join(request: Request) -> Response:
        form = await request.form()
        token, name, password = (str(form.get(key, "")) for key in ("token", "name", "password"))
        try:
            cookie = await run_in_threadpool(accounts.sign_up, token, name.strip(), password)
        except Denied as error:
            role = accounts.invited_role(token)
            return page("join.html", status=403, error=str(error), token=token, role=role or "annotator")
        return welcome(cookie)

    @app.get("/local")
    def local_page(token: str = "") -> Response:
        # Looking at a link, as mail scanners and browsers do of their own accord, must not use it up.
        if not site.local or accounts.invited_role(token) != "admin":
            return page("local.html", status=403)
        return page("enter.html", token=token)

    @app.post("/local")
    async def local(request: Request) -> Response:
        token = str((await request.form()).get("token", ""))
        # The token is an invitation: it lets in once, from this machine's browser.
        if not site.local or await run_in_threadpool(accounts.invited_role, token) != "admin":
            return page("local.html", status=403)
        try:
            await run_in_threadpool(accounts.use_invitation, token, LOCAL_NAME)
        except Denied:
            return page("local.html", status=403)
        return welcome(await run_in_threadpool(accounts.local, LOCAL_NAME))

    @app.post("/logout")
    def log_out(request: Request) -> Response:
        if cookie := request.cookies.get(site.cookie):
            accounts.log_out(cookie)
        response = RedirectResponse("/login", status_code=303)
        response.delete_cookie(site.cookie, path="/", secure=site.secure, httponly=True, samesite="strict")
        return response


def _template(name: str, **values: str) -> str:
    return str(_templates().get_template(name).render(**values))


@functools.cache
def _templates() -> Any:
    from jinja2 import Environment, FileSystemLoader

    return Environment(loader=FileSystemLoader(STATIC), autoescape=True)


# -- labels -----------------------------------------------------------------------------------------------------------


def _label_routes(app: FastAPI, accounts: Accounts, store: LabelStore, site: Site) -> None:
    known: dict[str, tuple[float, Project]] = {}

    def project(name: str) -> Project:
        # A project's settings change seldom; a second's delay is what an annotator would not notice.
        found = known.get(name)
        if found is None or found[0] < time.monotonic():
            found = known[name] = (time.monotonic() + 1, store.project(name))
        return found[1]

    def enter(request: Request, name: str) -> tuple[Annotator, Assigner]:
        who = current(request, accounts, site)
        if who is None:
            raise Refused("login", "You are not logged in: log in again; what you wrote is kept in this page.")
        found = project(name)
        if found.simulated:
            raise Refused("simulated", f"Project {name} is labelled by a program, not by people.")
        return who, Assigner(store, found)

    def reply(assigner: Assigner, lease: Lease | None, progress: Progress, **more: Any) -> Response:
        told = {"mine": progress.mine, "given": progress.given, "wanted": progress.wanted}
        view = None if lease is None else item_view(assigner.project, lease)
        return JSONResponse({"item": view, "progress": told, **more})

    async def body(request: Request) -> dict[str, Any]:
        try:
            # Halves of surrogate pairs are JSON, but no text: no database takes them.
            found = json.loads((await request.body()).decode("utf-8"))
            json.dumps(found, ensure_ascii=False).encode("utf-8")
            if _holds_nul(found):
                raise ValueError("it holds the character 0")
        except (UnicodeError, ValueError, RecursionError) as error:
            raise InputError(f"The request is not JSON in UTF-8 ({error}).") from error
        if not isinstance(found, dict) or not isinstance(found.get("project"), str):
            raise InputError('The request must be a JSON object that names its "project".')
        return found

    def text(found: dict[str, Any], name: str) -> str:
        value = found.get(name)
        if not isinstance(value, str) or not 1 <= len(value) <= 200:
            raise InputError(f'The request must hold "{name}", a text of 1 to 200 characters.')
        return value

    @app.get("/api/projects")
    def projects(request: Request) -> Response:
        who = current(request, accounts, site)
        if who is None:
            raise Refused("login", "You are not logged in.")
        found = [{"name": p.name, "mode": p.settings.mode} for p in store.projects() if not p.simulated]
        return JSONResponse({"projects": found, "name": who.name, "role": who.role})

    @app.get("/api/next")
    def next_item(request: Request, project: str) -> Response:
        who, assigner = enter(request, project)
        lease = assigner.next(who.name)
        return reply(assigner, lease, assigner.progress(who.name), guidelines=_guidelines(assigner.project))

    @app.post("/api/label")
    async def label(request: Request) -> Response:
        found = await body(request)
        return await run_in_threadpool(answer, request, found, "label")

    @app.post("/api/skip")
    async def skip(request: Request) -> Response:
        found = await body(request)
        return await run_in_threadpool(answer, request, found, "skip")

    def answer(request: Request, found: dict[str, Any], kind: str) -> Response:
        who, assigner = enter(request, found["project"])
        names = ("value", "ranking", "ratings", "seconds", "comment", "flag", "rewrite")
        said = {name: found.get(name) for name in (names if kind == "label" else (*names[3:6], "reason"))}
        give = assigner.label if kind == "label" else assigner.skip
        answered = give(who.name, text(found, "lease"), text(found, "key"), said)
        return reply(assigner, answered.lease, answered.progress, saved=answered.event.key)

    @app.post("/api/undo")
    async def undo(request: Request) -> Response:
        found = await body(request)
        return await run_in_threadpool(take_back, request, found)

    def take_back(request: Request, found: dict[str, Any]) -> Response:
        who, assigner = enter(request, found["project"])
        lease = assigner.undo(who.name, text(found, "key"))
        if lease is None:
            raise Refused("nothing", "There is no label of yours to take back.")
        return reply(assigner, lease, assigner.progress(who.name))

    @app.post("/api/heartbeat")
    async def heartbeat(request: Request) -> Response:
        found = await body(request)
        who, assigner = await run_in_threadpool(enter, request, found["project"])
        expires = await run_in_threadpool(assigner.heartbeat, who.name, text(found, "lease"))
        return JSONResponse({"expires": expires})

    @app.post("/api/release")
    async def release(request: Request) -> Response:
        found = await body(request)
        who, assigner = await run_in_threadpool(enter, request, found["project"])
        await run_in_threadpool(assigner.release, who.name)
        return JSONResponse({})


def _holds_nul(value: Any) -> bool:
    """Whether any text in it holds the character 0, which PostgreSQL does not take."""
    if isinstance(value, str):
        return "\0" in value
    inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return any(map(_holds_nul, inner))


def item_view(project: Project, lease: Lease) -> dict[str, Any]:
    """What an annotator sees of a lent item: no model, no number of an answer, not whether it is a gold item."""
    texts = dict(zip(lease.item.answers, (answer["text"] for answer in lease.item.payload["answers"]), strict=True))
    before = None
    if lease.before is not None:
        place = {answer: place for place, answer in enumerate(lease.order)}
        ranking, ratings = lease.before.get("ranking"), lease.before.get("ratings")
        before = {name: lease.before.get(name) for name in ("kind", "value", "comment", "flag", "rewrite", "reason")}
        before["ranking"] = ranking and [[place[answer] for answer in group] for group in ranking]
        before["ratings"] = ratings and {
            name: {str(place[int(answer)]): value for answer, value in of.items()} for name, of in ratings.items()
        }
    return {
        "lease": lease.token,
        "mode": project.settings.mode,
        "criteria": list(project.settings.criteria),
        "keep_seconds": project.settings.lease_seconds,
        "prompt": [
            {"role": visible(str(turn["role"]))[:40], **_text_view(str(turn["content"]))}
            for turn in lease.item.payload["prompt"]
        ],
        "answers": [_text_view(texts[index]) for index in lease.order],
        "before": before,
    }


def _text_view(text: str) -> dict[str, Any]:
    return {"html": answer_html(text), "blank": is_blank(text), "characters": len(text)}


def _guidelines(project: Project) -> dict[str, Any]:
    return {"html": answer_html(project.instructions), "version": project.guidelines}


def _static_routes(app: FastAPI) -> None:
    # By name, not by folder: nothing else can be asked for.
    kinds = {".js": "text/javascript", ".css": "text/css"}
    for name in ("common.js", "label.js", "label.css", "login.css"):

        def served(name: str = name) -> Response:
            return FileResponse(
                STATIC / name, media_type=kinds[Path(name).suffix], headers={"Cache-Control": "no-cache"}
            )

        app.get(f"/static/{name}")(served)
