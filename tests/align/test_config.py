"""The config file: what is accepted, what is refused, and that every refusal names the place and the way out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.config import (
    ADAPTER_OWNED_KEYS,
    OWNED_KEYS,
    STAGES,
    Config,
    Section,
    TrainerSection,
)
from align.config_file import json_schema, load_config
from align.models import lora_config
from align.pipeline import config_yaml
from reward.records import InputError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SECTIONS = ["model", "data", *STAGES]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "pipeline.yaml"


def load(file: Path, text: str, *overrides: str) -> Config:
    file.write_text(text, "utf-8")
    return load_config(file, overrides)


def refusal(file: Path, text: str, *overrides: str) -> str:
    """What the user reads; the file's own path is cut off, so that tests compare what matters."""
    with pytest.raises(InputError) as caught:
        load(file, text, *overrides)
    return str(caught.value).replace(f"{file}", "FILE")


# Keys


@pytest.mark.parametrize(
    ("text", "overrides", "sentence"),
    [
        ("seed: 1\nsedd: 2\n", [], "FILE, line 2: unknown key `sedd`: did you mean `seed`?"),
        ("dpoo: {}\n", [], "FILE, line 1: unknown key `dpoo`: did you mean `dpo`?"),
        (
            "data:\n  # a comment\n  demonstration: a.jsonl\n",
            [],
            "FILE, line 3: in `data`, unknown key `demonstration`: did you mean `demonstrations`?",
        ),
        (
            "sft:\n  lerning_rate: 1e-4\n",
            [],
            "FILE, line 2: in `sft`, unknown key `lerning_rate`: did you mean `learning_rate`?",
        ),
        (  # the nearest key is one of the trainer's, not one of the section's own
            "sft:\n  adam_betta1: 0.8\n",
            [],
            "FILE, line 2: in `sft`, unknown key `adam_betta1`: did you mean `adam_beta1`?",
        ),
        (
            "ppo:\n  adapter:\n    r: 4\n    lora_alhpa: 3\n",
            [],
            "FILE, line 4: in `ppo.adapter`, unknown key `lora_alhpa`: did you mean `lora_alpha`?",
        ),
        (
            "sft: {max_steps: 2,\n  max_lenght: 3}\n",
            [],
            "FILE, line 2: in `sft`, unknown key `max_lenght`: did you mean `max_length`?",
        ),
        (
            "{}",
            ["dpo.betta=0.2"],
            "command line, dpo.betta=0.2: in `dpo`, unknown key `betta`: did you mean `beta`?",
        ),
        ("{}", ["sed=1"], "command line, sed=1: unknown key `sed`: did you mean `seed`?"),
        (
            "{}",
            ["reward.adapter.lora_dropuot=0"],
            "command line, reward.adapter.lora_dropuot=0: in `reward.adapter`, unknown key `lora_dropuot`: "
            "did you mean `lora_dropout`?",
        ),
        (  # a section given whole on the command line replaces the file's, whose lines are no longer to blame
            "sft: {lerning_rate: 1}",
            ["sft={lerning_rate: 2}"],
            "command line, sft={lerning_rate: 2}: in `sft`, unknown key `lerning_rate`: did you mean `learning_rate`?",
        ),
    ],
)
def test_unknown_key(file: Path, text: str, overrides: list[str], sentence: str) -> None:
    assert refusal(file, text, *overrides) == sentence


def test_unknown_key_without_neighbour_lists_the_documented_ones_once(file: Path) -> None:
    said = refusal(file, "label:\n  zzz: 1\n")
    listed = said.partition("known keys are ")[2].split(", ")
    assert listed == sorted(Config.model_fields["label"].annotation.model_fields)
    said = refusal(file, "dpo:\n  zzz: 1\n")
    assert said.count(" learning_rate") == 1
    assert said.endswith("and every other field of trl.DPOConfig.")


def test_every_wrong_key_is_named_at_once(file: Path) -> None:
    lines = refusal(file, "sedd: 1\nmodel:\n  bse: a\nsample:\n  top_p: 2\n").splitlines()
    assert sorted(line.split(":")[0] for line in lines) == ["FILE, line 1", "FILE, line 3", "FILE, line 5"]


@pytest.mark.parametrize("key", sorted(OWNED_KEYS))
def test_owned_trainer_keys_are_refused_with_the_reason(file: Path, key: str) -> None:
    assert refusal(file, f"dpo:\n  {key}: x\n") == f"FILE, line 2: in `dpo`, `{key}` cannot be set: {OWNED_KEYS[key]}."


