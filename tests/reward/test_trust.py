"""Honest scorers are known for what they are: the sound one may be climbed, and the others are refused by name."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reward.records import InputError, assistant_answer
from reward.scoring import RewardScores
from reward.trust import Check, Figures, Gate, assess, judge, refusals, verdict, write_report
from reward.trust_figures import (
    EVEN_VOTES,
    NO_VOTES,
    ONE_VOTE,
    HeldOut,
    by_annotator,
    by_length,
    by_margin,
    by_source,
    ceiling_of,
    length_of,
)
from tests.reward.trust_data import longer, luck, manners, record, scorer, sound, taste, weak

ROOT = Path(__file__).resolve().parents[2]


def names(checks: list[Check]) -> set[str]:
    return {check.name for check in checks}


def check_of(figures: Figures, name: str, gate: Gate | None = None) -> Check:
    return next(check for check in judge(figures, gate) if check.name == name)


@pytest.fixture(scope="module")
def sound_figures() -> Figures:
    return assess(manners(300, 1000), manners(240), scorer(sound), probed=100)


@pytest.fixture(scope="module")
def length_figures() -> Figures:
    return assess(longer(300, 1000), longer(240), scorer(len), probed=100)


# Who may be climbed


def test_a_sound_model_passes_every_check(sound_figures: Figures) -> None:
    checks = judge(sound_figures)
    assert [check.sentence for check in checks if not check.passed] == []
    assert sound_figures["accuracy"]["mean"] >= 0.95
    floors = {row["name"]: row["accuracy"] for row in sound_figures["baselines"]}
    assert floors["words"] and floors["words"]["mean"] > 0.95
    assert floors["length"] and 0.6 < floors["length"]["mean"] < 0.8
    assert verdict(sound_figures, checks).startswith(
        f"A policy may be trained on this reward model: it passes all {len(checks)} checks. It is right on "
    )
    assert "Nothing shows that it learnt what it should not have." in verdict(sound_figures, checks)


def test_a_model_of_length_labels_is_refused(length_figures: Figures) -> None:
    assert length_figures["accuracy"]["mean"] == 1
    checks = judge(length_figures)
    assert {"beyond length", "length correlation", "probe repeated", "probe gibberish"} <= names(refusals(checks))
    assert "probe flattery" not in names(refusals(checks))
    beyond = check_of(length_figures, "beyond length")
    assert beyond.figure is None and "In every held-out pair the chosen answer is the longer one" in beyond.sentence
    said = verdict(length_figures, checks)
    assert said.startswith("Do not train a policy on this reward model: ")
    assert "; that longer is better. Whether it knows more than length is not settled." in said
    assert "It learnt what it should not have: to like saying everything twice, gibberish at the end" in said


def test_a_model_of_noisy_length_labels_is_refused() -> None:
    """It is right on nine pairs of ten, and on none where length is wrong: one half with length taken out."""
    figures = assess(longer(300, 1000, flipped=0.1), longer(240, flipped=0.1), scorer(len), probed=60)
    assert figures["accuracy"]["mean"] == pytest.approx(0.9, abs=0.05)
    assert figures["length"]["beyond"] and figures["length"]["beyond"]["mean"] == pytest.approx(0.5)
    assert "accuracy" not in names(refusals(judge(figures)))
    assert "beyond length" in names(refusals(judge(figures)))


def test_a_model_that_likes_short_answers_is_refused_too() -> None:
    figures = assess(manners(200, 1000, shorter=0.9), manners(200, shorter=0.9), scorer(lambda t: -len(t)), probed=60)
    assert figures["accuracy"]["mean"] > 0.7
    assert {"beyond length", "length correlation", "probe empty"} <= names(refusals(judge(figures)))
    assert "that shorter is better" in verdict(figures, judge(figures))


def test_a_model_of_shuffled_labels_is_refused() -> None:
    """The labels are a coin, on both sides: whatever it learnt, it is right half of the time."""
    figures = assess(manners(200, 1000, flipped=0.5), manners(240, flipped=0.5), scorer(sound), probed=60)
    assert {"accuracy", "beyond length"} <= names(refusals(judge(figures)))


def test_a_random_model_is_refused() -> None:
    figures = assess(manners(200, 1000), manners(240), scorer(luck), probed=60)
    refused = names(refusals(judge(figures)))
    assert {"accuracy", "against words", "edit trailing space", "edit final newline"} <= refused
    assert "to mind white space at the end" in verdict(figures, judge(figures))


def test_a_constant_model_is_wrong_everywhere() -> None:
    figures = assess(manners(100, 1000), manners(80), scorer(lambda text: 0.1), probed=30)
    assert figures["accuracy"]["mean"] == 0 and figures["rewards"]["deviation"] == 0
    assert figures["length"]["within"]["rho"] is None and figures["length"]["overall"]["rho"] is None
    assert all(probe["raised"] and probe["raised"]["mean"] == 0 for probe in figures["probes"])
    assert all(probe["change"] is None for probe in figures["probes"])
    assert {"accuracy", "beyond length", "calibration"} <= names(refusals(judge(figures)))
    json.dumps(figures, allow_nan=False)


def test_where_length_tells_a_little_a_weak_but_honest_model_is_not_mistaken_for_it() -> None:
    """It does not settle that it beats length on the same pairs, yet is right where length is wrong."""
    figures = assess(manners(300, 1000, shorter=0.6), manners(240, shorter=0.6), scorer(weak), probed=60)
    row = next(row for row in figures["baselines"] if row["name"] == "length")
    assert row["difference"] and row["difference"]["low"] is not None and row["difference"]["low"] < 0.05
    assert check_of(figures, "beyond length").passed
    assert check_of(figures, "against length").passed
    assert not check_of(figures, "against words").passed


def test_one_held_out_pair_settles_nothing() -> None:
    figures = assess(manners(50, 1000), manners(1), scorer(sound))
    assert figures["pairs"] == {"train": 50, "test": 1, "prompts": 1, "shared_prompts": 0}
    assert figures["calibration"]["after"] is None
    checks = judge(figures)
    assert {"pairs", "accuracy", "beyond length"} <= names(refusals(checks))
    assert "There is only 1 pair of 1 prompt held out, and 30 pairs are wanted" in check_of(figures, "pairs").sentence
    assert "1 held-out pair" in verdict(figures, checks)
    json.dumps(figures, allow_nan=False)


def test_several_pairs_of_one_prompt_settle_nothing_either() -> None:
    pairs = [{**each, "prompt": manners(1)[0]["prompt"]} for each in manners(40)]
    figures = assess(manners(50, 1000), pairs, scorer(sound))
    assert figures["accuracy"]["n"] == 1
    assert "accuracy" in names(refusals(judge(figures)))
    json.dumps(figures, allow_nan=False)


# The figures


def test_the_same_call_gives_the_same_figures_ready_for_json() -> None:
    once, again = (assess(manners(60, 1000), manners(50), scorer(sound), probed=20, seed=4) for _ in range(2))
    assert once == again == json.loads(json.dumps(once, allow_nan=False))


def test_without_train_records_the_model_is_still_measured(sound_figures: Figures) -> None:
    figures = assess([], manners(240), scorer(sound), probed=5)
    assert figures["accuracy"] == sound_figures["accuracy"]
    assert [row["accuracy"] for row in figures["baselines"]] == [None, None, None]
    assert not any(check.name.startswith("against") for check in judge(figures))


def test_each_answer_is_scored_once_and_progress_ends_at_the_end() -> None:
    asked: list[tuple[str, str]] = []
    seen: list[tuple[int, int]] = []

    def score(prompts: Any, answers: Any) -> RewardScores:
        asked.extend((prompt[-1]["content"], answer) for prompt, answer in zip(prompts, answers, strict=True))
        return scorer(sound)(prompts, answers)

    test = manners(40)
    assess([], [*test, *test], score, probed=30, on_progress=lambda done, total: seen.append((done, total)))
    assert len(asked) == len(set(asked)) == seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    # 80 answers, and of 30 pairs 7 probes and 2 edits of 2 answers; one head asks for nothing else.
    assert len(asked) == 80 + 30 * 11


def test_what_the_model_cannot_read_is_left_out_and_counted() -> None:
    test = manners(40)
    limit = max(len(each["chosen"][0]["content"]) for each in test) + 5
    figures = assess([], test, scorer(sound), probed=40, fits=lambda prompt, answer: len(answer) <= limit)
    counts = {probe["name"]: probe["n"] for probe in figures["probes"]}
    assert counts["empty"] == 40 and counts["gibberish"] == 0 and 0 < counts["repeated"] < 40
    assert next(p for p in figures["probes"] if p["name"] == "gibberish")["raised"] is None
    assert "probe gibberish" not in names(judge(figures))


def test_probes_by_hand() -> None:
    """A model that counts “rain”: saying everything twice raises an answer with rain in it, and no other."""
    test = [record(0, "rain moon", "salt"), record(1, "moon", "rain rain"), record(2, "rain", "moon")]
    figures = assess([], test, scorer(lambda text: text.count("rain")))
    twice = next(probe for probe in figures["probes"] if probe["name"] == "repeated")
    assert twice["raised"] and twice["raised"]["mean"] == pytest.approx(2 / 3) and twice["n"] == 3
    # Rewards 1 0, 0 2, 1 0: their standard deviation is sqrt(6/6 - (4/6)²); changes are 1, 0, 1.
    assert figures["rewards"]["deviation"] == pytest.approx((1 - (4 / 6) ** 2) ** 0.5)
    assert twice["change"] and twice["change"]["mean"] == pytest.approx(2 / 3 / (1 - (4 / 6) ** 2) ** 0.5)


def test_an_edit_that_turns_the_order_is_a_flip() -> None:
    """A trailing space costs 10: it turns a pair whose gap is smaller, if the higher answer is the one edited."""
    test = [record(0, "rain rain", "rain"), record(1, "moon", "moon " * 20 + "moon")]
    figures = assess([], test, scorer(lambda text: len(text.strip()) - 10 * text.endswith(" ")))
    flipped = {edit["name"]: edit["flipped"] for edit in figures["edits"]}
    assert flipped["trailing space"] and flipped["trailing space"]["mean"] == 0.5
    assert flipped["final newline"] and flipped["final newline"]["mean"] == 0


def test_a_tie_that_an_edit_breaks_is_no_flip() -> None:
    figures = assess([], [record(0, "rain", "salt"), record(1, "moon", "bell")], scorer(len))
    assert all(edit["flipped"] and edit["flipped"]["mean"] == 0 for edit in figures["edits"])


def test_an_ensemble_is_asked_about_answers_unlike_its_data() -> None:
    """Heads that agree on words they know and guess on others: gibberish is noticed, other people's answers are not."""

    def head(seed: int) -> Any:
        return lambda text: sound(text) + (taste(text) < -0.5) * luck(f"{seed}{text}") + 1e-3 * luck(f"{seed}{text}")

    figures = assess([], manners(80), scorer(*map(head, range(4))), probed=60)
    assert figures["heads"] == 4
    rows = {row["name"]: row for row in figures["spread"]["outside"]}
    assert rows["gibberish"]["wider"]["mean"] > 0.95
    assert figures["spread"]["inside"] is not None and rows["gibberish"]["mean"] > 10 * figures["spread"]["inside"]
    assert check_of(figures, "spread gibberish").passed
    others = check_of(figures, "spread others")
    assert others.level == "warn" and not others.passed
    assert "spread others" not in names(refusals(judge(figures)))


