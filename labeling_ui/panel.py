"""A simulated panel: a hidden preference and noisy annotators who label by it.

It lets the whole pipeline run, and be tested, without people. Its labels go only into projects marked as simulated.

This module imports neither torch nor sqlalchemy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from reward import records
from reward.records import ROLES, InputError

if TYPE_CHECKING:
    from labeling_ui.store import Item, Judgement, LabelStore, Project

# Distance in utility at which "slightly better" turns into "better", and "better" into "much better".
BETTER, MUCH_BETTER = 0.75, 1.75

# One transaction's worth of items: large enough that the disk's fsync does not dominate.
ITEMS_PER_BATCH = 200

# `reward.records.prompt_text` opens each turn with its role; that word is not part of what was asked.
ROLE = re.compile(rf"^(?:{'|'.join(ROLES)}): ", re.MULTILINE)
WORD = re.compile(r"\w+(?:['’]\w+)*")
COMPLETE = re.compile(r"[.!?][\"'”’»)\]]*$")
MARKUP = re.compile(r"^\s*(?:#{1,6}\s|[-*+•]\s|\d+[.)]\s)|\*\*", re.MULTILINE)
# fmt: off
STOP_WORDS = frozenset({
    "about", "also", "answer", "because", "been", "before", "being", "between", "could", "does", "doing",
    "down", "each", "explain", "from", "give", "have", "having", "here", "into", "just", "like", "list",
    "make", "more", "most", "much", "need", "only", "other", "over", "please", "same", "should", "some",
    "such", "tell", "than", "that", "their", "them", "then", "there", "these", "they", "thing", "this",
    "those", "through", "under", "very", "want", "were", "what", "when", "where", "which", "while", "will",
    "with", "without", "would", "write", "your",
})
# fmt: on


@dataclass(frozen=True)
class HiddenPreference:
    """What the simulated panel likes: a weighted sum of six plain features of an answer, each from 0 to 1.

    This is a toy stand-in for people. It makes the pipeline testable, because the truth behind the labels is known;
    it is no measure of real quality, and a model that pleases it is not thereby a better model.

    Attributes, in utility per unit of the feature of the same name:
        complete: the answer ends in . ! or ?, a closing quote or bracket after it allowed.
        on_topic: share of the prompt's content words (4 letters or more, no stop words) found in the answer by
            their first 5 letters; half of them earns all.
        excess: words beyond 40, per 40, at most 1.
        too_short: 1 - words / 8 for fewer than 8 words.
        repetition: share of word trigrams that occurred in the answer before.
        markup: 1 if there is a markdown heading, a bullet, a numbered line or **.
    """

    complete: float = 1.5
    on_topic: float = 1.5
    excess: float = -1.5
    too_short: float = -1.0
    repetition: float = -2.0
    markup: float = -0.7

    def utility(self, prompt_text: str, answer: str) -> float:
        """Weighted sum of the features; the defaults give -4.2 to 3, and -1 to an empty answer."""
        return sum(getattr(self, name) * value for name, value in self.features(prompt_text, answer).items())

    def features(self, prompt_text: str, answer: str) -> dict[str, float]:
        """The six features, each from 0 to 1. `prompt_text` is the question alone or `records.prompt_text`."""
        words = _words(answer)
        trigrams = list(zip(words, words[1:], words[2:], strict=False))
        asked = {_stem(w) for w in _words(ROLE.sub("", prompt_text)) if len(w) >= 4 and w not in STOP_WORDS}
        found = asked & {_stem(word) for word in words}
        return {
            "complete": float(bool(COMPLETE.search(answer.rstrip()))),
            "on_topic": min(1.0, len(found) / len(asked) / 0.5) if asked else 0.0,
            "excess": min(1.0, max(0, len(words) - 40) / 40),
            "too_short": max(0.0, 1 - len(words) / 8),
            "repetition": 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0,
            "markup": float(bool(MARKUP.search(answer))),
        }


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _stem(word: str) -> str:
    return word[:5]


@dataclass(frozen=True, slots=True)
class Annotator:
    """One simulated person. `temperature`, `side_bias` and `tie_width` are in units of utility.

    Attributes:
        name: goes into the store as the annotator.
        temperature: scale of the logistic noise on each comparison; 0 is a person without doubt.
        side_bias: what being shown on the left is worth; negative favours the right.
        tie_width: a felt difference below this is called a tie.
    """

    name: str
    temperature: float
    side_bias: float
    tie_width: float


def make_panel(size: int, seed: int) -> list[Annotator]:
    """`size` annotators of different care; a larger panel of the same seed begins with the same people."""
    if size < 1:
        raise InputError(f"A panel of {size} annotators cannot label: at least 1 is needed.")
    panel = []
    for number in range(1, size + 1):
        rng = Random(f"panel {seed} {number}")
        panel.append(
            Annotator(
                name=f"panel-{number:02d}",
                temperature=rng.uniform(0.2, 0.6),
                side_bias=rng.uniform(-0.2, 0.2),
                tie_width=rng.uniform(0.1, 0.3),
            )
        )
    return panel


def judge(annotator: Annotator, utility_left: float, utility_right: float, rng: Random) -> int:
    """The annotator's value for a pair on the screen, from 1 (left much better) over 4 (tie) to 7.

    The felt difference is d = u_left - u_right + side_bias + temperature * L, with L standard logistic, so that
    without a tie width P(left) = sigmoid((u_left - u_right + side_bias) / temperature): the Bradley-Terry model.
    |d| < tie_width, and d = 0, is a tie; |d| < 0.75 is slightly better, |d| < 1.75 better, above that much better.
    """
    # 52 random bits and a half: strictly between 0 and 1, where the logit is finite.
    uniform = (rng.getrandbits(52) + 0.5) / 2**52
    noise = math.log(uniform / (1 - uniform))
    felt = utility_left - utility_right + annotator.side_bias + annotator.temperature * noise
    if felt == 0 or abs(felt) < annotator.tie_width:
        return 4
    strength = 1 + (abs(felt) >= BETTER) + (abs(felt) >= MUCH_BETTER)
    return 4 - strength if felt > 0 else 4 + strength


def label_with_panel(
    store: LabelStore,
    project: Project,
    *,
    annotators: list[Annotator],
    labels_per_item: int,
    preference: HiddenPreference,
    seed: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Give every item of a simulated project `labels_per_item` labels by as many different annotators.

    A label depends only on the seed, the item's key and the annotator, so an interrupted run continues where it
    stopped and ends with the labels of an uninterrupted one; a larger `labels_per_item` adds to what is there.

    Args:
        on_progress: called after each transaction with the labels done so far, found ones included, and the total.

    Returns:
        Number of labels stored by this call.

    Raises:
        InputError: the project is for people, the panel is too small or has two annotators of one name, or the
            project holds labels that this call would not give (another seed, panel or preference, or fewer labels
            per item): with them the items would have more than their number of labels.
    """
    if not project.simulated:
        raise InputError(f"Project {project.name} is for people: the panel labels only simulated projects.")
    if not 1 <= labels_per_item <= len(annotators):
        raise InputError(
            f"{labels_per_item} labels per item cannot come from {len(annotators)} different annotators: "
            "ask for at least 1 label per item and at most the size of the panel."
        )
    names = [annotator.name for annotator in annotators]
    if len(set(names)) < len(names):
        raise InputError(f"The panel {', '.join(names)} has a name twice: give every annotator a name of their own.")

    plan = [
        (item, annotator, f"panel:{seed}:{item.key}:{annotator.name}")
        for item in store.items(project)
        for annotator in _assigned(item, annotators, seed)[:labels_per_item]
    ]
    before = {label.key for label in store.labels(project)}
    if strangers := before - {key for _, _, key in plan}:
        raise InputError(
            f"Project {project.name} already holds {len(strangers)} labels that a panel of {len(annotators)} with "
            f"seed {seed} and {labels_per_item} labels per item does not give: use the same settings or a new project."
        )
    batch = ITEMS_PER_BATCH * labels_per_item
    for start in range(0, len(plan), batch):
        # Labels found in the store are given again: the store refuses if any of them would differ today.
        store.record_many(project, [_judgement(*each, preference) for each in plan[start : start + batch]])
        if on_progress:
            on_progress(min(start + batch, len(plan)), len(plan))
    return len(plan) - len(before)


