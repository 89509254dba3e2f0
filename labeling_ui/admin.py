"""The admin page: projects, import, progress, agreement, disagreements, people, export; drawn by Gradio.

Every handler can be called by whoever reaches the app, hidden or not, so every one of them asks first who calls. No
handler reads or writes a file of the server's, or fetches an address: what is imported is pasted or sent, and what is
exported is downloaded through a route of our own.
"""

from __future__ import annotations

import dataclasses
import functools
import html
import io
import math
import secrets
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from labeling_ui import exchange, quality
from labeling_ui.accounts import Accounts, Annotator
from labeling_ui.agreement import Estimate
from labeling_ui.assignment import Refused
from labeling_ui.checks import is_storable
from labeling_ui.page import mount
from labeling_ui.render import answer_html, visible
from labeling_ui.store import LabelStore, Project, Settings
from reward.records import InputError, prompt_text

Who = Callable[[Any], Annotator | None]


def mount_admin(app: FastAPI, store: LabelStore, accounts: Accounts, who: Who) -> None:
    """Mount it at /admin for reviewers and admins."""

    def allowed(request: Any) -> str | None:
        found = who(request)
        return found.name if found is not None and found.may("reviewer") else None

    _routes(app, store, who)
    mount(app, build_admin(store, accounts, who, app.state.site_origin), "/admin", HEAD, allowed)


HEAD = """
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="stylesheet" href="/static/label.css">
"""


def _routes(app: FastAPI, store: LabelStore, who: Who) -> None:
    def admin(request: Request) -> Annotator:
        found = who(request)
        if found is None or not found.may("admin"):
            raise Refused("role", "This is for admins.")
        return found

    @app.post("/api/admin/import")
    async def import_comparisons(request: Request, project: str, name: str = "") -> Response:
        from starlette.concurrency import run_in_threadpool

        admin(request)
        data = await request.body()

        def do() -> tuple[str, Any]:
            records, sentence = exchange.read_comparisons(data, name)
            return sentence, store.add_items(store.project(project), records)

        sentence, found = await run_in_threadpool(do)
        told = {"detected": sentence, "added": found.added, "there": found.there, "identical": found.identical}
        return JSONResponse(told)

    @app.get("/api/admin/export")
    def export(request: Request, project: str) -> Response:
        admin(request)
        found, held = store.project(project), io.BytesIO()
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
            export_all(store, found, Path(folder))
            for path in sorted(Path(folder).iterdir()):
                # One date for all, so that the same labels give the same bytes.
                archive.writestr(zipfile.ZipInfo(path.name, (2026, 1, 1, 0, 0, 0)), path.read_bytes())
        headers = {"Content-Disposition": 'attachment; filename="labels.zip"', "Cache-Control": "no-store"}
        return Response(held.getvalue(), media_type="application/zip", headers=headers)


