"""The labelling page: a frame drawn by Gradio, filled and driven by `static/label.js` through the app's own routes.

Gradio's events would carry a label through a queue that hangs on a session of the browser's choosing and, unless told
otherwise, drops a key that comes while the last one is handled. So none of them is used: the page's elements are static
HTML, and the script sends labels itself, with a key that makes sending again harmless.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

HEAD = """
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="stylesheet" href="/static/label.css">
<script type="module" src="/static/label.js"></script>
"""

# Everything that changes is filled in by the script as text, or as HTML that the server has sanitised.
FRAME = """
<div id="align" data-state="loading">
  <header class="al-bar">
    <h1 class="al-title">Which answer is better?</h1>
    <label class="al-project"><span>Project</span> <select id="al-project"></select></label>
    <span id="al-progress" class="al-progress"></span>
    <span id="al-state" class="al-state" role="status" aria-live="polite">Loading…</span>
    <button type="button" id="al-undo">Undo <kbd>U</kbd></button>
    <button type="button" id="al-guide" aria-expanded="false" aria-controls="al-guidelines">Guidelines
      <kbd>G</kbd></button>
    <button type="button" id="al-dark" aria-pressed="false">Dark <kbd>D</kbd></button>
    <form method="post" action="/logout" class="al-out"><button type="submit" id="al-out">Log out</button></form>
  </header>
  <p id="al-message" class="al-message" role="alert"></p>
  <section id="al-guidelines" class="al-guidelines" aria-label="Guidelines" hidden></section>
  <section id="al-prompt" class="al-prompt" aria-label="Prompt"></section>
  <section id="al-answers" class="al-answers" aria-label="Answers"></section>
  <section id="al-choices" class="al-choices" aria-label="Your label"></section>
  <section id="al-criteria" class="al-criteria" aria-label="Ratings"></section>
  <section class="al-more" aria-label="More">
    <details id="al-notes">
      <summary>Comment <kbd>C</kbd>, flag <kbd>F</kbd>, better answer <kbd>R</kbd></summary>
      <label for="al-comment">Comment</label><textarea id="al-comment" rows="2" maxlength="10000"></textarea>
      <label for="al-flag">Flag a problem with this item</label><input id="al-flag" maxlength="1000">
      <label for="al-rewrite">Write a better answer</label><textarea id="al-rewrite" rows="6"></textarea>
    </details>
    <div id="al-skips" class="al-skips">
      <button type="button" id="al-skip" aria-expanded="false">Skip <kbd>S</kbd></button>
      <span id="al-reasons" hidden></span>
    </div>
  </section>
  <section id="al-done" class="al-done" hidden></section>
</div>
"""


def build_page() -> Any:
    """The page as Gradio Blocks."""
    import gradio as gr

    with gr.Blocks(title="Label", fill_width=True, analytics_enabled=False) as blocks:
        # Gradio's HTML component evaluates templates as scripts, which the page's policy forbids; this one does not.
        gr.Markdown(FRAME.strip(), sanitize_html=False, latex_delimiters=[], padding=False)
    return blocks


def mount_page(app: Any, who: Callable[[Any], Any]) -> None:
    """Mount it at /label for whoever is logged in; others are sent to the log-in.

    Args:
        who: the annotator behind a request, or None.
    """
    mount(app, build_page(), "/label", HEAD, lambda request: getattr(who(request), "name", None))


def mount(app: Any, blocks: Any, path: str, head: str, allowed: Callable[[Any], str | None]) -> None:
    """A Gradio page behind the app's own log-in, which keeps nothing, offers no API page, and tells nobody."""
    import os

    import gradio as gr

    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

    app.state.guards[path] = allowed
    blocks.queue(api_open=False)
    gr.mount_gradio_app(
        app,
        blocks,
        path=path,
        auth_dependency=allowed,
        head=head,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        show_error=False,
        app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
    )
