"""The data report: every figure by hand or against a plain count, the page inert, and the same bytes again."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align import models
from align.config import Config, ModelSection
from align.data import report
from align.data.prepare.steps import StepCount
from align.data.report import findings
from align.data.report.costs import GPU
from align.data.report.describe import _openings, opening_of
from align.data.report.lengths import lengths_of, limits_of, sizes_of, whole
from align.data.report.page import render_html
from align.data.report.schema import SAMPLED
from align.data.report.tally import Tally, groups_of
from align.data.report.writing import MOST_LINES
from align.plan import planning
from align.plan.rows import Row
from reward.records import Record, assistant_answer, iter_jsonl, user_prompt, write_jsonl
from tests.conftest import demonstrations

deterministic = settings(derandomize=True, deadline=None, max_examples=60)
NASTY = "<script>alert(1)</script>\x1b[31m\u202e{{ 7 * 7 }}</style><img src=x onerror=alert(1)> $x$ & 'quoted\""


def pair(prompt: str, chosen: str, rejected: str, split: str = "train", **more: Any) -> Record:
    sides = {"chosen": assistant_answer(chosen), "rejected": assistant_answer(rejected)}
    return {"prompt": user_prompt(prompt), **sides, "split": split, **more}


def demonstration(prompt: str, answer: str, split: str = "train", **more: Any) -> Record:
    return {"prompt": user_prompt(prompt), "completion": assistant_answer(answer), "split": split, **more}


def tally_of(rows: list[Record], kind: Any = "preference", size: int = SAMPLED) -> Tally:
    tally = Tally(kind, 0, size)
    for row in rows:
        tally.add(row)
    return tally


def config_of(**sections: Any) -> Config:
    raw: dict[str, Any] = {"name": "test", "label": {"source": "dataset"}, "data": {"preferences": "p.jsonl"}}
    return Config.model_validate(raw | sections)


# -- counts over all rows ---------------------------------------------------------------------------------------------


def test_labels_of_one_pair_find_each_other_whatever_the_order_of_the_answers() -> None:
    rows = [
        pair("a", "yes", "no"),
        pair("A ", "yes ", "no"),  # the same prompt, as its id says
        pair("a", "no", "yes"),  # against the two
        pair("b", "yes", "no"),
        pair("b", "yes", "no"),  # agrees
        pair("c", "yes", "no"),  # labelled once
        pair("b", "no", "yes", augmented="swap"),  # made up: nobody said it
    ]
    pairs = tally_of(rows).pairs()
    assert pairs is not None
    assert (pairs["labelled_again"], pairs["agreeing"], pairs["agreement"]) == (2, 1, 0.5)
    assert (pairs["longer"], pairs["shorter"], pairs["equal"], pairs["longer_share"]) == (5, 1, 0, 0.8333)


@deterministic
@given(st.lists(st.tuples(st.sampled_from("pq"), st.sampled_from("abc"), st.sampled_from("abc")), max_size=25))
def test_agreement_is_what_a_dictionary_of_all_pairs_says(said: list[tuple[str, str, str]]) -> None:
    said = [each for each in said if each[1] != each[2]]
    votes: dict[tuple[str, frozenset[str]], list[str]] = {}
    for prompt, chosen, rejected in said:
        votes.setdefault((prompt, frozenset((chosen, rejected))), []).append(chosen)
    several = [each for each in votes.values() if len(each) > 1]
    found = tally_of([pair(*each) for each in said]).pairs()
    assert found is not None
    assert found["labelled_again"] == len(several)
    assert found["agreeing"] == sum(len(set(each)) == 1 for each in several)


def test_a_file_without_pairs_tells_nothing_of_pairs() -> None:
    assert tally_of([demonstration("a", "b")], "demonstration").pairs() is None
    empty = tally_of([]).pairs()
    assert empty is not None and empty["longer_share"] is None and empty["agreement"] is None


def test_every_row_is_as_likely_in_the_sample_as_any_other() -> None:
    rows = [demonstration(str(number), "x") for number in range(40)]
    seen: Counter[str] = Counter()
    for seed in range(300):
        tally = Tally("demonstration", seed, size=10)
        for row in rows:
            tally.add(row)
        assert len(tally.sample) == 10 and tally.rows == 40
        seen.update(row["prompt"][0]["content"] for row in tally.sample)
    # 300 draws of 10 in 40: 75 each, deviation 7.5
    assert len(seen) == 40 and all(45 < count < 105 for count in seen.values())


def test_of_few_rows_all_are_sampled_in_order() -> None:
    rows = [demonstration(str(number), "x") for number in range(10)]
    assert tally_of(rows, "demonstration", size=10).sample == rows


def test_sources_beyond_a_thousand_are_counted_together() -> None:
    rows = [demonstration("a", "b", source=f"source {number % 1_200}") for number in range(2_400)]
    tally = tally_of(rows, "demonstration")
    assert len(tally.sources) == 1_001 and tally.sources["(others)"] == 400 and tally.sources.total() == 2_400


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    path, row = tmp_path / "many.jsonl", json.dumps(pair("What is rain?", "Water. " * 50, "No. " * 50)) + "\n"
    peaks = []
    for rows in (500, 4_000):
        path.write_text(row * rows, "utf-8")
        tally = Tally("preference", 0, size=100)
        tracemalloc.start()
        for _, record in iter_jsonl(path):
            tally.add(record)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 200_000  # 3,500 rows of 750 bytes more would be 2.6 MB


# -- lengths ----------------------------------------------------------------------------------------------------------


def test_lengths_by_hand() -> None:
    sizes = [Row(16, (1, 40)), Row(17, (2, 3)), Row(1, (0, 33))]
    prompt, answer, row = lengths_of(sizes)
    assert prompt["edges"] == [0, 16, 32] and prompt["counts"] == [2, 1]  # 16 is not above 16
    assert answer["edges"] == [0, 16, 32, 64] and answer["counts"] == [4, 0, 2]
    assert (answer["n"], answer["median"], answer["longest"], answer["mean"]) == (6, 3, 40, 13.2)
    # with one token more, for what a template may write behind the stop token of a pair
    assert [whole(size) for size in sizes] == [57, 21, 35] and row["longest"] == 57


@deterministic
@given(st.lists(st.integers(0, 5_000), min_size=1, max_size=50))
def test_every_length_is_in_the_bar_that_its_edges_say(values: list[int]) -> None:
    (lengths,) = lengths_of([Row(value, ()) for value in values])
    edges, counts = lengths["edges"], lengths["counts"]
    assert sum(counts) == len(values) and len(edges) == len(counts) + 1
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        assert count == sum(low < max(value, 1) <= high for value in values)
    assert lengths["longest"] == max(values) and lengths["median"] in values


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return models.load_tokenizer(str(tiny_model), ModelSection(base=str(tiny_model)))


def test_tokens_are_those_of_the_rendered_conversation(tokenizer: Any) -> None:
    row = pair("What is rain?", "Water.", "I do not know that.")
    ((size,), records, refused) = sizes_of([row], tokenizer)
    prompt = "<|im_start|>user\nWhat is rain?<|im_end|>\n<|im_start|>assistant\n"
    texts = [prompt, "Water.<|im_end|>", "I do not know that.<|im_end|>"]
    assert size == Row(
        *(len(tokenizer(texts[0])["input_ids"]),), tuple(len(tokenizer(t)["input_ids"]) for t in texts[1:])
    )
    assert records == [row] and refused == 0


def test_rows_that_the_template_refuses_are_counted(tiny_model: Path) -> None:
    strict = models.load_tokenizer(str(tiny_model), ModelSection(base=str(tiny_model)))
    strict.chat_template = (
        "{% if messages | length > 2 %}{{ raise_exception('too many') }}{% endif %}" + strict.chat_template
    )
    long = demonstration("Hi", "Hello") | {"prompt": [*user_prompt("a"), *assistant_answer("b"), *user_prompt("c")]}
    sizes, measured, refused = sizes_of([demonstration("Hi", "Hello"), long], strict)
    assert len(sizes) == len(measured) == 1 and refused == 1


def test_limits_are_those_of_the_stages_there_are() -> None:
    config = config_of(stages=["label", "dpo", "compare"], dpo={"max_length": 20}, compare={"max_prompt_length": 9})
    sizes = [Row(10, (5, 9)), Row(10, (5, 10)), Row(3, (1, 1))]
    found = {limit["key"]: limit for limit in limits_of(config, "preferences", sizes)}
    assert set(found) == {"dpo.max_length", "compare.max_prompt_length"}
    assert (found["dpo.max_length"]["longer"], found["dpo.max_length"]["share"]) == (1, 0.3333)  # 10 + 10 + 1 > 20
    assert found["compare.max_prompt_length"]["longer"] == 2
    assert limits_of(config, "demonstrations", sizes)[0]["key"] == "compare.max_prompt_length"


# -- the whole --------------------------------------------------------------------------------------------------------

Make = Callable[..., tuple[Config, list[StepCount], dict[str, Path]]]


@pytest.fixture
def make(tmp_path: Path, tiny_model: Path) -> Make:
    def make(rows: int = 40, **sections: Any) -> tuple[Config, list[StepCount], dict[str, Path]]:
        base = [demonstration(row["prompt"], row["completion"], "test" if number % 5 == 0 else "train")
                for number, row in enumerate(demonstrations(rows))]  # fmt: skip
        pairs = [
            pair(row["prompt"][0]["content"], row["completion"][0]["content"], "No.", row["split"]) for row in base
        ]
        write_jsonl(tmp_path / "demonstrations.jsonl", base)
        write_jsonl(tmp_path / "preferences.jsonl", pairs)
        files = {key: tmp_path / f"{key}.jsonl" for key in ("demonstrations", "preferences")}
        raw = {"model": {"base": str(tiny_model)}, "data": {key: str(path) for key, path in files.items()}}
        counts = [
            StepCount("preferences", "preference", "read", rows + 5, rows + 2, Counter({"with an empty answer": 3})),
            StepCount("preferences", "preference", "exact duplicates", rows + 2, rows,
                      Counter({"that say the same as another": 2}), 0, [{"kept": "a", "left out": "A"}]),
        ]  # fmt: skip
        return config_of(**raw | sections), counts, files

    return make


def test_the_report_of_a_small_pipeline(make: Make, tokenizer: Any) -> None:
    config, counts, files = make(stages=["sft", "label", "dpo"])
    told = report.describe(config, counts, files, tokenizer)
    shown, pairs = told["files"]
    assert (shown["rows"], shown["train"], shown["test"], shown["sampled"]) == (40, 32, 8, 40)
    assert shown["steps"] == [] and [step["rows_out"] for step in pairs["steps"]] == [42, 40]
    assert pairs["pairs"] is not None and pairs["pairs"]["longer_share"] == 1.0
    assert shown["openings"][0] == {"name": "the answer about", "rows": 40, "share": 1.0}
    assert [limit["key"] for limit in shown["limits"]] == ["sft.max_length"]
    assert told["costs"]["missing"] == {}
    sft, dpo = told["costs"]["stages"]
    sizes = sizes_of([row for row in Tally.of(files["demonstrations"], "demonstration", 0).sample
                      if row["split"] == "train"], tokenizer)[0]  # fmt: skip
    assert sft["rows"] == 32 and sft["passes"] == 1 and sft["tokens"] == sum(size.total for size in sizes)
    assert dpo["rows"] == 32 and dpo["tokens"] > sft["tokens"]


def test_time_is_that_of_the_plan(make: Make, tokenizer: Any) -> None:
    """`align plan` reads the same files by itself."""
    config, counts, files = make(
        stages=["sft", "label", "reward", "dpo", "ppo"], sft={"num_train_epochs": 3}, dpo={"max_steps": 7}
    )
    planned = planning.plan(config, planning.machine_of(1, GPU))
    costs = {cost["stage"]: cost for cost in report.describe(config, counts, files, tokenizer)["costs"]["stages"]}
    assert {stage.stage for stage in planned.stages} == set(costs)
    for stage in planned.stages:
        assert costs[stage.stage]["seconds"] == pytest.approx(stage.seconds, rel=0.01, abs=0.001), stage.stage
    assert costs["sft"]["passes"] == 3 and costs["dpo"]["passes"] == 7 * 8 / 32


def test_without_a_tokenizer_characters_are_counted_and_no_costs(make: Make) -> None:
    config, counts, files = make(stages=["sft", "label", "dpo"])
    told = report.describe(config, counts, files, None)
    assert {file["unit"] for file in told["files"]} == {"characters"}
    assert told["costs"]["stages"] == [] and set(told["costs"]["missing"]) == {"sft", "dpo"}
    assert all(not file["limits"] for file in told["files"])


def test_the_same_again_gives_the_same_bytes(make: Make, tokenizer: Any, tmp_path: Path) -> None:
    config, counts, files = make(stages=["sft", "label", "dpo"])
    for name in ("one", "two"):
        report.write(tmp_path / name, report.describe(config, counts, files, tokenizer))
    for name in ("data_report.json", "data_report.html"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    told = json.loads((tmp_path / "one" / "data_report.json").read_text("utf-8"))
    assert told == report.describe(config, counts, files, tokenizer) and told["schema"] == 1


def test_a_report_of_another_schema_is_not_written(make: Make, tmp_path: Path) -> None:
    told = report.describe(*make(stages=["sft"]), None) | {"schema": 2}
    with pytest.raises(ValueError, match="schema 2"):
        report.write(tmp_path / "out", told)
    assert not (tmp_path / "out").exists()


def test_the_lines_that_are_said(make: Make) -> None:
    lines = report.sentences(report.describe(*make(stages=["sft"]), None))
    assert lines[:2] == [
        "demonstrations: 40 rows (32 train, 8 test) of 40 read",
        "preferences: 40 rows (32 train, 8 test) of 45 read",
    ]
    assert all("look at" in line for line in lines[2:]) and 0 < len(lines) - 2 <= MOST_LINES + 1


def test_the_lines_that_are_said_do_nothing_to_a_terminal() -> None:
    answers = [demonstration(str(number), "\x1b[2J\u202eGo away now") for number in range(40)]
    file = quiet_file(openings=_openings(answers))
    told = hostile_report() | {"look_at": findings.look_at(config_of(), [file]), "files": [file]}
    lines = report.sentences(told)
    assert any("\\x1b[2j" in line for line in lines) and all(line.isprintable() for line in lines)


@pytest.mark.parametrize(("text", "wanted"), [
    ("Sure,  I can help.", "sure, i can"), ("Yes", "yes"), ("", ""), ("水" * 200, "水" * 60), (" \n\t", ""),
])  # fmt: skip
def test_openings(text: str, wanted: str) -> None:
    assert opening_of(text) == wanted


def test_groups_are_the_largest_first_and_ties_by_name() -> None:
    counts = Counter({"b": 2, "a": 2, "c": 5, "d": 1})
    assert [group["name"] for group in groups_of(counts, 10, least=2)] == ["c", "a", "b"]
    assert groups_of(counts, 10)[0]["share"] == 0.5


# -- what to look at --------------------------------------------------------------------------------------------------


def quiet_file(**figures: Any) -> Any:
    """A file of which nothing is to be said."""
    base = {
        "key": "preferences", "kind": "preference", "rows": 1000, "train": 800, "test": 200, "augmented": 0,
        "steps": [], "sampled": 1000, "unit": "tokens", "lengths": [], "limits": [], "unrendered": 0, "sources": [],
        "languages": [{"name": "en", "rows": 960, "share": 0.96}, {"name": "fr", "rows": 40, "share": 0.04}],
        "openings": [{"name": "the answer is", "rows": 100, "share": 0.1}],
        "pairs": {"longer": 650, "shorter": 350, "equal": 0, "longer_share": 0.65, "labelled_again": 10, "agreeing": 9,
                  "agreement": 0.9},
    }  # fmt: skip
    return base | figures


def step(name: str, rows_in: int, **left_out: int) -> dict[str, Any]:
    left = {reason.replace("_", " "): rows for reason, rows in left_out.items()}
    return {"step": name, "rows_in": rows_in, "rows_out": rows_in - sum(left.values()), "left_out": left, "changed": 0,
            "examples": []}  # fmt: skip


def limit(share: float) -> list[dict[str, Any]]:
    return [{"key": "dpo.max_length", "of": "row", "limit": 1024, "longer": round(1000 * share), "share": share}]


def share_of_pairs(share: float, pairs: int = 1000) -> dict[str, Any]:
    longer = round(share * pairs)
    return quiet_file()["pairs"] | {"longer": longer, "shorter": pairs - longer, "longer_share": share}


LOUD = {
    "left out": ({"steps": [step("language", 1000, in_another_language=201)]}, "201 of 1,000 rows (20 %)"),
    "duplicates": ({"steps": [step("near duplicates", 1000, copies=101)]}, "repeat another"),
    "few held out": ({"test": 29}, "Only 29 rows are held out"),
    "few to train on": ({"train": 99}, "Only 99 rows are left"),
    "refused": ({"unrendered": 1}, "refuses 1 of 1,000"),
    "too long": ({"limits": limit(0.051)}, "5 % of the sampled rows are longer than dpo.max_length = 1,024"),
    "longer": ({"pairs": share_of_pairs(0.66)}, "longer one in 66 %"),
    "shorter": ({"pairs": share_of_pairs(0.2)}, "shorter one in 80 %"),
    "both ways": ({"pairs": quiet_file()["pairs"] | {"agreeing": 8, "agreement": 0.8}}, "2 of 10 pairs"),
    "opening": ({"openings": [{"name": "i'm sorry, but", "rows": 101, "share": 0.101}]}, "with “i'm sorry, but”"),
    "languages": ({"languages": [{"name": "en", "rows": 940, "share": 0.94},
                                 {"name": "fr", "rows": 60, "share": 0.06}]},
                  "Most sampled rows are in en, but 6 % are not (fr 60)"),
    "one source": ({"sources": [{"name": "a", "rows": 950, "share": 0.95}, {"name": "b", "rows": 50, "share": 0.05}]},
                   "95 % of the rows come from a"),
    "made up": ({"augmented": 501}, "50 % of the rows were made"),
}  # fmt: skip
QUIET = {
    "nothing": {},
    "at the threshold": {"steps": [step("language", 1000, far=200), step("near duplicates", 800, copies=100)]},
    "asked for": {"steps": [step("mixture", 1000, over=900)]},
    "one source alone": {"sources": [{"name": "a", "rows": 1000, "share": 1.0}]},
    "few pairs": {"pairs": share_of_pairs(1.0, 29)},
    "long": {"limits": limit(0.05)},
    "few answers": {"sampled": 29, "openings": [{"name": "a b c", "rows": 29, "share": 1.0}]},
    "short texts": {"languages": [{"name": "hard to tell", "rows": 990, "share": 0.99},
                                  {"name": "en", "rows": 10, "share": 0.01}]},
    "held out": {"test": 30, "train": 100, "augmented": 500},
}  # fmt: skip


@pytest.mark.parametrize("name", LOUD)
def test_what_passes_a_threshold_is_told_once(name: str) -> None:
    figures, wanted = LOUD[name]
    (look,) = findings.look_at(config_of(), [quiet_file(**figures)])
    assert wanted in look["what"] and look["threshold"] and look["file"] == "preferences"


@pytest.mark.parametrize("name", QUIET)
def test_what_is_within_all_thresholds_is_not(name: str) -> None:
    assert findings.look_at(config_of(), [quiet_file(**QUIET[name])]) == []


def test_preferences_that_are_missing_are_told() -> None:
    (look,) = findings.look_at(config_of(), [])
    assert "no preferences" in look["what"]


def test_every_threshold_is_documented() -> None:
    page = (Path(__file__).parents[4] / "docs" / "inspect.md").read_text("utf-8")
    constants = {name: value for name, value in vars(findings).items() if name.startswith(("MOST_", "LEAST_"))}
    assert len(constants) == 12
    for name, value in constants.items():
        assert f"| `{name}` | {value} |" in page, name


# -- the page ---------------------------------------------------------------------------------------------------------


class Reading(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.handlers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on") or name in ("src", "action")]


def hostile_report() -> report.Told:
    group = [{"name": NASTY, "rows": 3, "share": 0.5}]
    examples = [{"kept": NASTY, "left out": NASTY}, {"before": NASTY, "after": NASTY}, {"reason": NASTY, "text": NASTY}]
    changed = step("normalise", 1000, **{NASTY: 300}) | {"examples": examples, "changed": 2}
    lengths = [{"of": of, "n": 1000, "mean": 9.0, "median": 9, "p95": 30, "longest": 33, "edges": [0, 16, 32, 64],
                "counts": [500, 499, 1]} for of in ("prompt", "answer", "row")]  # fmt: skip
    file = quiet_file(
        sources=group, languages=group, openings=group, steps=[changed], lengths=lengths, limits=limit(0.2)
    )
    costs = [{"stage": "dpo", "rows": 800, "tokens_a_row": 44.0, "passes": 1.0, "tokens": 35_200, "seconds": 12.0}]
    return report.Told(
        schema=1,
        pipeline=NASTY,
        seed=0,
        look_at=[{"file": "preferences", "what": NASTY, "threshold": NASTY}, *findings.look_at(config_of(), [file])],
        files=[file],
        costs={"machine": "one", "rate": NASTY, "stages": costs, "missing": {NASTY: NASTY}},
    )


def test_what_strangers_wrote_is_inert_on_the_page() -> None:
    page = render_html(hostile_report())
    reading = Reading()
    reading.feed(page)
    assert not reading.tags & {"script", "img", "iframe", "object", "embed", "form"} and reading.handlers == []
    assert "&lt;script&gt;alert(1)" in page and "{{ 7 * 7 }}" in page
    assert "://" not in page.replace("http://www.w3.org", "")
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", page) and "\\u202e" in page


def test_a_report_without_rows_is_a_page_too() -> None:
    told = report.Told(schema=1, pipeline="empty", seed=0, look_at=[], files=[],
                       costs={"machine": "one", "rate": "", "stages": [], "missing": {}})  # fmt: skip
    assert "Nothing stands out." in render_html(told)


def test_a_large_file_is_sampled_and_said_so(tmp_path: Path) -> None:
    rows = random.Random(0)
    made = [demonstration(f"{number} {rows.random()}", "x " * 5) for number in range(2_200)]
    write_jsonl(tmp_path / "demonstrations.jsonl", made)
    told = report.describe(config_of(stages=["sft"]), [], {"demonstrations": tmp_path / "demonstrations.jsonl"}, None)
    assert told["files"][0]["sampled"] == SAMPLED < told["files"][0]["rows"] == 2_200
    assert "2,000 demonstrations, drawn by the seed" in render_html(told)


def test_the_report_loads_no_model_library_before_it_is_asked() -> None:
    script = (
        "import align.data.report, sys; print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
