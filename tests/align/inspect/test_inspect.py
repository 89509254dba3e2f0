"""What is shown is what is trained: held against the rows, labels and batches of the trainers of real stages."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from align import training
from align.config import Config
from align.inspect.command import first_stage, inspect
from align.inspect.page import render_html
from align.inspect.rows import packed_places
from align.inspect.stages import Seen, seen
from align.inspect.terminal import as_text
from align.inspect.tokens import Part, Row, Token
from align.models import load_tokenizer
from align.pipeline import run_stage
from align.reward_model import preference_rows
from align.runs import Run
from reward.records import InputError, read_jsonl, write_jsonl
from tests.conftest import demonstrations
from tests.reward.encoders import make_tiny_bert

NASTY = "<script>alert(1)</script> \x1b[31mred\x1b[0m \x07\u202e\r\n{{ 7 * 7 }} </style> <|im_end|>"
SMALL: dict[str, Any] = {"max_steps": 1, "per_device_train_batch_size": 2, "adapter": {"r": 2}}

Make = Callable[..., Config]


class Trained(Exception):
    """Enough is known."""


@pytest.fixture(scope="module")
def make(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    def make(rows: list[dict[str, Any]] | None = None, **sections: Any) -> Config:
        folder = tmp_path_factory.mktemp("inspect")
        rows = rows or [
            {**row, "completion": row["completion"] + " Very" * (n % 7)} for n, row in enumerate(demonstrations())
        ]
        write_jsonl(folder / "d.jsonl", rows)
        pairs = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": f"No. {n}"} for n, r in enumerate(rows)]
        write_jsonl(folder / "p.jsonl", pairs)
        raw: dict[str, Any] = {
            "name": "test",
            "runs": str(folder / "runs"),
            "stages": ["label", "reward", "dpo"],
            "model": {"base": str(tiny_model), "dtype": "float32"},
            "data": {"demonstrations": str(folder / "d.jsonl"), "preferences": str(folder / "p.jsonl")},
            "label": {"source": "dataset"},
            "sft": SMALL, "reward": SMALL, "dpo": SMALL,
        }  # fmt: skip
        return Config.model_validate(raw | sections)

    return make


@pytest.fixture(scope="module")
def labelled(make: Make) -> Config:
    config = make()
    run_stage(config, "label")
    return config


@contextmanager
def the_trainer_of(config: Config, stage: str) -> Iterator[Any]:
    """The trainer that a stage has built, when it is about to train."""
    found, real = [], training.train

    def stop(trainer: Any, run: Run) -> Any:
        found.append(trainer)
        raise Trained

    training.train = stop
    try:
        with pytest.raises(Trained):
            run_stage(config, stage)
        yield found[0]
    finally:
        training.train = real


def ids(part: Part) -> list[int]:
    return [token.id for token in part.tokens]


def losses(*parts: Part) -> list[bool]:
    return [token.role == "loss" for part in parts for token in part.tokens]


def text(part: Part) -> str:
    return "".join(token.text for token in part.tokens)


# -- against the stages -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_sft_shows_the_tokens_labels_and_packed_rows_of_its_trainer(make: Make, strategy: str) -> None:
    config = make(stages=["sft"], sft={**SMALL, "max_length": 160, "packing_strategy": strategy})
    found = seen(config, "sft", 12)
    with the_trainer_of(config, "sft") as trainer:
        packed = trainer.train_dataset
        for row in found.rows:
            places = [[int(number) for number in re.findall(r"\d+", place)] for place in row.note.split("; ")]
            there = [packed[number - 1] for number, *_ in places]
            spans = [slice(start - 1, end) for _, start, end, *_ in places]
            tokens, labels = (
                [token for each, span in zip(there, spans, strict=True) for token in each[name][span]]
                for name in ("input_ids", "labels")
            )
            assert tokens == ids(row.parts[0]) + ids(row.parts[1])
            assert [label != -100 for label in labels] == losses(*row.parts)
            assert [size for _, _, _, size, _ in places] == [len(each["input_ids"]) for each in there]
            assert strategy == "wrapped" or len(tokens) in there[0]["seq_lengths"]
        assert len({row.note for row in found.rows}) == 12 and len(packed) < 30
        # TRL's collator takes the labels as they are, but for the first of a packed row, which nothing predicts
        batch = trainer.data_collator([packed[0]])
        assert batch["input_ids"].flatten().tolist() == packed[0]["input_ids"]
        assert batch["labels"].flatten().tolist()[1:] == packed[0]["labels"][1:]


def test_where_a_row_is_packed_is_told_of_those_that_are_packed_together(make: Make) -> None:
    config = make(stages=["sft"], sft={**SMALL, "max_length": 12})
    notes = packed_places(config, [{"input_ids": [1, 2, 3]}] * 1_003)
    assert len(notes) == 1_003 and notes[1_000:] == [""] * 3
    assert notes[0] == "packed row 1, tokens 1 to 3 of 12, shared by 4" and len(set(notes)) == 1_001


@pytest.mark.parametrize("keys", [{"packing": False}, {"shuffle_dataset": True}], ids=str)
def test_sft_where_no_place_is_known_before_training(make: Make, keys: dict[str, Any]) -> None:
    config = make(stages=["sft"], sft={**SMALL, "max_length": 160, **keys})
    found = seen(config, "sft", 2)
    assert all("packed" in row.note and "packed row" not in row.note for row in found.rows)
    with the_trainer_of(config, "sft") as trainer:
        rows = [row["input_ids"] for row in trainer.train_dataset]
    shown = ids(found.rows[0].parts[0]) + ids(found.rows[0].parts[1])
    assert any(shown == row or str(shown)[1:-1] in str(row) for row in rows)


def test_dpo_shows_the_batch_of_its_trainer(labelled: Config) -> None:
    found = seen(labelled, "dpo", 5)
    with the_trainer_of(labelled, "dpo") as trainer:
        rows = trainer.train_dataset
        for number, row in enumerate(found.rows):
            batch = trainer.data_collator([rows[number]])
            prompt, *answers = row.parts
            for side, answer in enumerate(answers):
                there = batch["attention_mask"][side].bool()
                assert batch["input_ids"][side][there].tolist() == ids(prompt) + ids(answer)
                assert batch["completion_mask"][side][there].bool().tolist() == losses(prompt, answer)
    prompt, chosen, _ = found.rows[0].parts
    assert text(prompt).startswith("<|im_start|>user\n") and text(prompt).endswith("<|im_start|>assistant\n")
    assert prompt.trained == 0 and chosen.trained == len(chosen.tokens)


def test_dpo_says_what_its_template_writes_behind_the_stop_token(labelled: Config) -> None:
    """TRL renders the conversation by itself: the line break of ChatML is trained on."""
    chosen = seen(labelled, "dpo", 1).rows[0].parts[1]
    assert [token.text for token in chosen.tokens[-2:]] == ["<|im_end|>", "\n"] and chosen.tokens[-1].role == "loss"
    assert "the stop token <|im_end|>, and 1 behind it with loss" in chosen.counts


def test_reward_shows_the_rows_of_its_trainer_and_where_the_score_is_read(labelled: Config) -> None:
    found = seen(labelled, "reward", 5)
    with the_trainer_of(labelled, "reward") as trainer:
        for number, row in enumerate(found.rows):
            prompt, *answers = row.parts
            for side, answer in zip(("chosen_ids", "rejected_ids"), answers, strict=True):
                assert trainer.train_dataset[number][side] == ids(prompt) + ids(answer)
                assert [token.role for token in answer.tokens] == ["context"] * (len(answer.tokens) - 1) + ["score"]
                assert answer.tokens[-1].text == "<|im_end|>"
            assert not any(losses(*row.parts))


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_a_reward_model_on_another_base_shows_its_own_tokens(
    labelled: Config, tiny_model: Path, tmp_path: Path, kind: str
) -> None:
    base = make_tiny_bert(tmp_path / "bert") if kind == "encoder" else tiny_model
    own = {"base": str(base), "max_length": 64, "adapter": None}
    config = labelled.model_copy(update={"runs": str(tmp_path), "reward": labelled.reward.model_copy(update=own)})
    shutil.copytree(labelled.folder("label"), config.folder("label"))
    found = seen(config, "reward", 3)
    assert ("from the whole row" in found.trained) == (kind == "encoder")
    with the_trainer_of(config, "reward") as trainer:
        for number, row in enumerate(found.rows):
            prompt, *answers = row.parts
            there = trainer.train_dataset[number]
            rows = there.get("answers") or [there["chosen_ids"], there["rejected_ids"]]
            assert rows == [ids(prompt) + ids(answer) for answer in answers]
            if kind == "encoder":
                assert text(prompt).startswith("[CLS]") and there["prompt_sizes"] == [len(prompt.tokens)] * 2
            scored = [token.role == "score" for answer in answers for token in answer.tokens]
            assert sum(scored) == (0 if kind == "encoder" else 2)


def test_a_reward_model_with_ties_says_so(labelled: Config) -> None:
    config = labelled.model_copy(update={"reward": labelled.reward.model_copy(update={"ties": "davidson"})})
    assert "Tied pairs" in seen(config, "reward", 1).trained and "Tied" not in seen(labelled, "reward", 1).trained


@pytest.mark.parametrize("stage", ["ppo", "sample"])
def test_prompts_end_where_the_answer_begins(make: Make, stage: str) -> None:
    config = make(stages=["sample", "label", "reward", "ppo"], label={"source": "simulated"})
    config.data.preferences = None
    found = seen(config, stage, 3)
    assert len(found.rows) == 3 and 3 < len(seen(config, stage, 100).rows) < 40
    for row in found.rows:
        (prompt,) = row.parts
        question = demonstrations()[int(row.title.split()[1]) - 1]["prompt"]
        assert text(prompt) == f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        assert not any(losses(prompt))


def test_rows_that_are_too_long_are_passed_over_as_the_stage_leaves_them_out(labelled: Config) -> None:
    sizes = []
    for limit in (40, 44, 48):
        config = labelled.model_copy(update={"dpo": labelled.dpo.model_copy(update={"max_length": limit})})
        tokenizer = load_tokenizer(config.model.base, config.model)
        train, _, _ = preference_rows(config, Run("dpo", config.folder("dpo"), {}, writer=False), tokenizer, limit)
        found = seen(config, "dpo", 1000)
        assert [ids(row.parts[0]) for row in found.rows] == [row["prompt_ids"] for row in train]
        sizes.append(found.too_long)
    assert sizes[0] > sizes[-1]


def test_rows_passed_over_are_those_before_the_last_one_shown(make: Make) -> None:
    rows = [
        {**row, "completion": "So it is. " * (9 if n in (0, 3, 30) else 1)} for n, row in enumerate(demonstrations())
    ]
    config = make(rows=[{**row, "split": "train"} for row in rows], stages=["sft"], sft={**SMALL, "max_length": 60})
    assert [(row.title, seen(config, "sft", n).too_long) for n, row in enumerate(seen(config, "sft", 4).rows, 1)] == [
        ("demonstration 2", 1), ("demonstration 3", 1), ("demonstration 5", 2), ("demonstration 6", 2),
    ]  # fmt: skip


def test_the_test_side_is_never_shown(labelled: Config) -> None:
    rows = read_jsonl(labelled.folder("label") / "preferences.jsonl")
    found = seen(labelled, "dpo", 1000)
    shown = {int(row.title.split()[1]) for row in found.rows}
    assert shown == {number for number, row in enumerate(rows, start=1) if row["split"] == "train"}


# -- the command ------------------------------------------------------------------------------------------------------


def said(config: Config, *args: Any) -> str:
    lines: list[str] = []
    inspect(config, *args, say=lines.append)
    return "\n".join(lines)


def test_plain_text_tells_what_carries_loss_without_colours(make: Make) -> None:
    told = said(make(stages=["sft"]), None, 1)
    assert told.startswith("sft of test: the first row of the train side")
    lines = [line for line in told.splitlines() if " | " in line]
    answer = [line for line in lines if line.lstrip().startswith("loss | ")]
    assert answer and answer[-1].endswith("<|im_end|>") and len(answer) < len(lines)
    assert not any("<|im_start|>" in line for line in answer)
    assert "\x1b" not in told


def test_colours_say_nothing_that_the_plain_text_does_not(labelled: Config) -> None:
    found = seen(labelled, "dpo", 2)
    plain, coloured = as_text(found, 80), as_text(found, 80, colour=True)
    assert coloured != plain and re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain
    assert all(len(line) <= 80 for line in plain.splitlines()[1:])


def test_the_same_rows_again(labelled: Config) -> None:
    assert said(labelled, "dpo", 3) == said(labelled, "dpo", 3)
    assert render_html(seen(labelled, "dpo", 3)) == render_html(seen(labelled, "dpo", 3))
    three = [row.title for row in seen(labelled, "dpo", 3).rows]
    assert three == [row.title for row in seen(labelled, "dpo", 7).rows[:3]]


def test_a_page_is_written(labelled: Config, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert str(page) in said(labelled, "dpo", 2, page)
    assert page.read_text("utf-8") == render_html(seen(labelled, "dpo", 2))
    with pytest.raises(InputError, match="--html"):
        said(labelled, "dpo", 2, tmp_path / "nowhere" / "page.html")


class Reading(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not any(name.startswith("on") or name in ("src", "href") for name, _ in attrs)


def hostile() -> Seen:
    parts = (
        Part("prompt", (Token(1, NASTY, "context", True), Token(2, "", "context")), "shared"),
        Part("chosen", (Token(3, "\n", "loss"), Token(4, NASTY, "loss"), Token(5, "x", "score")), "no stop token"),
    )
    return Seen("p", "dpo", "/tmp/a b.jsonl", "The answer.", (Row("pair 1 (\\x1b)", parts, "packed"),), 2, "x=1 tokens")


def test_hostile_texts_are_inert_everywhere() -> None:
    plain, coloured, page = as_text(hostile()), as_text(hostile(), colour=True), render_html(hostile())
    assert all(line.isprintable() for line in plain.split("\n"))
    assert all(line.isprintable() for line in re.sub(r"\x1b\[[0-9;]*m", "", coloured).split("\n"))
    assert "\\x1b[31mred\\x1b[0m␣\\x07\\u202e\\r\\n" in plain
    reading = Reading()
    reading.feed(page)
    assert not reading.tags & {"script", "img", "a", "iframe", "form", "link"}
    assert "&lt;script&gt;" in page and "{{␣7␣*␣7␣}}" in page and "://" not in page
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", page)


def test_hostile_data_go_all_the_way(make: Make) -> None:
    rows = [{"prompt": f"{NASTY} {number}", "completion": NASTY} for number in range(20)]
    told = said(make(rows=rows, stages=["sft"]), "sft", 2)
    assert all(line.isprintable() for line in told.split("\n")) and "\\x1b" in told


def test_the_first_stage_that_trains(make: Make) -> None:
    assert first_stage(make(stages=["label", "dpo", "reward"])) == "reward"
    assert first_stage(make(stages=["sample"], label={"source": "simulated"})) == "sample"
    with pytest.raises(InputError, match="none of them reads tokens"):
        first_stage(make(stages=["label"]))


@pytest.mark.parametrize(
    ("stage", "n", "sentence"),
    [
        ("dpo", 3, "3-label does not exist: run `align label CONFIG` first"),
        ("reward", 3, "3-label does not exist: run `align label CONFIG` first"),
        ("label", 3, "`label` reads no training rows; give one of sft, sample, reward, dpo, ppo"),
        ("nonsense", 3, "`nonsense` reads no training rows"),
        ("dpo", 0, "`--n 0` is no number of rows"),
    ],
)
def test_what_is_not_there_is_said_with_the_command_to_run(make: Make, stage: str, n: int, sentence: str) -> None:
    with pytest.raises(InputError, match=re.escape(sentence)):
        said(make(), stage, n)


def test_without_demonstrations_or_anything_that_fits(make: Make) -> None:
    config = make(stages=["sft"], sft={**SMALL, "max_length": 3})
    with pytest.raises(InputError, match=r"longer than sft\.max_length=3"):
        said(config)
    config.data.demonstrations = None
    with pytest.raises(InputError, match=r"sft needs data\.demonstrations"):
        said(config)


def test_a_pipeline_that_prepares_has_to_be_prepared_first(make: Make) -> None:
    with pytest.raises(InputError, match=r"0-prepare does not exist: run `align data prepare CONFIG` first"):
        said(make(stages=["sft"], prepare={}), "sft")