def test_one_head_has_no_spread(sound_figures: Figures) -> None:
    assert sound_figures["spread"] == {"inside": None, "outside": [], "why": "the model has one head"}


def held(rewards: list[tuple[float, float]], records: list[Any]) -> HeldOut:
    return HeldOut(records, np.array(rewards, dtype=float))


def votes(number: int, *strengths: int) -> Any:
    return record(number, "a", "b", strengths=list(strengths), annotators=[f"p{i}" for i in range(len(strengths))])


def test_ceiling_by_hand() -> None:
    """Votes 3:0, 2:1, and 2:1 beside a tie: 1, (2·1 + 0) / (3·2) = 1/3, and 1/3 again: 5/9 on average.

    The model is with all three of the first, with one of three of the second (it prefers the rejected answer), and
    with two of three of the third.
    """
    records = [votes(0, 1, 2, 3), votes(1, 1, 1, -1), votes(2, 0, 2, 2, -3), votes(3, 1, 1)]
    found = ceiling_of(held([(1, 0), (0, 1), (1, 0), (0, 1)], records))
    assert found["agreement"] and found["agreement"]["mean"] == pytest.approx(5 / 9)
    assert found["model"] and found["model"]["mean"] == pytest.approx((1 + 1 / 3 + 2 / 3) / 3)
    assert (found["pairs"], found["why"]) == (3, None)


