"""Every hostile text on every surface that a browser shows, in a real Chromium.

A page counts as unharmed where nothing ran (no dialog, no mark on the window), nothing was asked for beyond the app or
stopped from being asked for, nothing lies over the buttons, leads away, posts or has an id of the page's own, and where
what was written can be read as text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import pytest

from labeling_ui import formula, render
from labeling_ui.render import TAGS, answer_html, visible
from labeling_ui.store import Project, Settings
from tests.conftest import in_browser
from tests.labeling_ui.conftest import Server, comparison, painted, press
from tests.labeling_ui.payloads import NAMES, PAYLOADS, TEXTS, bare, chunks, judged
from tests.labeling_ui.test_formula import COMMON
from tests.labeling_ui.test_render import Page

pytestmark = in_browser

KNOWN = sorted(TAGS | formula.ATTRIBUTES.keys())
CRITERIA = {re.sub(r"\s+", " ", visible(text))[:90].strip(): text for text in TEXTS}

# What harms anywhere on a page.
HARMFUL = """() => {
  const found = [...window.__tried];
  if (window.__pwned !== undefined) found.push("a mark on the window");
  const address = /^(href|src|action|formaction|xlink:href|poster|background|ping|srcset|data)$/i;
  const leads = (value) => {
    try {
      const url = new URL(value, location.href);
      return /^https?:$/.test(url.protocol) ? url.host !== location.host : !/^(blob:|data:(image|font))/.test(value);
    } catch { return false; }
  };
  for (const e of document.body.querySelectorAll("*")) {
    if (["IFRAME", "OBJECT", "EMBED", "BASE", "FRAME", "APPLET", "PORTAL", "VIDEO", "AUDIO"].includes(e.tagName))
      found.push(e.outerHTML.slice(0, 200));
    for (const a of e.attributes)
      if (/^on|^srcdoc$/i.test(a.name) || (address.test(a.name) && leads(a.value)))
        found.push(e.outerHTML.slice(0, 200));
  }
  const ids = [...document.querySelectorAll("[id^=al]")].map((e) => e.id);
  if (new Set(ids).size !== ids.length) found.push("an id twice");
  return found;
}"""
# Within what was rendered: elements that are not on the allow-list, and what could cover, hide or be pointed at.
STRANGE = """([boxes, tags]) => [...document.querySelectorAll(boxes)].flatMap((box) => {
  const squash = (text) => text.replace(/\\s+/g, "");
  const hidden = !box.hidden && !box.querySelector("math") && squash(box.innerText) !== squash(box.textContent);
  const odd = [...box.querySelectorAll("*")].filter((e) => !tags.includes(e.localName) || e.id
    || e.getAttribute("style") || e.getAttribute("name") || /fixed|absolute|sticky/.test(getComputedStyle(e).position));
  return [...odd, ...(hidden ? [box] : [])].map((e) => e.outerHTML.slice(0, 300));
})"""
# Buttons that somebody who points at them would not meet.
COVERED = """(buttons) => buttons.filter((selector) => {
  const button = document.querySelector(selector);
  button.scrollIntoView({ block: "center" });
  const box = button.getBoundingClientRect();
  const met = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
  return !(met && button.contains(met));
})"""
# Goes through projects by the page's own list, and tells what each of them shows.
GO_THROUGH = f"""async ([names, known, withItems]) => {{
  const harmful = {HARMFUL}, strange = {STRANGE}, covered = {COVERED};
  const told = [], $ = (id) => document.getElementById(`al-${{id}}`), align = document.getElementById("align");
  const texts = (selector) => [...document.querySelectorAll(selector)].map((e) => e.textContent);
  for (const name of names) {{
    const before = align.dataset.painted, started = performance.now();
    $("guidelines").replaceChildren();
    $("project").value = name;
    $("project").dispatchEvent(new Event("change"));
    while (!$("guidelines").childNodes.length || (withItems && align.dataset.painted === before)) {{
      if (performance.now() - started > 15000) throw new Error(`nothing was shown of ${{name}}`);
      await new Promise((done) => setTimeout(done, 5));
    }}
    $("guidelines").hidden = false;
    const wrong = [...harmful(), ...strange(["#al-guidelines, .al-text", known])];
    $("guidelines").hidden = true;
    wrong.push(...covered(["#al-undo", "#al-guide", ...(withItems ? ["#al-submit"] : [])]));
    told.push({{ name: $("project").value, wrong, guidelines: $("guidelines").textContent, texts: texts(".al-text"),
      roles: texts("#al-prompt h2"), criteria: texts("#al-criteria label") }});
  }}
  return told;
}}"""


def assert_unharmed(page: Any, where: str) -> None:
    assert page.evaluate(HARMFUL) == []
    assert not page.dialogs and not page.outside and not page.opened and not page.errors
    assert page.url.startswith(where)


def read(text: str) -> str:
    """What a text reads as where it is rendered as Markdown, or what the page says of a blank one."""
    return bare(Page(answer_html(text)).text)


@pytest.fixture(scope="module")
def start(server: Server) -> Project:
    """A project for each name, with its text as guidelines; for every nine texts one with them as the turns, roles and
    answers of an item, and as criteria; and one that is harmless."""
    store = server.store
    for name, text in NAMES.items():
        store.create_project(name, instructions=text)
    for number, texts in enumerate(chunks(9)):
        criteria = tuple(name for name, text in CRITERIA.items() if text in texts[:8])
        settings = Settings(mode="ranking", gold_share=0.0, criteria=criteria)
        made = store.create_project(f"nine {number}", instructions="\n\n".join(texts), settings=settings)
        turns = [{"role": text, "content": text} for text in texts]
        answers = [{"text": text, "model": text} for text in texts]
        store.add_items(made, [comparison(number, explanation=texts[0]) | {"prompt": turns, "answers": answers}])
    project = store.create_project("start", settings=Settings(gold_share=0.0))
    store.add_items(project, [comparison(n) for n in range(5)])
    return project


def test_names_and_guidelines_on_the_label_page(server: Server, start: Project, open_page: Callable[..., Any]) -> None:
    page = open_page(start)
    listed = page.evaluate("[...document.querySelectorAll('#al-project option')].map((e) => e.textContent)")
    assert set(NAMES) <= set(listed)
    for told in page.evaluate(GO_THROUGH, [list(NAMES), KNOWN, False]):
        assert told["wrong"] == [], told["name"]
        assert bare(told["guidelines"]) == read(NAMES[told["name"]]) or not read(NAMES[told["name"]])
    assert_unharmed(page, f"{server.origin}/label/")


def test_prompts_answers_roles_and_criteria_on_the_label_page(
    server: Server, start: Project, open_page: Callable[..., Any]
) -> None:
    page = open_page(start)
    groups = chunks(9)
    found = page.evaluate(GO_THROUGH, [[f"nine {n}" for n in range(len(groups))], KNOWN, True])
    for told, texts in zip(found, groups, strict=True):
        assert told["wrong"] == [], told["name"]
        assert sorted(map(bare, told["texts"])) == sorted(2 * [read(text) for text in texts])
        assert [bare(role) for role in told["roles"]] == [bare(visible(text)[:40]) for text in texts]
        criteria = {bare(criterion).removesuffix(",answer1") for criterion in told["criteria"]}
        assert {bare(name) for name, text in CRITERIA.items() if text in texts[:8]} <= criteria
        for text in texts:
            if "alert(1)" in text:
                assert any("alert(1)" in bare(shown) for shown in told["texts"])
    assert_unharmed(page, f"{server.origin}/label/")


def test_words_that_come_back_with_undo(server: Server, start: Project, open_page: Callable[..., Any]) -> None:
    page = open_page(start)
    words = {"comment": "\n".join(TEXTS)[:9000], "flag": "\n".join(TEXTS[::-1])[:9000], "rewrite": "\n\n".join(TEXTS)}
    status = page.evaluate(
        """async (words) => {
          const told = await (await fetch("/api/next?project=start")).json();
          const body = JSON.stringify({ project: "start", lease: told.item.lease, key: "battery", value: 2, ...words });
          return (await fetch("/api/label", { method: "POST", body })).status;
        }""",
        words,
    )
    assert status == 200
    page.goto(f"{server.origin}/label/?project=start")
    painted(page)
    press(page, "u")
    for name, text in words.items():
        assert re.sub(r"\s", "", page.input_value(f"#al-{name}")) == re.sub(r"\s", "", text)
    press(page, "4")  # and given again as it is
    (label,) = server.store.labels(start)
    assert re.sub(r"\s", "", label.body["rewrite"]) == re.sub(r"\s", "", words["rewrite"])
    assert_unharmed(page, f"{server.origin}/label/")


def test_refusals_on_the_label_and_log_in_pages(server: Server, start: Project, open_page: Callable[..., Any]) -> None:
    page = open_page(start)
    for texts in chunks(80):
        joined = quote("".join(text[:200] for text in texts), safe="")
        page.goto(f"{server.origin}/label/?project={joined}#{joined}")
        painted_or_done = "() => document.getElementById('al-state')?.innerText === 'Ready'"
        page.wait_for_function(painted_or_done)
        assert_unharmed(page, f"{server.origin}/label/")
        page.goto(f"{server.origin}/join?token={joined}&error={joined}#{joined}")
        assert page.evaluate(HARMFUL) == []
        assert not page.dialogs and not page.outside


def test_the_allow_list_alone_in_a_browser(
    server: Server, start: Project, open_page: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if Markdown let all HTML through: what the allow-list leaves must mean the same to the browser's parser."""
    raw = type("Raw", (), {"render": staticmethod(lambda text: text)})
    monkeypatch.setattr(render, "_markdown", lambda tables: raw)
    cleaned = [render._rendered(text.strip("$")) for text in PAYLOADS.values()]
    page = open_page(start)
    wrong = page.evaluate(
        f"""([cleaned, known]) => {{
          const harmful = {HARMFUL}, strange = {STRANGE}, box = document.getElementById("al-guidelines"), found = [];
          box.hidden = false;
          for (const html of cleaned) {{
            box.innerHTML = html;
            const wrong = [...harmful(), ...strange(["#al-guidelines", known])];
            if (wrong.length) found.push([html, wrong]);
          }}
          box.replaceChildren();
          return found;
        }}""",
        [cleaned, KNOWN],
    )
    assert wrong == []
    page.wait_for_timeout(200)  # images and handlers take their time
    assert_unharmed(page, f"{server.origin}/label/")


