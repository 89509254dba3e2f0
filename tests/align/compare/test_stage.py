"""The compare stage on models from anywhere: run folders, plain folders, files of answers, every kind of judge."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.compare import people
from align.compare.places import free_comparison
from align.config import Config
from align.config_file import load_config
from align.pipeline import run_stage, stage_inputs
from align.runs import read_info
from labeling_ui.project import Judgement
from labeling_ui.store import LabelStore
from reward.records import InputError, read_jsonl
from tests.conftest import CHATML, make_tiny_model, write_jsonl

SFT = """
name: {name}
runs: {runs}
model: {{base: {model}, dtype: float32}}
data: {{demonstrations: {demonstrations}, test_share: 0.3}}
stages: [sft]
sft: {{max_steps: 2, per_device_train_batch_size: 2, max_length: 128, learning_rate: 1.0e-2, save_steps: 5}}
"""
# A reward function for tests: `package.module:function`, as a user writes one.
WORDS = """
def longest(prompts, completions, **columns):
    return [float(len(c[0]["content"])) for c in completions]

def only_some(prompts, completions, **columns):
    return [None if i % 2 else 1.0 for i, c in enumerate(completions)]
"""


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's tokenizer with other weights."""
    folder = make_tiny_model(tmp_path_factory.mktemp("other") / "other")
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"What is the use of salt? ({i})"} for i in range(12)])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "wordy_rewards.py").write_text(WORDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def compare(*given: str) -> dict[str, Any]:
    config = free_comparison([*given, "compare.max_new_tokens=8"])
    run_stage(config, "compare")
    report: dict[str, Any] = json.loads((config.folder("compare") / "report.json").read_text())
    return report


def test_two_folders(tiny_model: Path, other_model: Path, prompts: Path, here: Path) -> None:
    given = (str(tiny_model), str(other_model), f"data.prompts={prompts}", "compare.judges=[wordy_rewards:longest]")
    report = compare(*given)
    base, other = report["models"]
    assert report["pipeline"] == "other-against-model" and report["prompts"] == {
        **report["prompts"], "n": 12, "split": "all",
    }  # fmt: skip
    assert report["judges"][0]["name"] == "held-out check longest" and report["judges"][0]["independent"]
    assert other["win_rate"]["held-out check longest"]["n"] == 12
    # The first model is the reference: KL of the other is exact and above zero, its own is not defined.
    assert base["kl"] is None and other["kl"]["mean"] > 0 and report["reference"] == base["name"]
    assert 0 < other["kl_per_token"]["mean"] < other["kl"]["mean"] or other["length"]["mean"] == 1
    assert base["entropy"]["mean"] > 0 and base["text"]["references"] == 0
    assert any("What other was trained on is not known" in notice for notice in report["notices"])
    assert any("only 12 prompts" in notice for notice in report["notices"])
    # The outcomes of the examples are those of the scores.
    for example in report["examples"]:
        first, second = example["answers"]
        judge = "held-out check longest"
        mine, theirs = second["scores"][judge], first["scores"][judge]
        assert second["outcomes"][judge] == (0.5 if mine == theirs else float(mine > theirs))
    lost = [example["answers"][1]["outcomes"]["held-out check longest"] == 0 for example in report["examples"]]
    assert lost == sorted(lost, reverse=True), "regressions come first"


def test_the_same_inputs_give_the_same_bytes(tiny_model: Path, other_model: Path, prompts: Path, here: Path) -> None:
    given = (str(tiny_model), str(other_model), f"data.prompts={prompts}", "compare.judges=[wordy_rewards:longest]")
    compare(*given)
    folder = free_comparison(given).folder("compare")
    before = {name: (folder / name).read_bytes() for name in ("report.json", "report.html", "model_card.md")}
    shutil.rmtree(folder)
    compare(*given)
    assert before == {name: (folder / name).read_bytes() for name in before}


def test_a_model_against_itself_is_no_different(tiny_model: Path, prompts: Path, here: Path, tmp_path: Path) -> None:
    twin = tmp_path / "twin"
    shutil.copytree(tiny_model, twin)
    report = compare(str(tiny_model), str(twin), f"data.prompts={prompts}", "compare.judges=[wordy_rewards:longest]")
    assert "found no difference between twin and model" in report["verdict"][0]
    assert report["models"][1]["kl"]["mean"] == pytest.approx(0, abs=1e-6)
    win = report["models"][1]["win_rate"]["held-out check longest"]
    assert (win["ties"], win["p"]) == (12, 1.0), "same seed, same model, same answers"


def test_a_file_of_answers(tiny_model: Path, prompts: Path, here: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": row["prompt"], "completion": "A long and thoughtful answer. " * 3} for row in read_jsonl(prompts)
    ]
    answers = write_jsonl(tmp_path / "theirs.jsonl", rows[:10])
    report = compare(str(tiny_model), str(answers), f"data.prompts={prompts}", "compare.judges=[wordy_rewards:longest]")
    theirs = report["models"][1]
    assert report["prompts"]["n"] == 10 and report["length_unit"] == "characters"
    assert theirs["win_rate"]["held-out check longest"]["wins"] == 10
    assert theirs["kl"] is None and theirs["finished"] is None and theirs["perplexity"] is None
    dropped = read_jsonl(free_comparison([str(tiny_model), str(answers), f"data.prompts={prompts}"]).folder("compare")
                         / "dropped.jsonl")  # fmt: skip
    assert [row["reason"] for row in dropped] == [f"without an answer in {answers}"] * 2


def test_empty_answers_are_counted_and_said(tiny_model: Path, prompts: Path, here: Path, tmp_path: Path) -> None:
    rows = [{"prompt": row["prompt"], "completion": ""} for row in read_jsonl(prompts)]
    rows[0]["completion"] = "Salt keeps food."
    some = write_jsonl(tmp_path / "some.jsonl", rows)
    none = write_jsonl(tmp_path / "none.jsonl", [{**row, "completion": " "} for row in rows])
    report = compare(str(some), str(none), f"data.prompts={prompts}", "compare.judges=[wordy_rewards:longest]")
    assert "11 of 12 answers of some are empty." in report["notices"]
    assert "Every answer of none is empty." in report["notices"]
    assert [model["text"]["empty"]["rate"] for model in report["models"]] == [11 / 12, 1.0]
    win = report["models"][1]["win_rate"]["held-out check longest"]
    assert (win["ties"], win["losses"]) == (11, 1) and report["reference"] is None


def test_another_tokenizer_and_another_template(tiny_model: Path, prompts: Path, here: Path, tmp_path: Path) -> None:
    other = tmp_path / "wide"
    shutil.copytree(tiny_model, other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(other)
    model = AutoModelForCausalLM.from_pretrained(other)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(other)
    spoken = tmp_path / "spoken"
    shutil.copytree(tiny_model, spoken)
    (spoken / "chat_template.jinja").write_text(CHATML.replace("assistant\n", "assistant says\n"))
    report = compare(
        str(tiny_model), str(other), str(spoken), f"data.prompts={prompts}",
        "compare.judges=[wordy_rewards:longest]",
    )  # fmt: skip
    assert any(n.startswith("wide has another tokenizer than model") for n in report["notices"])
    assert any(n.startswith("spoken has another chat template than model") for n in report["notices"])
    assert report["length_unit"] == "characters"
    assert [model["kl"] is None for model in report["models"]] == [True, True, False]
    assert report["models"][0]["ability"]["strength"] == 0 and "ability" in report["models"][2]


def test_prompts_a_run_was_trained_on_are_left_out(
    tiny_model: Path, tiny_demonstrations: Path, here: Path, tmp_path: Path
) -> None:
    path = tmp_path / "one.yaml"
    path.write_text(
        SFT.format(name="one", runs=tmp_path / "runs", model=tiny_model, demonstrations=tiny_demonstrations)
    )
    config = load_config(path)
    run_stage(config, "sft")
    split = {row["prompt_id"]: row["split"] for row in _demonstrations(config)}
    run = str(config.folder("sft"))
    asked = f"data.prompts={tiny_demonstrations}"
    report = compare(str(tiny_model), run, asked, "compare.judges=[wordy_rewards:longest]")
    trained = sum(side == "train" for side in split.values())
    assert report["prompts"]["seen"] == {"one/sft": trained}
    assert report["prompts"]["n"] == len(split) - trained
    assert [step["stage"] for step in report["lineage"]] == ["sft"]
    compared = free_comparison([str(tiny_model), run, asked]).folder("compare")
    info = read_info(compared)
    assert info is not None and run in info["parents"]
    assert all(split[row["prompt_id"]] == "test" for row in read_jsonl(compared / "answers.jsonl"))
    only_seen = write_jsonl(
        tmp_path / "seen.jsonl",
        [row for row in read_jsonl(tiny_demonstrations) if split[_id(row["prompt"])] == "train"],
    )
    with pytest.raises(InputError, match=r"no prompt is left.*in the training data of one/sft"):
        compare(str(tiny_model), run, f"data.prompts={only_seen}", "compare.judges=[wordy_rewards:longest]",
                "name=seen")  # fmt: skip


def _id(text: str) -> str:
    from reward.records import prompt_id, user_prompt

    return prompt_id(user_prompt(text))


def _demonstrations(config: Config) -> list[dict[str, Any]]:
    from align.data.load import load_demonstrations

    loaded = load_demonstrations(str(config.data.demonstrations), config.data.test_share)
    return [{**record, "prompt_id": _id(record["prompt"][-1]["content"])} for record in loaded.records]


def test_people_judge_blind_and_the_judges_agreement_with_them_is_told(
    tiny_model: Path, other_model: Path, prompts: Path, here: Path
) -> None:
    given = [
        str(tiny_model), str(other_model), f"data.prompts={prompts}", "compare.judges=[people, wordy_rewards:longest]",
        "label.source=people", "label.labels_per_item=3",
    ]  # fmt: skip
    config = free_comparison([*given, "compare.max_new_tokens=8"])
    with pytest.raises(InputError, match=r"nobody has voted on the blind pairs of project other-against-model-compare"):
        run_stage(free_comparison([*given, "compare.max_new_tokens=8", "label.finish=true"]), "compare")
    # Three people who prefer the longer answer vote, in this process, through the store that the app writes to.
    with LabelStore(people.store_address(config)) as store:
        project = store.project(people.project_name(config))
        items = store.items(project)
        assert all({a["model"] for a in item.payload["answers"]} == {"model", "other"} for item in items)
        vote_for_longer(store, project, items)
    run_stage(config, "compare")
    report = json.loads((config.folder("compare") / "report.json").read_text())
    by_people = report["models"][1]["win_rate"]["people"]
    by_length = report["models"][1]["win_rate"]["held-out check longest"]
    assert (by_people["wins"], by_people["losses"]) == (by_length["wins"], by_length["losses"])
    agreement = report["judges"][1]["agreement"]
    assert agreement["share"]["rate"] == 1 and agreement["share"]["n"] == by_people["wins"] + by_people["losses"]


def vote_for_longer(store: LabelStore, project: Any, items: list[Any]) -> None:
    for person in ("ann", "bob", "cy"):
        for item in items:
            first, second = (len(answer["text"]) for answer in item.payload["answers"])
            value = 4 if first == second else (1 if first > second else 7)
            said: Judgement = {
                "item_id": item.id,
                "annotator": person,
                "key": f"{person}-{item.id}",
                "order": [*item.answers],
                "value": value,
            }
            store.record(project, said)


def test_a_judge_that_does_not_apply_everywhere(tiny_model: Path, other_model: Path, prompts: Path, here: Path) -> None:
    report = compare(
        str(tiny_model), str(other_model), f"data.prompts={prompts}", "compare.judges=[wordy_rewards:only_some]"
    )
    win = report["models"][1]["win_rate"]["held-out check only_some"]
    assert (win["n"], win["unjudged"], win["ties"]) == (6, 6, 6)
    assert report["models"][1]["scores"] == {}, "a mean over half the prompts would be another figure"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["compare.judges=[reward]"], "names reward, but the stages have no reward model"),
        (["compare.judges=[simulated]"], "no label of this pipeline is simulated"),
        ([], "compare has no judge"),
        (["compare.judges=[llm]"], "say which model it is with compare.llm.model"),
        (["compare.judges=[/nowhere/model]"], "is no judge: give simulated, reward, llm, people"),
        (["compare.judges=[wordy_rewards:missing]"], "there is no `missing` in wordy_rewards"),
        (["compare.judges=[people, people]"], "name each judge once"),
        (["compare.judges=[wordy_rewards:longest]", "compare.models=[base, dpo]"], "names dpo, but the stages are"),
    ],
)
def test_what_cannot_be_judged_is_refused(
    change: list[str], sentence: str, tiny_model: Path, other_model: Path, prompts: Path, here: Path
) -> None:
    config = free_comparison([str(tiny_model), str(other_model), f"data.prompts={prompts}", *change])
    with pytest.raises(InputError, match="(?s)" + sentence.replace("(", r"\(")):
        run_stage(config, "compare")
    assert not (config.folder("compare") / "DONE").exists()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["only-one", "data.prompts=x.jsonl"], "compare has 1 model .only-one., and at least 2 are wanted"),
        (["{model}", "{other}"], "compare needs prompts: add data.prompts=FILE"),
        (["{model}", "./nothing", "data.prompts={prompts}", "compare.judges=[people]"], "nothing does not exist"),
        (
            ["{model}", "{empty}", "data.prompts={prompts}", "compare.judges=[people]"],
            "is neither a stage's run folder",
        ),
        (["{model}", "{model}", "data.prompts={prompts}", "compare.judges=[people]"], "two different models"),
        (["{model}", "{other}", "data.prompts={prompts}", "compare.jugdes=[people]"], "did you mean `judges`"),
    ],
)
def test_bad_commands(
    given: list[str], sentence: str, tiny_model: Path, other_model: Path, prompts: Path, here: Path
) -> None:
    (here / "empty").mkdir()
    places = {"model": tiny_model, "other": other_model, "prompts": prompts, "empty": here / "empty"}
    with pytest.raises(InputError, match=sentence):
        run_stage(free_comparison([each.format(**places) for each in given]), "compare")