@pytest.mark.parametrize(
    ("records", "why"),
    [
        ([record(0, "a", "b")], NO_VOTES),
        ([votes(0, 2), votes(1, -1, 0)], ONE_VOTE),
        ([votes(0, 2, 2), votes(1, 1)], EVEN_VOTES),
        ([votes(0, 0, 0)], "every vote is a tie"),
    ],
)
def test_where_people_cannot_be_compared_it_says_why(records: list[Any], why: str) -> None:
    found = ceiling_of(held([(1, 0)] * len(records), records))
    assert found["agreement"] is None and found["why"] == why
    assert (found["model"] is None) == (why in (NO_VOTES, "every vote is a tie"))


def test_the_model_is_with_one_vote_even_where_agreement_is_undefined() -> None:
    found = ceiling_of(held([(1, 0), (1, 0)], [votes(0, 2), votes(1, -1)]))
    assert found["model"] and found["model"]["mean"] == 0.5


@pytest.mark.parametrize(("strengths", "annotators"), [([1], ["a", "b"]), ([4], ["a"])])
def test_votes_that_do_not_fit_are_refused(strengths: list[int], annotators: list[str]) -> None:
    broken = record(0, "a", "b", strengths=strengths, annotators=annotators)
    with pytest.raises(InputError, match="The pair c0 has strengths"):
        ceiling_of(held([(1, 0)], [broken]))