@pytest.mark.parametrize("key", sorted(ADAPTER_OWNED_KEYS))
def test_owned_adapter_keys_are_refused_with_the_reason(file: Path, key: str) -> None:
    said = refusal(file, f"sft:\n  adapter:\n    {key}: x\n")
    assert said == f"FILE, line 3: in `sft.adapter`, `{key}` cannot be set: {ADAPTER_OWNED_KEYS[key]}."


@pytest.mark.parametrize("key", ["max_steps", "num_train_epochs"])
def test_ppo_is_as_long_as_its_episodes(file: Path, key: str) -> None:
    assert "total_episodes decides" in refusal(file, f"ppo:\n  {key}: 3\n")
    assert getattr(load(file, f"dpo:\n  {key}: 3\n").dpo, key) == 3


# Values


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("sft:\n  learning_rate: fast\n", "line 2: `sft.learning_rate` is 'fast' (text), but a number is wanted."),
        ("sft:\n  learning_rate: true\n", "line 2: `sft.learning_rate` is true, but a number is wanted."),
        ("sft:\n  adapter:\n    r: true\n", "line 3: `sft.adapter.r` is true, but a number is wanted."),
        ("sft:\n  learning_rate: null\n", "line 2: `sft.learning_rate` is null, but a number is wanted."),
        ("seed: 1.5\n", "line 1: `seed` is 1.5 (a number), but a whole number is wanted."),
        ("seed: 2020-01-01\n", "(a date), but a whole number is wanted."),
        ("name: 7\n", "line 1: `name` is 7 (a whole number), but text is wanted."),
        ("sft:\n  packing: perhaps\n", "line 2: `sft.packing` is 'perhaps' (text), but true or false is wanted."),
        ("sft: 4\n", "line 1: `sft` is 4 (a whole number), but a section of keys is wanted."),
        ("sft:\n", "line 1: `sft` is null, but a section of keys is wanted."),
        ("sft:\n  adapter: lora\n", "line 2: `sft.adapter` is 'lora' (text), but a section of keys is wanted."),
        ("stages: sft\n", "line 1: `stages` is 'sft' (text), but a list is wanted."),
        ("data:\n  prompts: [a, b]\n", "line 2: `data.prompts` is ['a', 'b'] (a list), but text is wanted."),
        (
            "sft:\n  adapter:\n    target_modules: 3\n",
            "line 3: `sft.adapter.target_modules` is 3 (a whole number), but a list or text is wanted.",
        ),
        (
            "sft:\n  adapter:\n    target_modules: [q_proj,\n      3]\n",
            "line 3: `sft.adapter.target_modules.1` is 3 (a whole number), but text is wanted.",
        ),
        ("dpo:\n  loss_type: {a: 1}\n", "line 2: `dpo.loss_type` is {'a': 1} (a section), but a list is wanted"),
        ("1: 2\n", "the key 1 is a whole number, but keys are text."),
        # Keys that only the library knows
        ("sft:\n  adam_beta1: high\n", "line 2: in `sft`, `adam_beta1` is 'high' (text), but a number is wanted."),
        ("reward:\n  adam_beta1: yes\n", "line 2: in `reward`, `adam_beta1` is True (true/false), but a number is"),
        ("dpo:\n  loss_weights: many\n", "line 2: in `dpo`, `loss_weights` is 'many' (text), but a list is wanted."),
        ("ppo:\n  fp16: maybe\n", "line 2: in `ppo`, `fp16` is 'maybe' (text), but true or false is wanted."),
        (
            "dpo:\n  adapter:\n    bias: some\n",
            "line 3: in `dpo.adapter`, `bias` is 'some' (text), but one of 'none', 'all' or 'lora_only' is wanted.",
        ),
    ],
)
def test_wrong_type(file: Path, text: str, sentence: str) -> None:
    assert sentence in refusal(file, text)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "sft:\n  learning_rate: -1\n",
            "`sft.learning_rate` is -1 (a whole number), but a number above 0.0 is wanted.",
        ),
        ("sft:\n  learning_rate: .inf\n", "`sft.learning_rate` is inf (a number), but a finite number is wanted."),
        ("sft:\n  adam_beta1: .inf\n", "`adam_beta1` is inf (a number), but a finite number is wanted."),
        ("sft:\n  max_steps: 0\n", "`sft.max_steps` is 0, but -1 (num_train_epochs decides) or a number of at least 1"),
        ("seed: -1\n", "`seed` is -1 (a whole number), but a number at least 0 is wanted."),
        ("seed: 4294967296\n", "`seed` is 4294967296 (a whole number), but a number below 4294967296 is wanted."),
        ("data:\n  test_share: 1\n", "`data.test_share` is 1 (a whole number), but a number below 1.0 is wanted."),
        ("sample:\n  top_p: 1.1\n", "`sample.top_p` is 1.1 (a number), but a number at most 1.0 is wanted."),
        ("sample:\n  answers_per_prompt: 1\n", "but a number at least 2 is wanted."),
        ("sample:\n  policies: []\n", "`sample.policies` is [] (a list), but a list of at least 1 is wanted."),
        ("stages: []\n", "`stages` is [] (a list), but a list of at least 1 is wanted."),
        ("stages: [sfd]\n", "`stages.0` is 'sfd' (text), but one of 'prepare', 'sft', 'sample', "),
        ("stages: [sft, dpo, sft]\n", "`stages` is ['sft', 'dpo', 'sft'], where a stage is named twice"),
        ("label:\n  source: crowd\n", "but one of 'simulated', 'dataset' or 'people' is wanted."),
        ("model:\n  dtype: float8\n", "but one of 'auto', 'float32', 'bfloat16' or 'float16' is wanted."),
        ("ppo:\n  kl_estimator: k4\n", "but one of 'k1', 'k2', 'k3' or 'full' is wanted."),
        ("name: ../x\n", "`name` is '../x' (text), but text of letters, digits, dots, dashes and underscores"),
    ],
)
def test_out_of_range(file: Path, text: str, sentence: str) -> None:
    said = refusal(file, text)
    assert sentence in said
    assert re.match(r"FILE, line [12]: ", said)


