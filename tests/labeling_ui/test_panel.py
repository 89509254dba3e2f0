"""The simulated panel: features by hand, symmetries of the judge, and labelling that survives interruption."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labeling_ui.panel import Annotator, HiddenPreference, judge, label_with_panel, make_panel, preferred
from labeling_ui.store import LabelStore, Project
from reward.aggregate import preferences
from reward.records import InputError, prompt_text, user_prompt

PREFERENCE = HiddenPreference()
PROMPT = "How do plants make their food?"  # content words: plants, food
GOOD = "Green plants make food from light, water and air."
texts = st.text(alphabet=st.sampled_from("ab foodplants.!#*-1\n"), max_size=200)
utilities = st.floats(-5, 5)
# The same examples on every run, and no failure because a machine was busy.
deterministic = settings(derandomize=True, deadline=None)


# The hidden preference


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (GOOD, {"complete": 1, "on_topic": 1}),  # 9 words
        ("", {"too_short": 1}),
        ("Planting helps with one two three four five", {"on_topic": 1}),  # plant-ing: 1 of 2, half earns all
        ("One two three four.", {"complete": 1, "too_short": 0.5}),
        ('She said: "one two three four five six!"', {"complete": 1}),
        ("(See one two three four five six seven.) ", {"complete": 1}),
        (" ".join(f"w{n}" for n in range(50)), {"excess": 0.25}),
        (" ".join(f"w{n}" for n in range(200)), {"excess": 1}),
        # a b a, b a b, a b a, b a b, ...: 8 trigrams, 2 different ones
        ("a b a b a b a b a b", {"repetition": 6 / 8}),
        ("one two three four five six seven\n- eight", {"markup": 1}),
        ("# One\ntwo three four five six seven eight", {"markup": 1}),
        ("1. one two three four five six seven", {"markup": 1}),
        ("one **two** three four five six seven eight", {"markup": 1}),
        ("one - two 3.5 * four five six seven eight", {}),
    ],
)
def test_features_by_hand(answer: str, expected: dict[str, float]) -> None:
    nothing = dict.fromkeys(("complete", "on_topic", "excess", "too_short", "repetition", "markup"), 0.0)
    assert PREFERENCE.features(PROMPT, answer) == pytest.approx(nothing | expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (GOOD, 1.5 + 1.5),
        ("", -1.0),
        ("Plants.", 1.5 + 1.5 - 7 / 8),
        ("**food food food food food food food food food food**", 1.5 - 2.0 * 7 / 8 - 0.7),
        (" ".join(f"w{n}" for n in range(60)), -0.75),
    ],
)
def test_utility_by_hand(answer: str, expected: float) -> None:
    assert PREFERENCE.utility(PROMPT, answer) == pytest.approx(expected)


def test_a_quarter_of_the_content_words_is_half_on_topic() -> None:
    prompt = "Compare rivers, mountains, oceans, deserts in Africa, Europe, Canada."  # 8 content words
    assert PREFERENCE.features(prompt, "Rivers and deserts.")["on_topic"] == pytest.approx(0.5)
    assert PREFERENCE.features("Why is it so?", "It is so.")["on_topic"] == 0


def test_roles_are_not_what_was_asked() -> None:
    prompt = prompt_text(user_prompt(PROMPT))
    assert prompt.startswith("user: ")
    assert PREFERENCE.features(prompt, GOOD) == PREFERENCE.features(PROMPT, GOOD)
    assert PREFERENCE.features("user: Well?", "The user asks.")["on_topic"] == 0


@deterministic
@given(texts, texts)
def test_features_are_shares_and_utility_is_bounded(prompt: str, answer: str) -> None:
    assert all(0 <= value <= 1 for value in PREFERENCE.features(prompt, answer).values())
    assert -5.2 <= PREFERENCE.utility(prompt, answer) <= 3.0


@deterministic
@given(texts, texts, texts)
def test_preferred_is_antisymmetric(prompt: str, a: str, b: str) -> None:
    assert preferred(PREFERENCE, prompt, a, b) + preferred(PREFERENCE, prompt, b, a) == 1
    assert preferred(PREFERENCE, prompt, a, a, tie_width=0) == 0.5


def test_preferred_by_hand() -> None:
    eighth = "Plants food one two three four five."  # 7 words: 1/8 too short
    whole = "Plants food one two three four five six."
    assert preferred(PREFERENCE, PROMPT, whole, eighth) == 1.0
    assert preferred(PREFERENCE, PROMPT, eighth, whole) == 0.0
    assert preferred(PREFERENCE, PROMPT, whole, eighth, tie_width=0.2) == 0.5


# The annotators

CERTAIN = Annotator("certain", temperature=0, side_bias=0, tie_width=0.1)


@pytest.mark.parametrize(
    ("difference", "value"),
    [(0.0, 4), (0.09, 4), (0.1, 3), (0.74, 3), (0.75, 2), (1.74, 2), (1.75, 1), (9, 1), (-0.09, 4), (-0.1, 5), (-9, 7)],
)
def test_thresholds(difference: float, value: int) -> None:
    assert judge(CERTAIN, difference, 0.0, Random(0)) == value


def test_equal_is_a_tie_even_for_who_calls_no_ties() -> None:
    assert judge(Annotator("strict", 0, 0, 0), 1.0, 1.0, Random(0)) == 4


@deterministic
@given(utilities, utilities)
def test_swapping_the_sides_mirrors_the_value(one: float, other: float) -> None:
    assert judge(CERTAIN, one, other, Random(0)) == 8 - judge(CERTAIN, other, one, Random(0))


@deterministic
@given(utilities, utilities, st.floats(0, 2), st.integers())
def test_value_is_on_the_scale_and_never_falls_with_the_right_answer(
    left: float, right: float, more: float, seed: int
) -> None:
    annotator = Annotator("noisy", temperature=0.5, side_bias=0.2, tie_width=0.2)
    value = judge(annotator, left, right, Random(seed))
    assert 1 <= value <= 7
    assert judge(annotator, left, right + more, Random(seed)) >= value


def test_noise_is_logistic() -> None:
    """P(left) = sigmoid(0.5 / 0.5) = 0.731 without a tie width; 4,000 draws have a standard deviation of 0.007."""
    annotator = Annotator("noisy", temperature=0.5, side_bias=0.2, tie_width=0)
    rng = Random(7)
    left = sum(judge(annotator, 0.3, 0.0, rng) < 4 for _ in range(4000)) / 4000
    assert left == pytest.approx(1 / (1 + math.exp(-1)), abs=0.028)


def test_panel_is_varied_and_deterministic_and_grows_in_place() -> None:
    panel = make_panel(6, seed=1)
    assert panel == make_panel(6, seed=1)
    assert panel[:4] == make_panel(4, seed=1)
    assert panel != make_panel(6, seed=2)
    for field in ("name", "temperature", "side_bias", "tie_width"):
        assert len({getattr(annotator, field) for annotator in panel}) == 6
    with pytest.raises(InputError, match="panel of 0 annotators"):
        make_panel(0, seed=1)


# Labelling

ANSWERS = [GOOD, "Plants.", "", "It is a nice day and we all went out for a walk in the"]


def fill(store: LabelStore, count: int = 60) -> Project:
    project = store.create_project("toy", simulated=True)
    store.add_items(
        project,
        [
            {
                "id": f"c{n}",
                "prompt": user_prompt(f"{PROMPT} ({n})"),
                "split": "train",
                "answers": [{"text": text} for text in ANSWERS],
            }
            for n in range(count)
        ],
    )
    return project


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LabelStore]:
    with LabelStore(tmp_path / "labels.db") as store:
        yield store


def label(
    store: LabelStore, project: Project, labels_per_item: int = 3, size: int = 5, seed: int = 0, **more: object
) -> int:
    return label_with_panel(
        store,
        project,
        annotators=make_panel(size, seed=9),
        labels_per_item=labels_per_item,
        preference=PREFERENCE,
        seed=seed,
        **more,
    )


def test_every_item_gets_its_labels_by_different_annotators(store: LabelStore) -> None:
    project = fill(store)
    progress: list[tuple[int, int]] = []
    assert label(store, project, on_progress=lambda done, total: progress.append((done, total))) == 360 * 3
    assert progress == [(600, 1080), (1080, 1080)]
    labels = store.labels(project)
    assert set(Counter(label.item_id for label in labels).values()) == {3}
    assert len({(label.item_id, label.annotator) for label in labels}) == 1080
    # Sides and work are shared out: 1,080 fair draws have a standard deviation of 16.4 around 540.
    assert abs(sum(label.body["order"][0] < label.body["order"][1] for label in labels) - 540) < 4 * 16.4
    assert min(Counter(label.annotator for label in labels).values()) > 150


def test_labels_follow_the_hidden_preference(store: LabelStore) -> None:
    project = fill(store)
    label(store, project)
    records = preferences(store.votes(project), simulated=project.simulated).records
    assert len(records) > 250
    right = sum(
        preferred(
            PREFERENCE,
            prompt_text(record["prompt"]),
            record["chosen"][0]["content"],
            record["rejected"][0]["content"],
            tie_width=0,
        )
        for record in records
    )
    assert right / len(records) > 0.9


def test_interrupted_labelling_ends_as_if_it_had_not_been(store: LabelStore, tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(done: int, total: int) -> None:
        raise Interrupted

    project = fill(store)
    with pytest.raises(Interrupted):
        label(store, project, on_progress=interrupt)
    assert store.count_labels(project) == 600
    assert label(store, project) == 480
    assert label(store, project) == 0
    with LabelStore(tmp_path / "at_once.db") as other:
        at_once = fill(other)
        label(other, at_once)
        assert other.digest(at_once) == store.digest(project)


def test_more_labels_per_item_keep_those_there_are(store: LabelStore) -> None:
    project = fill(store, count=5)
    label(store, project, labels_per_item=2)
    before = store.labels(project)
    assert label(store, project, labels_per_item=4) == 30 * 2
    assert store.labels(project)[: len(before)] == before
    assert set(Counter(label.item_id for label in store.labels(project)).values()) == {4}


def test_labels_of_other_settings_are_never_added_to(store: LabelStore) -> None:
    project = fill(store, count=2)
    label(store, project)
    with pytest.raises(InputError, match="already holds 36 labels that a panel of 5 with seed 1 and 3 labels"):
        label(store, project, seed=1)
    with pytest.raises(InputError, match="already holds 12 labels"):
        label(store, project, labels_per_item=2)
    with pytest.raises(InputError, match=r"different .*value"):
        label_with_panel(
            store,
            project,
            annotators=make_panel(5, seed=9),
            labels_per_item=3,
            preference=HiddenPreference(complete=-9.0),
            seed=0,
        )
    assert store.count_labels(project) == 36


def test_refusals(store: LabelStore) -> None:
    project = fill(store, count=1)
    with pytest.raises(InputError, match="6 labels per item cannot come from 5"):
        label(store, project, labels_per_item=6)
    with pytest.raises(InputError, match="0 labels per item"):
        label(store, project, labels_per_item=0)
    with pytest.raises(InputError, match="has a name twice"):
        label_with_panel(
            store, project, annotators=[CERTAIN, CERTAIN], labels_per_item=1, preference=PREFERENCE, seed=0
        )
    with pytest.raises(InputError, match="Project people is for people"):
        label(store, store.create_project("people"))
    assert store.count_labels(project) == 0


def test_neither_torch_nor_sqlalchemy_is_loaded() -> None:
    code = "import sys, labeling_ui.panel; print({'torch', 'sqlalchemy', 'align'} & sys.modules.keys())"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