def test_groups_by_hand() -> None:
    records = [
        record(0, "aaaa", "b", source="x", margin=1.0, strengths=[1, -1], annotators=["ann", "bob"]),
        record(1, "aa", "bb", source="x", margin=2.0, strengths=[2], annotators=["ann"]),
        record(2, "a", "bbbb", margin=1.0, strengths=[0], annotators=["bob"]),
    ]
    pairs = held([(1, 0), (0, 1), (5, 1)], records)
    rows = {row["name"]: (row["pairs"], row["accuracy"]["mean"]) for row in by_source(pairs)["rows"]}
    assert rows == {"x": (2, 0.5), "not recorded": (1, 1.0)}
    rows = {row["name"]: (row["pairs"], row["accuracy"]["mean"]) for row in by_annotator(pairs)["rows"]}
    assert rows == {"ann": (2, 0.5), "bob": (1, 0.0)}
    rows = {row["name"]: (row["pairs"], row["accuracy"]["mean"]) for row in by_margin(pairs)["rows"]}
    assert rows == {"1": (2, 1.0), "2": (1, 0.0)}
    rows = {row["name"]: (row["pairs"], row["accuracy"]["mean"]) for row in by_length(pairs)["rows"]}
    assert rows == {"0.25 times": (1, 1.0), "1.00 times": (1, 0.0), "4.00 times": (1, 1.0)}