def test_file_name_that_cannot_name_a_folder(tmp_path: Path) -> None:
    assert "`name` is 'my pipeline'" in refusal(tmp_path / "my pipeline.yaml", "{}")
    assert load(tmp_path / "my pipeline.yaml", "name: mine").name == "mine"


def test_numbers_as_yaml_misreads_them(file: Path) -> None:
    """YAML 1.1 takes 1e-4 for text, because it has no dot."""
    assert yaml.safe_load("1e-4") == "1e-4"
    config = load(file, "sft:\n  learning_rate: 1e-4\n  adam_epsilon: 1e-7\ndpo: {beta: 5e-1}", "ppo.kl_coef=2e-2")
    assert config.sft.learning_rate == 1e-4
    assert config.sft.trainer_arguments()["adam_epsilon"] == 1e-7
    assert config.dpo.beta == 0.5
    assert config.ppo.kl_coef == 0.02


def test_trainer_keys_pass_through_by_their_own_names(file: Path) -> None:
    config = load(
        file,
        "sft: {adam_beta1: 0.8, lr_scheduler_kwargs: {num_cycles: 2}}\n"
        "dpo: {loss_type: [sigmoid, sft], loss_weights: [1, 0.5]}\nreward: {}\nppo: {adam_beta2: 0.9}\n",
    )
    sft = config.sft.trainer_arguments()
    assert sft["adam_beta1"] == 0.8
    assert sft["lr_scheduler_kwargs"] == {"num_cycles": 2}
    assert "adapter" not in sft
    assert config.dpo.trainer_arguments()["loss_weights"] == [1.0, 0.5]
    assert config.ppo.trainer_arguments()["adam_beta2"] == 0.9
    assert "adam_beta1" not in config.reward.trainer_arguments()  # what the user did not say, the trainer decides


REWARD_OWN = {
    *("base", "margin", "group_pairs", "disagreement", "label_smoothing", "ties", "ensemble"),
    *("probed", "trust", "gate", "aggregate", "lcb_coefficient"),
}