def test_what_is_compared_is_an_input(tiny_model: Path, other_model: Path, prompts: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(other_model, moved)
    given = [str(tiny_model), str(moved), f"data.prompts={prompts}", "compare.judges=[people]"]
    before = stage_inputs(free_comparison(given), "compare")
    model = AutoModelForCausalLM.from_pretrained(moved)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(moved)
    after = stage_inputs(free_comparison(given), "compare")
    assert {key for key in before if before[key] != after[key]} == {f"file {moved / 'model.safetensors'}"}


def test_an_interrupted_comparison_goes_on(
    tiny_model: Path, other_model: Path, prompts: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after the first model's answers: they are not generated again, and the report is the same."""
    from align.compare import contestants

    given = (str(tiny_model), str(other_model), f"data.prompts={prompts}", "compare.judges=[wordy_rewards:longest]")
    whole = compare(*given)
    shutil.rmtree(free_comparison(given).folder("compare"))
    loaded: list[str] = []
    load, stopping = contestants.models.load_policy, threading.Event()

    def watched(path: str, section: Any) -> Any:
        loaded.append(path)
        if len(loaded) == 2 and not stopping.is_set():
            stopping.set()
            raise KeyboardInterrupt
        return load(path, section)

    monkeypatch.setattr(contestants.models, "load_policy", watched)
    with pytest.raises(KeyboardInterrupt):
        compare(*given)
    loaded.clear()
    assert compare(*given) == whole
    assert loaded[0] == str(other_model), "the first model's answers were there"