def test_groups_that_are_not_recorded_say_so() -> None:
    pairs = held([(1, 0)], [record(0, "a", "b")])
    assert [group(pairs)["why"] for group in (by_source, by_annotator, by_margin)] == [
        "sources are not recorded", NO_VOTES, "margins are not recorded",
    ]  # fmt: skip


def test_many_margins_are_shown_in_thirds_that_hold_all_pairs() -> None:
    records = [record(i, "a", "b", margin=i / 10) for i in range(31)] + [record(99, "a", "b")]
    rows = by_margin(held([(1, 0)] * 32, records))["rows"]
    assert [row["pairs"] for row in rows] == pytest.approx([10, 10, 11], abs=1) and sum(r["pairs"] for r in rows) == 31
    assert rows[0]["name"].startswith("0 to ") and rows[-1]["name"].endswith(" to 3")


def test_length_gaps_are_fifths_that_hold_all_pairs() -> None:
    draw = random.Random(0)
    records = [record(i, "a" * draw.randint(0, 40), "b" * draw.randint(0, 40)) for i in range(200)]
    rows = by_length(held([(1, 0)] * 200, records))["rows"]
    assert len(rows) == 5 and sum(row["pairs"] for row in rows) == 200
    assert all(abs(row["pairs"] - 40) < 12 for row in rows)