@pytest.mark.parametrize(
    ("section", "ours"),
    [
        ("sft", {"share_prefixes"}),
        ("reward", {"share_prefixes", *REWARD_OWN}),
        ("dpo", {"share_prefixes"}),
        ("ppo", {"keep_policies", "max_prompt_length", "rewards"}),
    ],
)
def test_every_documented_key_is_the_trainers_or_known_to_be_ours(section: str, ours: set[str]) -> None:
    """A key that the trainer does not know is dropped on the way to it: a renamed one would be without effect."""
    stage = getattr(Config(name="x"), section)
    assert set(type(stage).model_fields) - set(stage.trainer_arguments()) == {"adapter", *ours}


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("[q_proj]", {"q_proj"}),
        ("[q_proj, v_proj]", {"q_proj", "v_proj"}),
        ("q_proj", "q_proj"),  # PEFT reads text as a regular expression
        (r".*layers\.[01]\..*(q|v)_proj", r".*layers\.[01]\..*(q|v)_proj"),
        ("all-linear", "all-linear"),
    ],
)
def test_target_modules_keep_their_kind(file: Path, written: str, wanted: Any) -> None:
    config = load(file, f"sft:\n  adapter:\n    target_modules: {written}\n    use_rslora: true\n")
    peft = lora_config(config.sft.adapter, "CAUSAL_LM")
    assert peft.target_modules == wanted  # PEFT turns a list into a set
    assert isinstance(config.sft.adapter.target_modules, list) is written.startswith("[")
    assert peft.use_rslora
    assert (peft.r, peft.lora_alpha, peft.task_type) == (16, 32, "CAUSAL_LM")


def test_stages_are_put_in_order(file: Path) -> None:
    assert load(file, "stages: [compare, sft, dpo, label]").stages == ["sft", "label", "dpo", "compare"]
    assert load(file, "{}").stages == [*STAGES]


def test_loss_type_is_always_a_list(file: Path) -> None:
    assert load(file, "dpo: {loss_type: ipo}").dpo.loss_type == ["ipo"]


# The file itself


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("seed: 1\nseed: 2\n", "FILE, line 2: `seed` is set twice; keep one of them."),
        ("sft:\n  max_steps: 1\n  max_steps: 2\n", "FILE, line 3: `sft.max_steps` is set twice; keep one of them."),
        ("sft: {adapter: {r: 1,\n\nr: 2}}\n", "FILE, line 3: `sft.adapter.r` is set twice; keep one of them."),
        ("- a\n- b\n", "FILE: a mapping of sections is wanted, but the file holds a list."),
        ("hello\n", "FILE: a mapping of sections is wanted, but the file holds text."),
        ("", "FILE: a mapping of sections is wanted, but the file holds nothing."),
        ("# only a comment\n", "FILE: a mapping of sections is wanted, but the file holds nothing."),
        ("seed: 1\nsft: [1\ndpo: 2\n", "FILE, line 3: not valid YAML (expected ',' or ']', but got ':')."),
        ("seed: 1\n\tname: x\n", "FILE, line 2: not valid YAML ("),
        ("name: a: b\n", "FILE, line 1: not valid YAML (mapping values are not allowed here)."),
        ("seed: !!python/name:os.system\n", "FILE, line 1: not valid YAML (could not determine a constructor"),
        ("seed: \x00\n", "FILE: not valid YAML (unacceptable character"),
        ("sft: &a [*a]\n", "FILE: not valid here (an alias stands inside its own anchor)."),
    ],
)
def test_bad_file(file: Path, text: str, sentence: str) -> None:
    said = refusal(file, text)
    assert said.startswith(sentence)
    assert "\n" not in said


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.yaml does not exist: give the path of a YAML file"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(InputError, match="is a folder: give the path of a YAML file"):
        load_config(tmp_path)


def test_not_utf8(file: Path) -> None:
    file.write_bytes("name: café".encode("latin-1"))
    with pytest.raises(InputError, match="not valid YAML"):
        load_config(file)


