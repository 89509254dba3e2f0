"""The tokens of a stage as one page: self-contained, without scripts, and inert whatever the data say.

All text has passed through `visible` or Jinja's autoescaping; a content security policy stands behind them. The same
rows give the same bytes.
"""

from __future__ import annotations

from importlib import resources

from align.inspect.stages import Seen
from reward.page import environment

# In words, because colour alone tells nobody anything.
LABELS = {"context": "no loss", "loss": "loss", "score": "score read here"}


def render_html(seen: Seen) -> str:
    """The page as one string of HTML."""
    template = resources.files("align.inspect").joinpath("page.html").read_text(encoding="utf-8")
    return environment().from_string(template).render(seen=seen, labels=LABELS)