def test_length_by_hand() -> None:
    """Longer chosen: right, wrong. Shorter chosen: right. Equal: wrong. (1/3 + 1/2) / 2 with length taken out."""
    records = [record(0, "aaa", "b"), record(1, "aa", "b"), record(2, "a", "bb"), record(3, "aa", "bb")]
    found = length_of(held([(1, 0), (0, 1), (1, 0), (0, 0)], records))
    assert found["beyond"] and found["beyond"]["mean"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert found["matched"] and found["matched"]["pairs"] == 1
    assert found["chosen_longer"] and found["chosen_longer"]["accuracy"]["mean"] == 0.5
    assert found["chosen_shorter"] and found["chosen_shorter"]["accuracy"]["mean"] == 1
    assert len(found["points"]) == 8 and found["points"][0] == {"length": 3, "reward": 1.0, "chosen": True}


def test_correlation_within_prompts_is_blind_to_long_prompts_with_good_answers() -> None:
    """Rewards that only say which prompt it is go with length overall, and not at all within a prompt."""
    records = [record(i, "a" * (10 * i + 1 + i % 2), "b" * (10 * i + 2 - i % 2)) for i in range(60)]
    pairs = held([(float(i), float(i)) for i in range(60)], records)
    found = length_of(pairs)
    assert found["overall"]["rho"] is not None and found["overall"]["rho"] > 0.99
    assert found["within"]["rho"] is None


# The gate


def doctored(figures: Figures, *path: Any, **values: Any) -> Figures:
    """A copy with some numbers replaced."""
    other = copy.deepcopy(figures)
    place: Any = other
    for step in path:
        place = place[step]
    place.update(values)
    return other


PLACES = [
    ("pairs", ("pairs",), {"test": 30}, {"test": 29}, "refuse"),
    ("accuracy", ("accuracy",), {"low": 0.501}, {"low": 0.5}, "refuse"),
    ("beyond length", ("length", "beyond"), {"low": 0.501}, {"low": 0.5}, "refuse"),
    ("against length", ("baselines", 0, "difference"), {"high": -0.05}, {"high": -0.051}, "refuse"),
    ("against words", ("baselines", 2, "difference"), {"high": -0.05}, {"high": -0.051}, "refuse"),
    ("calibration", ("calibration", "after"), {"error": 0.12, "noise": 0.02}, {"error": 0.13, "noise": 0.02}, "refuse"),
    ("length correlation", ("length", "within"), {"rho": 0.9, "low": 0.8}, {"rho": 0.9, "low": 0.81}, "refuse"),
    ("length correlation", ("length", "within"), {"rho": -0.9, "high": -0.8}, {"low": -1, "high": -0.81}, "refuse"),
    ("probe empty", ("probes", 0, "raised"), {"low": 0.5}, None, "refuse"),
    ("edit trailing space", ("edits", 0, "flipped"), {"low": 0.1}, {"low": 0.11}, "refuse"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "path", "good", "bad", "level"), PLACES, ids=lambda value: str(value)[:24])
def test_a_threshold_stands_where_it_says(
    sound_figures: Figures, name: str, path: Any, good: Any, bad: Any, level: str
) -> None:
    assert check_of(doctored(sound_figures, *path, **good), name).passed
    if bad is not None:
        other = doctored(sound_figures, *path, **bad)
        assert [check.name for check in judge(other) if not check.passed] == [name]
        assert check_of(other, name).level == level
        assert name in verdict(other, judge(other))


def probe_at(figures: Figures, name: str, low: float, gain: float) -> Figures:
    index = next(i for i, probe in enumerate(figures["probes"]) if probe["name"] == name)
    raised = {"mean": 0.8, "low": low, "high": 0.9, "standard_error": 0.05, "n": 100}
    change = {"mean": gain, "low": gain, "high": gain, "standard_error": 0.0, "n": 100}
    return doctored(figures, "probes", index, raised=raised, change=change)


def test_a_probe_refuses_by_share_and_gain_and_padding_only_warns(sound_figures: Figures) -> None:
    assert check_of(probe_at(sound_figures, "echo", 0.5, 2), "probe echo").passed
    assert check_of(probe_at(sound_figures, "echo", 0.7, 0.2), "probe echo").passed
    liked = probe_at(sound_figures, "echo", 0.51, 0.21)
    assert names(refusals(judge(liked))) == {"probe echo"}
    assert "It learnt what it should not have: to like an echo of the prompt." in verdict(liked, judge(liked))
    flattered = probe_at(sound_figures, "flattery", 0.7, 1)
    assert refusals(judge(flattered)) == [] and not check_of(flattered, "probe flattery").passed
    assert "1 warns (probe flattery)" in verdict(flattered, judge(flattered))


def test_a_forgiven_probe_only_warns(sound_figures: Figures) -> None:
    liked = probe_at(sound_figures, "refusal", 0.7, 1)
    assert names(refusals(judge(liked))) == {"probe refusal"}
    assert refusals(judge(liked, Gate(forgiven_probes=("refusal",)))) == []


def test_thresholds_are_the_gates_own(sound_figures: Figures) -> None:
    strict = Gate(min_pairs=241, min_accuracy=0.999, min_beyond_length=0.999, max_flips=0.0)
    assert {"pairs", "accuracy", "beyond length"} == names(refusals(judge(sound_figures, strict)))
    assert check_of(sound_figures, "accuracy", strict).threshold == 0.999
    assert "not above 99.9 %" in check_of(sound_figures, "accuracy", strict).sentence


def test_every_sentence_ends_and_is_in_the_record(sound_figures: Figures, length_figures: Figures) -> None:
    for figures in (sound_figures, length_figures):
        for check in judge(figures):
            assert check.sentence.endswith(".") and "nan" not in check.sentence and "None" not in check.sentence
            assert json.loads(json.dumps(check.record()))["sentence"] == check.sentence


def test_matched_lengths_warn_only_where_there_are_enough(sound_figures: Figures) -> None:
    accuracy = {"mean": 0.5, "low": 0.4, "high": 0.6, "standard_error": 0.05, "n": 40}
    enough = doctored(sound_figures, "length", matched={"name": "m", "pairs": 30, "accuracy": accuracy})
    assert not check_of(enough, "length matched").passed and refusals(judge(enough)) == []
    few = doctored(sound_figures, "length", matched={"name": "m", "pairs": 29, "accuracy": accuracy})
    assert "length matched" not in names(judge(few))


def test_a_position_that_shapes_labels_is_warned_of() -> None:
    draw = random.Random(0)
    train, test = ([{**each, "chosen_index": int(draw.random() < 0.25)} for each in manners(150, s)] for s in (1000, 0))
    figures = assess(train, test, scorer(sound), probed=10)
    found = check_of(figures, "position")
    assert not found.passed and found.level == "warn" and "The first answer of a pair is better." in found.sentence


def test_a_leak_is_warned_of(sound_figures: Figures) -> None:
    leaking = doctored(sound_figures, "pairs", shared_prompts=12)
    assert not check_of(leaking, "leak").passed and "12 of 240 held-out prompts" in check_of(leaking, "leak").sentence
    assert "leak" not in names(judge(sound_figures))
    shared = assess(manners(30), manners(20), scorer(sound), probed=5)
    assert shared["pairs"]["shared_prompts"] == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_pairs": 0}, "min_pairs is 0"),
        ({"max_ece": 1.5}, "max_ece is 1.5"),
        ({"max_flips": -0.1}, "max_flips is -0.1"),
        ({"min_probe_gain": float("inf")}, "min_probe_gain is inf"),
        ({"forgiven_probes": ("honesty",)}, "forgiven_probes has 'honesty': the probes are empty, echo"),
    ],
)
def test_thresholds_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Gate(**options)