def test_byte_order_mark_and_merge_keys_are_fine(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbfsft: &a {max_steps: 3}\nreward: *a\ndpo:\n  <<: *a\n  beta: 0.3\n")
    config = load_config(file)
    assert (config.sft.max_steps, config.reward.max_steps, config.dpo.max_steps, config.dpo.beta) == (3, 3, 3, 0.3)


# Overrides


def test_overrides_are_yaml(file: Path) -> None:
    config = load(
        file,
        "seed: 1\nsft: {adapter: {r: 8}, packing: true}\n",
        "seed=7",
        "stages=[dpo, sft]",
        "sft.packing=false",
        "sft.adapter.r=4",
        "sft.adapter.target_modules=[q_proj]",
        "dpo.adapter=null",
        "reward.adapter={r: 2}",
        "ppo.kl_target=6",
        "label.project=a=b",
        "model.base=org/name",
    )
    assert config.seed == 7
    assert config.stages == ["sft", "dpo"]
    assert config.sft.packing is False
    assert (config.sft.adapter.r, config.sft.adapter.target_modules) == (4, ["q_proj"])
    assert config.dpo.adapter is None
    assert config.reward.adapter.r == 2
    assert config.ppo.kl_target == 6
    assert config.label.project == "a=b"
    assert config.model.base == "org/name"


def test_later_overrides_win(file: Path) -> None:
    assert load(file, "seed: 1", "seed=2", "seed=3").seed == 3


@pytest.mark.parametrize(
    ("text", "override", "sentence"),
    [
        ("{}", "seed", "`seed` is not an override: write section.key=value, such as dpo.learning_rate=1e-5."),
        ("{}", "=3", "`=3` is not an override"),
        ("{}", "sft..r=3", "`sft..r=3` is not an override"),
        ("seed: 4", "seed.x=3", "`seed.x=3`: `seed` holds a whole number, not a section of keys."),
        ("{}", "seed.x=3", "command line, seed.x=3: `seed` is {'x': 3} (a section), but a whole number is wanted."),
        ("{}", "seed=", "command line, seed=: `seed` is null, but a whole number is wanted."),
        ("{}", "seed=[1", "command line, seed=[1: `seed` is '[1' (text), but a whole number is wanted."),
        ("sft: {adapter: null}", "sft.adapter.r=4", "`sft.adapter.r=4`: `adapter` holds nothing, not a section"),
    ],
)
def test_bad_override(file: Path, text: str, override: str, sentence: str) -> None:
    assert refusal(file, text, override).startswith(sentence)


def test_paths_are_relative_to_where_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here / "model", there / "model", there / "old/1-sft"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    file = there / "pipeline.yaml"
    text = (
        "runs: out\nmodel: {base: model, chat_template: t.jinja}\n"
        "data: {demonstrations: d.jsonl, prompts: ../p.jsonl, preferences: /abs/q.jsonl}\n"
        "sample: {policies: [base, sft, old/1-sft]}\n"
    )
    config = load(file, text)
    assert config.runs == str(there / "out")
    assert config.model.base == str(there / "model")
    assert config.model.chat_template == str(there / "t.jinja")
    assert config.data.demonstrations == str(there / "d.jsonl")
    assert config.data.prompts == str(tmp_path / "p.jsonl")
    assert config.data.preferences == "/abs/q.jsonl"
    assert config.sample.policies == ["base", "sft", str(there / "old/1-sft")]

    config = load(file, text, "runs=out", "data.demonstrations=d.jsonl", "model.base=model", "label={store: l.sqlite}")
    assert config.runs == str(here / "out")
    assert config.data.demonstrations == str(here / "d.jsonl")
    assert config.model.base == str(here / "model")
    assert config.label.store == str(here / "l.sqlite")
    assert config.data.prompts == str(tmp_path / "p.jsonl")  # untouched: still counted from the file


def test_default_run_folder_is_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load(tmp_path / "elsewhere/a.yaml", "{}").folder("sft") == tmp_path / "runs/a/1-sft"


def test_home_and_hub_ids(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = file.parent / "home"
    (home / "model").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    config = load(file, "model: {base: ~/model}\ndata: {prompts: ~/p.jsonl}")
    assert config.model.base == str(home / "model")
    assert config.data.prompts == str(home / "p.jsonl")
    assert load(file, "model: {base: org/name}").model.base == "org/name"  # no such folder: a hub id


def test_a_folder_named_like_a_stage_is_not_taken_for_it(file: Path) -> None:
    (file.parent / "sft").mkdir()
    assert load(file, "sample: {policies: [sft]}").sample.policies == ["sft"]


# Round trips and the schema


def test_run_folder_of_a_stage(file: Path) -> None:
    config = load(file, "runs: r\nname: n")
    assert [config.folder(stage).relative_to(file.parent).as_posix() for stage in ("sft", "ppo", "compare")] == [
        "r/n/1-sft",
        "r/n/6-ppo",
        "r/n/7-compare",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "name: a.b-c_1\nseed: 4294967295\n",
        "stages: [dpo]\nsft: {learning_rate: 1e-5, adapter: null}\n"
        "dpo: {loss_type: [sigmoid, sft], loss_weights: [1, 2]}",
        "model: {base: gibt/es-nicht, attn_implementation: eager}\ndata: {prompts: straße.jsonl, test_share: 0.5}",
        "sft: {adam_epsilon: 1e-9, optim: adafactor, adapter: {target_modules: [q_proj], layers_to_transform: [1, 2], "
        "rank_pattern: {q_proj: 4}}}",
    ],
)
def test_a_dumped_config_loads_as_the_same_config(file: Path, tmp_path: Path, text: str) -> None:
    config = load(file, text)
    elsewhere = tmp_path / "elsewhere" / "dump.yaml"  # as in the temporary file under accelerate launch
    elsewhere.parent.mkdir()
    again = load(elsewhere, config_yaml(config))
    assert again.model_dump() == config.model_dump()
    assert config_yaml(again) == config_yaml(config)


shipped = sorted(CONFIGS.glob("*.yaml"))
launchers = sorted((CONFIGS / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", shipped, ids=lambda path: path.name)
def test_shipped_config_loads(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert load(tmp_path / "dump.yaml", config_yaml(config)).model_dump() == config.model_dump()
    for name in ("demonstrations", "prompts", "preferences"):  # those that ship with the configs, ship
        written = getattr(config.data, name)
        if written and Path(written).is_relative_to(CONFIGS):
            assert Path(written).is_file(), f"{path.name} names data.{name} {written}"


@pytest.mark.parametrize("path", shipped, ids=lambda path: path.name)
def test_shipped_config_keys_are_in_the_schema(path: Path, schema: dict[str, Any]) -> None:
    assert not unknown_to(schema, schema, yaml.safe_load(path.read_text("utf-8")))


@pytest.mark.parametrize("path", launchers, ids=lambda path: path.name)
def test_shipped_launcher_config_loads_in_accelerate(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(str(path))
    assert loaded.num_processes >= 1
    written = yaml.safe_load(path.read_text("utf-8"))
    assert str(loaded.distributed_type).rpartition(".")[2] == written["distributed_type"]
    if "deepspeed_config" in written:
        assert loaded.deepspeed_config == written["deepspeed_config"]


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json_schema()


def unknown_to(schema: dict[str, Any], part: dict[str, Any], value: Any, at: str = "") -> list[str]:
    """Keys of `value` that the schema does not allow: what an editor would underline."""
    options = [part, *part.get("anyOf", [])]
    options = [schema["$defs"][o["$ref"].rpartition("/")[2]] if "$ref" in o else o for o in options]
    found = next((o for o in options if "properties" in o), None)
    if not isinstance(value, dict) or found is None:
        return []
    wrong = [at + key for key in value if key not in found["properties"]]
    for key in value.keys() & found["properties"].keys():
        wrong += unknown_to(schema, found["properties"][key], value[key], f"{at}{key}.")
    return wrong


def test_schema_knows_trainer_and_adapter_keys(schema: dict[str, Any]) -> None:
    good = {"sft": {"adam_beta1": 0.9, "adapter": {"use_dora": True}}, "dpo": {"loss_weights": [1]}, "seed": 1}
    bad = {"sft": {"adam_betta1": 0.9, "adapter": {"use_dor": True, "task_type": 1}}, "ppo": {"max_steps": 3}, "x": 1}
    assert unknown_to(schema, schema, good) == []
    assert sorted(unknown_to(schema, schema, bad)) == [
        "ppo.max_steps",
        "sft.adam_betta1",
        "sft.adapter.task_type",
        "sft.adapter.use_dor",
        "x",
    ]
    adam_beta1 = schema["$defs"]["SftSection"]["properties"]["adam_beta1"]
    assert adam_beta1["type"] == "number"


def test_schema_offers_no_key_that_is_refused(schema: dict[str, Any]) -> None:
    for section in ("SftSection", "RewardSection", "DpoSection", "PpoSection"):
        assert not OWNED_KEYS.keys() & schema["$defs"][section]["properties"].keys()
        assert schema["$defs"][section]["additionalProperties"] is False


def sections(section: type[Section], at: str = "") -> list[tuple[str, type[Section]]]:
    found = [(at, section)]
    for key, field in section.model_fields.items():
        for option in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(option, type) and issubclass(option, Section):
                found += sections(option, f"{at}{key}.")
    return found


def test_every_field_is_described() -> None:
    found = sections(Config)
    assert {at.partition(".")[0] for at, _ in found} >= {"", *SECTIONS}
    for at, section in found:
        for key, field in section.model_fields.items():
            if (at + key) not in SECTIONS:  # a section is described by its own keys
                assert field.description, f"{at}{key} has no description"
                assert field.description.endswith((".", ")")), f"{at}{key}: {field.description}"


def test_every_training_section_names_its_config_class() -> None:
    training = [section for _, section in sections(Config) if issubclass(section, TrainerSection)]
    assert [section.config_class.rpartition(".")[2] for section in training] == [
        "SFTConfig",
        "RewardConfig",
        "DPOConfig",
        "PPOConfig",
    ]