def _assigned(item: Item, annotators: list[Annotator], seed: int) -> list[Annotator]:
    """All annotators in the item's own order, so that asking for one label more keeps those there are."""
    return Random(f"assign {seed} {item.key}").sample(annotators, len(annotators))


def _judgement(item: Item, annotator: Annotator, key: str, preference: HiddenPreference) -> Judgement:
    rng = Random(key)
    sides = [0, 1] if rng.random() < 0.5 else [1, 0]
    prompt = records.prompt_text(item.payload["prompt"])
    left, right = (preference.utility(prompt, item.payload["answers"][side]["text"]) for side in sides)
    return {
        "item_id": item.id,
        "annotator": annotator.name,
        "order": [item.answers[sides[0]], item.answers[sides[1]]],
        "value": judge(annotator, left, right, rng),
        "key": key,
    }


def preferred(preference: HiddenPreference, prompt_text: str, a: str, b: str, tie_width: float = 0.1) -> float:
    """Noiseless verdict: 1.0 if `a` is better, 0.0 if `b` is, 0.5 if utilities differ by less than `tie_width`."""
    difference = preference.utility(prompt_text, a) - preference.utility(prompt_text, b)
    if difference == 0 or abs(difference) < tie_width:
        return 0.5
    return 1.0 if difference > 0 else 0.0