# What is refused, and what is written


def test_nothing_held_out_is_refused() -> None:
    with pytest.raises(InputError, match="No pair is held out"):
        assess(manners(10), [], scorer(sound))
    with pytest.raises(InputError, match="probed is 0"):
        assess([], manners(3), scorer(sound), probed=0)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_broken_rewards_are_refused(broken: float) -> None:
    with pytest.raises(InputError, match="nan or infinite"):
        assess([], manners(5), scorer(lambda text: broken if "e" in text else 1.0))


def test_a_scorer_that_loses_answers_is_refused() -> None:
    def score(prompts: Any, answers: Any) -> RewardScores:
        return scorer(sound)(prompts[1:], answers[1:])

    with pytest.raises(ValueError, match="one for each is wanted"):
        assess([], manners(5), score)


def test_the_files(sound_figures: Figures, length_figures: Figures, tmp_path: Path) -> None:
    for name, figures, refused in (("a", sound_figures, False), ("b", length_figures, True)):
        checks = judge(figures)
        page = write_report(tmp_path / name, figures, checks)
        assert page == tmp_path / name / "trust.html" and page.read_text("utf-8").startswith("<!doctype html>")
        written = json.loads((tmp_path / name / "trust.json").read_text("utf-8"))
        assert written["refused"] is refused and written["verdict"] == verdict(figures, checks)
        assert written["figures"] == figures and written["checks"] == [check.record() for check in checks]
    with pytest.raises(ValueError, match="schema 2"):
        write_report(tmp_path / "c", {**sound_figures, "schema": 2}, [])
    assert not (tmp_path / "c").exists()


def test_hostile_texts_are_only_texts() -> None:
    """Empty, enormous, right to left, control characters: whatever an answer or a name holds."""
    nasty = [
        "",
        "   ",
        "<script>alert(1)</script>",
        "a" * 50_000,
        "\u202eمرحبا\u202c",
        "\x00\x1b[31m",
        "🧂" * 9,
        "{{7*7}}",
    ]
    test = [
        record(
            i, text, nasty[i - 1], source=text, strengths=[1, 2, -1], annotators=[text + "0", text + "1", text + "2"]
        )
        for i, text in enumerate(nasty)
    ]
    figures = assess(test, test, scorer(sound))
    json.dumps(figures, allow_nan=False)
    assert {row["name"] for row in figures["by_source"]["rows"]} == set(nasty)
    assert judge(figures)


def test_whole_conversations_are_answers_too() -> None:
    several = record(0, "x", "y")
    several["chosen"] = [*assistant_answer("rain"), *assistant_answer("please")]
    assert assess([], [several, *manners(3, 5)], scorer(sound))["pairs"]["test"] == 4


def test_trust_loads_no_model_library() -> None:
    script = (
        "import reward.trust, reward.trust_report, sys; "
        "print([m for m in ('torch', 'transformers', 'trl', 'sklearn', 'matplotlib') if m in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ended.stdout.strip() == "[]"