def build_admin(store: LabelStore, accounts: Accounts, who: Who, origin: str) -> Any:
    """The page as Gradio Blocks."""

    def only(role: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """A handler for this role; what the user can mend becomes a message, everything else stays an error."""

        def wrap(handler: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(handler)
            def checked(*values: Any, **named: Any) -> Any:
                request = next(v for v in [*values, *named.values()] if isinstance(v, gr.Request))
                found = who(request)
                if found is None or not found.may(role):
                    raise gr.Error(f"This is for {role}s: log in as one.", print_exception=False)
                if not all(is_storable(value) for value in values if isinstance(value, str)):
                    raise gr.Error("A text holds the character 0 or half of a character.", print_exception=False)
                try:
                    return handler(*values, **named)
                except InputError as error:
                    raise gr.Error(_text(error), print_exception=False) from error

            return checked

        return wrap

    def names() -> list[str]:
        return [project.name for project in store.projects()]

    with gr.Blocks(title="Labels: admin", fill_width=True, analytics_enabled=False) as blocks:
        gr.Markdown("# Labels: admin\n[Label](/label/) · progress and agreement are computed when asked for.")
        with gr.Row():
            project = gr.Dropdown(choices=[], label="Project", interactive=True)
            refresh = gr.Button("Refresh")
        with gr.Tab("Progress"):
            report = gr.Markdown(latex_delimiters=[])
            rely = gr.Button("Compute each annotator's reliability (Dawid and Skene's model)")
            relied = gr.Markdown(latex_delimiters=[])
        with gr.Tab("Disagreements"):
            gr.Markdown("Items on which annotators took different sides, the most contested first.")
            contested = gr.Markdown(latex_delimiters=[])
            with gr.Row():
                judged = gr.Textbox(label="Item")
                value = gr.Slider(1, 7, value=4, step=1, label="1 first much better · 4 tie · 7 second much better")
                best = gr.Textbox(label="Of a ranking: answers from 1, best first, such as 3 > 1 = 2")
                decide = gr.Button("Decide: this overrides the labels")
            decided = gr.Markdown()
        with gr.Tab("Remarks"):
            gr.Markdown("What annotators wrote beside their labels, the newest first.")
            remarked = gr.Markdown(latex_delimiters=[])
        with gr.Tab("Project"):
            new_name = gr.Textbox(label="Name of a new project, or of one to change")
            mode = gr.Radio(["pairwise", "ranking"], value="pairwise", label="Mode")
            overlap = gr.Number(1, label="Labels by different annotators on each item", precision=0, minimum=1)
            policy = gr.Radio(["random", "least", "active"], value="random", label="Which item comes next")
            criteria = gr.Textbox(label="Criteria to rate from 1 to 5, separated by commas")
            guidelines = gr.Textbox(
                label="Guidelines (Markdown); labels name the version they were given under", lines=8
            )
            save = gr.Button("Save project")
            close = gr.Button("Close the selected project: nothing more is lent, and `align run` goes on")
            reopen = gr.Button("Open it again")
            saved = gr.Markdown()
        with gr.Tab("Import and export"):
            gr.Markdown(
                "Paste comparisons: JSONL of our own, TRL preferences, Argilla or Label Studio exports, or CSV with "
                "prompt, answer_1, answer_2, …"
            )
            pasted = gr.Textbox(label="Comparisons", lines=8, max_length=5_000_000)
            bring = gr.Button("Import into the selected project")
            brought = gr.Markdown(latex_delimiters=[])
            download = gr.Markdown(latex_delimiters=[])
        with gr.Tab("People"):
            people = gr.Markdown(latex_delimiters=[])
            with gr.Row():
                role = gr.Dropdown(["annotator", "reviewer", "admin"], value="annotator", label="Role")
                invite = gr.Button("Make an invitation link")
            link = gr.Textbox(label="The link lets one person join, within a week", interactive=False)
            with gr.Row():
                person = gr.Textbox(label="Annotator")
                revoke = gr.Button("Log out everywhere")
                disable = gr.Button("Shut out")
                enable = gr.Button("Let in again")
            done = gr.Markdown()

        @only("reviewer")
        def show(name: str | None, request: gr.Request) -> tuple[Any, ...]:
            known = names()
            chosen = name if name in known else (known[0] if known else None)
            if chosen is None:
                none = "<p>There is no project yet.</p>"
                return gr.update(choices=[], value=None), none, "", "", "", _people(accounts)
            found = store.project(chosen)
            return (
                gr.update(choices=known, value=chosen),
                block(progress_html(store, found)),
                block(disagreements_html(store, found)),
                block(remarks_html(store, found)),
                block(export_html(found)),
                _people(accounts),
            )

        @only("reviewer")
        def show_reliability(name: str, request: gr.Request) -> str:
            found = quality.reliability(store, store.project(name))
            rows = [[each.annotator, f"{each.right:.0%}", each.votes] for each in found]
            return block(table(["annotator", "names the right side", "votes"], rows))

        @only("reviewer")
        def give_verdict(name: str, key: str, value: float, best: str, request: gr.Request) -> tuple[str, str]:
            found, reviewer = store.project(name), who(request)
            assert reviewer is not None
            said = {"value": int(value)} if found.settings.mode == "pairwise" else {"ranking": ranking_of(best)}
            store.adjudicate(found, key.strip(), reviewer.name, said, secrets.token_urlsafe(16))
            return "Decided.", block(disagreements_html(store, found))

        @only("admin")
        def save_project(
            name: str, mode: str, overlap: float, policy: str, criteria: str, guidelines: str, request: gr.Request
        ) -> str:
            listed = tuple(each.strip() for each in criteria.split(",") if each.strip())
            known = next((each.settings for each in store.projects() if each.name == name.strip()), Settings())
            changed: dict[str, Any] = {"mode": mode, "overlap": int(overlap), "policy": policy, "criteria": listed}
            settings = dataclasses.replace(known, **changed)
            found = store.create_project(name.strip(), instructions=guidelines, settings=settings)
            return f"Saved; the guidelines are version {found.guidelines}."

        @only("admin")
        def close_project(name: str, request: gr.Request) -> str:
            store.close_project(store.project(name))
            return "Closed."

        @only("admin")
        def open_project(name: str, request: gr.Request) -> str:
            store.close_project(store.project(name), closed=False)
            return "Open."

        @only("admin")
        def import_pasted(name: str, text: str, request: gr.Request) -> str:
            records, sentence = exchange.read_comparisons(text.encode("utf-8", "replace"), "what was pasted")
            found = store.add_items(store.project(name), records)
            told = _text(f"{sentence} {found.sentence()}")
            return block(f"<p>{told}</p>")

        @only("admin")
        def make_invitation(role: str, request: gr.Request) -> str:
            return f"{origin}/join?token={accounts.invite(role)}"

        @only("admin")
        def log_out(name: str, request: gr.Request) -> tuple[str, str]:
            return f"{accounts.revoke(name.strip())} sessions ended.", _people(accounts)

        @only("admin")
        def shut_out(name: str, request: gr.Request) -> tuple[str, str]:
            accounts.disable(name.strip())
            return "Shut out; the labels stay.", _people(accounts)

        @only("admin")
        def let_in(name: str, request: gr.Request) -> tuple[str, str]:
            accounts.disable(name.strip(), disabled=False)
            return "Let in again.", _people(accounts)

        shown = [project, report, contested, remarked, download, people]
        options: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": None, "queue": True}
        blocks.load(show, [project], shown, **options)
        refresh.click(show, [project], shown, **options)
        project.input(show, [project], shown, **options)
        decide.click(give_verdict, [project, judged, value, best], [decided, contested], **options)
        rely.click(show_reliability, [project], [relied], **options)
        save.click(save_project, [new_name, mode, overlap, policy, criteria, guidelines], [saved], **options)
        close.click(close_project, [project], [saved], **options)
        reopen.click(open_project, [project], [saved], **options)
        bring.click(import_pasted, [project, pasted], [brought], **options)
        invite.click(make_invitation, [role], [link], **options)
        revoke.click(log_out, [person], [done, people], **options)
        disable.click(shut_out, [person], [done, people], **options)
        enable.click(let_in, [person], [done, people], **options)
    return blocks


# -- what is shown: every text is escaped, for names and comments are hostile too -------------------------------------


def _text(value: Any) -> str:
    return html.escape(visible(str(value)), quote=True)


def _query(name: str) -> str:
    from urllib.parse import quote

    return quote(name, safe="")


def ranking_of(text: str) -> list[list[int]]:
    """Groups of answer indices from "3 > 1 = 2", which counts from 1.

    Raises:
        InputError: it is written otherwise.
    """
    try:
        return [[int(number) - 1 for number in group.split("=")] for group in text.split(">")]
    except ValueError as error:
        raise InputError(
            f"The ranking is {text!r}: numbers with > and = between are wanted, such as 3 > 1 = 2."
        ) from error


def block(text: str) -> str:
    """HTML as one block of Markdown, which ends at an empty line; Markdown takes a carriage return for a line too."""
    return text.replace("\r", "&#13;").replace("\n", "&#10;")


def table(head: list[str], rows: list[list[Any]]) -> str:
    """An HTML table of texts."""
    cells = "".join(f"<th scope='col'>{_text(each)}</th>" for each in head)
    body = "".join("<tr>" + "".join(f"<td>{_text(each)}</td>" for each in row) + "</tr>" for row in rows)
    return f"<table class='al-table'><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


def progress_html(store: LabelStore, project: Project) -> str:
    """Progress, agreement and each annotator's figures."""
    found = quality.quality(store, project)
    closed = " The project is closed." if project.settings.closed else ""
    parts = [f"<p>{found.given} of {found.wanted} labels.{closed}</p>"]
    measures = [
        ("Krippendorff's alpha, which answer won", found.nominal),
        ("Krippendorff's alpha, the scale of 1 to 7", found.ordinal),
        ("Fleiss' kappa, which answer won", found.fleiss),
    ]
    headline = [[name, _figure(each), each.words()] for name, each in measures]
    parts.append("<h2>Agreement</h2>" + table(["measure", "value (95 %)", "in words"], headline))
    rows = [
        [
            each.name,
            each.labels,
            each.skips,
            each.flags,
            "–" if each.seconds is None else f"{each.seconds:.1f} s",
            "–" if each.ties is None else f"{each.ties:.0%}",
            f"{each.side.left} of {each.side.count}{', one-sided' if each.side.biased else ''}",
            f"{each.gold_right} of {each.gold_asked}",
            {"fine": "careful", "guessing": "GUESSES", "open": "not clear yet"}[each.verdict],
        ]
        for each in found.annotators
    ]
    head = ["annotator", "labels", "skips", "flags", "time an item", "ties", "left won", "gold right", "gold test"]
    parts.append("<h2>Annotators</h2>" + table(head, rows))
    if found.cohen:
        pairs = [
            [f"{a} and {b}", "–" if math.isnan(value) else f"{value:.2f}"] for (a, b), value in found.cohen.items()
        ]
        parts.append("<h2>Two by two</h2>" + table(["annotators", "Cohen's kappa, quadratic weights"], pairs))
    return "".join(parts)


def _figure(each: Estimate) -> str:
    return "–" if math.isnan(each.value) else f"{each.value:.2f} ({each.low:.2f} to {each.high:.2f})"


def disagreements_html(store: LabelStore, project: Project, most: int = 50) -> str:
    """The queue for a reviewer: what was asked and answered, and who said what."""
    items = {item.id: item for item in store.items(project)}
    parts = []
    for each in quality.disagreements(store, project)[:most]:
        item = items[each.item_id]
        texts = dict(zip(item.answers, (answer["text"] for answer in item.payload["answers"]), strict=True))
        said = ", ".join(f"{opinion.annotator}: {opinion.value}" for opinion in each.opinions)
        comments = " · ".join(f"{o.annotator}: {o.comment}" for o in each.opinions if o.comment)
        parts.append(
            f"<details><summary>{_text(each.key)} — {_text(said)}</summary>"
            f"<p>{_text(comments)}</p><h3>Prompt</h3>{answer_html(prompt_text(item.payload['prompt']))}"
            f"<h3>First</h3>{answer_html(texts[each.pair[0]])}<h3>Second</h3>{answer_html(texts[each.pair[1]])}</details>"
        )
    return "".join(parts) or "<p>None.</p>"


def remarks_html(store: LabelStore, project: Project, most: int = 400) -> str:
    """What annotators wrote beside their labels: flags, reasons of skips, comments, better answers."""
    found = quality.remarks(store, project)
    rows = [[each.annotator, each.key, each.kind, _cut(each.text)] for each in found[:most]]
    more = f"<p>The newest {most} of {len(found)}; the export has all.</p>" if len(found) > most else ""
    return table(["annotator", "item", "what", "words"], rows) + more if found else "<p>None.</p>"


def _cut(text: str, most: int = 2000) -> str:
    return text if len(text) <= most else f"{text[:most]}…"


def export_html(project: Project) -> str:
    """The link that downloads everything."""
    link = f"/api/admin/export?project={_query(project.name)}"
    return f'<p><a href="{link}">Download everything of {_text(project.name)}</a></p>'


def export_all(store: LabelStore, project: Project, folder: Path) -> None:
    """Every export of a project as files in a folder."""
    exchange.export_preferences(store, project, folder)
    if project.settings.mode == "ranking":
        exchange.export_rankings(store, project, folder / "rankings.jsonl")
    exchange.export_kto(store, project, folder / "kto.jsonl")
    exchange.export_demonstrations(store, project, folder / "demonstrations.jsonl")
    exchange.export_labels_csv(store, project, folder / "labels.csv")
    exchange.export_store(store, project, folder / "labels.jsonl")


def _people(accounts: Accounts) -> str:
    rows = [[p["name"], p["role"], "shut out" if p["disabled"] else "", p["created"]] for p in accounts.annotators()]
    return block(table(["name", "role", "", "since"], rows))