# The admin page


def test_the_admin_page(server: Server, start: Project, open_page: Callable[..., Any]) -> None:
    name = "judged </summary><img src=x onerror=window.__pwned=1> ![x](//evil.example/x.png) $x$"
    judged(server.store, name)
    page = open_page(start, name="admin-1")
    page.goto(f"{server.origin}/admin/")
    page.wait_for_selector("text=Annotators")
    box = page.get_by_label("Project", exact=True)
    box.click()
    options = bare("".join(page.locator("[role=option]").all_inner_texts()))
    assert sum(bare(each) in options for each in NAMES) >= 10  # the list grows as one scrolls
    box.fill(name)
    page.keyboard.press("Enter")
    page.wait_for_selector(f"text={len(chunks(4)) * 4} of")
    cells = {bare(text) for text in page.locator("td").all_text_contents()}
    for number, text in enumerate(text for texts in chunks(4) for text in texts):
        assert bare(f"{text[:400]} {number}") in cells, text
    assert_unharmed(page, f"{server.origin}/admin/")

    page.get_by_role("tab", name="Disagreements").click()
    page.wait_for_selector("summary")
    page.evaluate("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
    shown = bare("".join(page.locator("details").all_text_contents()))
    for text in TEXTS:
        assert bare(text) in shown, text  # the comment
        assert read(text) in shown, text  # the prompt
    assert page.evaluate(STRANGE, ["details", [*KNOWN, "summary", "details"]]) == []
    assert page.locator("details math").count() >= 20  # what Gradio puts on a page it sanitises once more
    assert_unharmed(page, f"{server.origin}/admin/")

    page.get_by_role("tab", name="Remarks").click()
    page.wait_for_selector("text=better answer")
    cells = {bare(text) for text in page.locator("td").all_text_contents()}
    for text in TEXTS:
        assert bare(text) in cells or any(cell.startswith(bare(text)[:500]) for cell in cells), text
    assert {"skip", "flag", "comment", "betteranswer"} <= cells
    assert_unharmed(page, f"{server.origin}/admin/")

    page.get_by_role("tab", name="Import and export").click()
    link = page.locator("a", has_text="Download everything of")
    assert bare(name) in bare(link.inner_text())
    assert (link.get_attribute("href") or "").startswith("/api/admin/export?project=judged%20")
    joined = " ".join(TEXTS)
    same = "\n".join(json.dumps({"id": joined, "prompt": "a", "answer_1": "b", "answer_2": str(n)}) for n in range(2))
    for pasted, quoted in (
        (json.dumps(dict.fromkeys(TEXTS, 1)), TEXTS),  # what columns are there
        (same, TEXTS),  # whose id is there twice
        (json.dumps({"prompt": "a", "answer_1": "b", "answer_2": "c", "split": joined}), []),  # as Python writes it
    ):
        page.get_by_label("Comparisons", exact=True).fill(pasted)
        page.get_by_role("button", name="Import into the selected project").click()
        toast(page, quoted)
    page.get_by_label("Comparisons", exact=True).fill('{"prompt": "New?", "answer_1": "a", "answer_2": "b"}')
    page.get_by_role("button", name="Import into the selected project").click()
    page.wait_for_selector("text=1 items added, 0 already there.")

    page.get_by_role("tab", name="Disagreements").click()
    page.get_by_label("Item", exact=True).fill(joined)
    page.get_by_role("button", name="Decide").click()
    toast(page, [])
    page.get_by_role("tab", name="People").click()
    page.get_by_label("Annotator", exact=True).fill(joined)
    page.get_by_role("button", name="Shut out").click()
    toast(page, TEXTS)
    assert_unharmed(page, f"{server.origin}/admin/")


def toast(page: Any, texts: list[str]) -> None:
    """An error is told, with these texts as texts; then it is closed."""
    page.wait_for_selector("[data-testid=toast-body]")
    told = bare(page.locator("[data-testid=toast-body]").first.inner_text())
    for text in texts:
        assert bare(text) in told, text
    assert page.evaluate(HARMFUL) == []
    page.locator("[data-testid=toast-close]").first.click()
    page.wait_for_selector("[data-testid=toast-body]", state="detached")


# Formulas are drawn, and by the browser itself


def test_formulas_are_drawn(server: Server, open_page: Callable[..., Any]) -> None:
    project = server.store.create_project("formulas", settings=Settings(gold_share=0.0))
    common = "\n\n".join(f"$${source}$$" for source in COMMON)
    texts = [f"Above $\\frac{{a}}{{b}}$ all.\n\n{common}", "So \\(\\sqrt{x}\\) is \\[ \\boxed{42} \\]"]
    server.store.add_items(project, [comparison() | {"answers": [{"text": text} for text in texts]}])
    page = open_page(project)
    drawn = page.evaluate(
        """() => {
          const box = (e) => e.getBoundingClientRect().toJSON();
          const fraction = document.querySelector("math mfrac");
          return { count: document.querySelectorAll("math").length, above: box(fraction.children[0]),
            below: box(fraction.children[1]), formulas: [...document.querySelectorAll("math")].map(box),
            border: getComputedStyle(document.querySelector("math .al-boxed")).borderTopWidth };
        }"""
    )
    assert drawn["count"] == len(COMMON) + 3
    assert drawn["above"]["y"] + drawn["above"]["height"] <= drawn["below"]["y"] + 1  # one above the other
    assert all(each["width"] > 3 and each["height"] > 3 for each in drawn["formulas"]) and drawn["border"] == "1px"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert not page.outside and not page.errors
