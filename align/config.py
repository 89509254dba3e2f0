"""Strict YAML -> typed config, with `key=value` overrides and errors that name the file, the line and the nearest key.

One YAML file describes a pipeline, a section a stage. Keys that go to a trainer keep the trainer's own names; keys that
go to PEFT keep PEFT's. A training section therefore also takes every other field of its trainer's config class (the
documented fields below are those whose default is ours or which most users touch); the trainer's class is imported
only when such a key is met.

Relative paths written in a YAML file are relative to that file; relative paths given on the command line are relative
to the working directory.
"""

from __future__ import annotations

import difflib
import functools
import types
import typing
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from reward.records import InputError

StageName = Literal["sft", "sample", "label", "reward", "dpo", "ppo", "compare"]
STAGES: tuple[StageName, ...] = typing.get_args(StageName)


class _Path:
    """Marks a string that is a path on disk, so that it can be resolved against the place where it was written."""


class _PathOrName:
    """Marks a string that is a folder where there is one of this name, and else a name (of a hub model, of a stage)."""


FilePath = Annotated[str, _Path()]
PathOrName = Annotated[str, _PathOrName()]

# Adapter keys that the stage and its model decide.
ADAPTER_OWNED_KEYS = {
    "task_type": "the stage decides it",
    "peft_type": "the adapter is always LoRA",
    "base_model_name_or_path": "the model is described in the `model` section",
    "inference_mode": "the stage decides it",
    "auto_mapping": "PEFT fills it in",
    "peft_version": "PEFT fills it in",
}

# Trainer keys of ppo that its own keys decide.
PPO_OWNED_KEYS = dict.fromkeys(("max_steps", "num_train_epochs"), "total_episodes decides how long ppo trains")

# Trainer keys the pipeline sets itself. Setting them would break a contract, so they are refused, with the reason.
OWNED_KEYS = {
    "output_dir": "the run folder decides it (set `runs` and `name`)",
    "seed": "one `seed` at the top of the file holds for every stage",
    "data_seed": "one `seed` at the top of the file holds for every stage",
    "completion_only_loss": "the loss is always on answer tokens only",
    "assistant_only_loss": "the loss is always on answer tokens only",
    "remove_unused_columns": "the pipeline prepares the columns itself",
    "disable_tqdm": "progress is shown by the pipeline",
    "save_strategy": "an interrupted stage resumes from checkpoints, which save_steps spaces",
    "use_cpu": "a GPU is used where there is one (hide it with an empty CUDA_VISIBLE_DEVICES)",
    "dataloader_pin_memory": "memory is pinned where there is a GPU",
    "model_init_kwargs": "the model is described in the `model` section",
    "deepspeed": "start the stage with `accelerate launch --config_file ...` or `--accelerate FILE`",
    "fsdp": "start the stage with `accelerate launch --config_file ...` or `--accelerate FILE`",
    "eval_strategy": "held-out figures are measured once, at the end of the stage",
    "do_eval": "held-out figures are measured once, at the end of the stage",
    "load_best_model_at_end": "held-out prompts choose no checkpoint",
    "push_to_hub": "push the finished run folder with `hf upload` instead",
    "resume_from_checkpoint": "an interrupted stage resumes by itself when it is started again",
}


class _KeyError(ValueError):
    """A problem with one key of a section, so that the sentence can name its line."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python counts true as 1; a learning rate of `true` is a slip, not 1.0."""
        annotation = cls.model_fields[info.field_name].annotation if info.field_name else None
        if isinstance(value, bool) and {annotation, *typing.get_args(annotation)} & {int, float}:
            raise ValueError(f"is {str(value).lower()}, but a number is wanted")
        return value


class AdapterSection(Section):
    """LoRA, with PEFT's names. Any other field of `peft.LoraConfig` may be added."""

    model_config = ConfigDict(extra="allow")
    config_class: ClassVar[str] = "peft.LoraConfig"

    r: int = Field(16, gt=0, description="Rank of the adapter.")
    lora_alpha: float = Field(32, gt=0, description="Scale of the adapter; the update is multiplied by lora_alpha / r.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: list[str] | str = Field(
        "all-linear",
        description="Module names, a regular expression, or 'all-linear' (all linear layers but the head).",
    )

    @model_validator(mode="after")
    def _known_extras(self) -> Self:
        _check_extras(self)
        return self


class TrainerSection(Section):
    """What every training stage shares; the names are those of `transformers.TrainingArguments`."""

    model_config = ConfigDict(extra="allow")
    config_class: ClassVar[str]

    adapter: AdapterSection | None = Field(
        default_factory=AdapterSection, description="LoRA adapter (PEFT's keys); null trains every weight."
    )
    learning_rate: float = Field(gt=0, description="Peak learning rate of AdamW.")
    per_device_train_batch_size: int = Field(8, gt=0, description="Rows a forward pass on each device.")
    per_device_eval_batch_size: int = Field(8, gt=0, description="Rows a forward pass when evaluating.")
    gradient_accumulation_steps: int = Field(1, gt=0, description="Forward passes an optimiser step.")
    lr_scheduler_type: str = Field("cosine", description="Any scheduler of transformers by name.")
    warmup_steps: float = Field(0.1, ge=0, description="Warm-up, in steps, or as a share of all steps if below 1.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradient clipping by global norm; 0 switches it off.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass: less memory.")
    bf16: bool | None = Field(
        None, description="Autocast to bfloat16; null: on a GPU whose dtype is bfloat16, else off."
    )
    logging_steps: float = Field(1, gt=0, description="Optimiser steps between two lines of metrics.jsonl.")
    save_steps: float = Field(50, gt=0, description="Optimiser steps between two checkpoints.")
    save_total_limit: int | None = Field(1, gt=0, description="Checkpoints kept on disk.")
    report_to: str | list[str] = Field("none", description="tensorboard, trackio, wandb, ... as in transformers.")

    @model_validator(mode="after")
    def _known_extras(self) -> Self:
        _check_extras(self)
        return self

    def trainer_arguments(self) -> dict[str, Any]:
        """The keys that go to the trainer's config class, as the user gave them."""
        known = config_fields(self.config_class)
        return {key: value for key, value in self if key in known}


class EpochSection(TrainerSection):
    """A training stage that passes over fixed rows."""

    num_train_epochs: float = Field(1, gt=0, description="Passes over the training rows.")
    max_steps: int = Field(-1, description="Optimiser steps in all; -1 lets num_train_epochs decide.")
    max_length: int = Field(1024, gt=0, description="Longest row in tokens; longer rows are left out and counted.")

    @field_validator("max_steps")
    @classmethod
    def _steps_or_epochs(cls, value: int) -> int:
        if value != -1 and value < 1:
            raise ValueError(f"is {value}, but -1 (num_train_epochs decides) or a number of at least 1 is wanted")
        return value


class ModelSection(Section):
    base: PathOrName = Field(
        "smollm2-135m",
        description="The model to align: a hub id, a folder in Hugging Face layout, or the alias smollm2-135m.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Storage and compute type of the base; auto: bfloat16 where the hardware has it, else float32.",
    )
    attn_implementation: str | None = Field(None, description="As in transformers' from_pretrained, e.g. sdpa, eager.")
    chat_template: FilePath | None = Field(
        None, description="A Jinja chat template file, for a tokenizer that has none (or to replace its own)."
    )
    trust_remote_code: bool = Field(
        False, description="Run code that comes with a hub model. Only for models you trust."
    )


class DataSection(Section):
    demonstrations: FilePath | None = Field(None, description="JSONL of prompts with good answers, for sft.")
    prompts: FilePath | None = Field(
        None, description="JSONL of further prompts for sample, ppo and compare, beside the demonstrations' own."
    )
    preferences: FilePath | None = Field(None, description="JSONL of preference pairs, for label.source: dataset.")
    test_share: float = Field(0.2, gt=0, lt=1, description="Share of prompts held out of all training, by prompt hash.")
    max_rows: int | None = Field(None, gt=0, description="Use only the first rows of each file; for trying things out.")


class SftSection(EpochSection):
    """Supervised fine-tuning: TRL's SFTTrainer, loss on answer tokens only."""

    config_class: ClassVar[str] = "trl.SFTConfig"
    learning_rate: float = Field(2e-4, gt=0, description="Peak learning rate of AdamW.")
    packing: bool = Field(
        True, description="Fill rows of max_length with several conversations (attention kept apart)."
    )


class GenerationSection(Section):
    """How answers are sampled; the names are those of `transformers.GenerationConfig`."""

    max_new_tokens: int = Field(64, gt=0, description="Longest answer in tokens.")
    temperature: float = Field(1.0, ge=0, description="Sampling temperature; 0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling; 1 samples from the whole distribution.")
    top_k: int = Field(0, ge=0, description="Sample among the k likeliest tokens; 0 among all.")
    batch_size: int = Field(48, gt=0, description="Answers generated at a time.")


class SampleSection(GenerationSection):
    """Answers to compare: K per prompt, from one or several policies."""

    policies: list[PathOrName] = Field(
        ["sft"], min_length=1, description="Who answers: base, sft, or the folder of a finished sft, dpo or ppo stage."
    )
    answers_per_prompt: int = Field(4, ge=2, description="Answers per prompt, shared out over the policies.")
    max_prompts: int | None = Field(None, gt=0, description="At most this many prompts, train and test together.")
    max_prompt_length: int = Field(
        512, gt=0, description="Longest prompt in tokens; longer ones are left out and counted."
    )


class LabelSection(Section):
    """Where preferences come from."""

    source: Literal["simulated", "dataset", "people"] = Field(
        "simulated",
        description="simulated: a panel with a documented taste; dataset: data.preferences; people: the app.",
    )
    annotators: int = Field(6, gt=0, description="Size of the simulated panel.")
    labels_per_item: int = Field(3, gt=0, description="Labels by different annotators on each pair of answers.")
    store: FilePath | None = Field(None, description="The label database; null: labels.sqlite in the run folder.")
    project: str | None = Field(
        None, description="people: the project in the label database; null: the pipeline's name."
    )
    min_labels: int = Field(1, gt=0, description="people: refuse to go on with fewer labels than this.")


class RewardSection(EpochSection):
    """The reward model: TRL's RewardTrainer, LoRA + score head on the SFT model."""

    config_class: ClassVar[str] = "trl.RewardConfig"
    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate of AdamW.")
    margin: bool = Field(False, description="Ask for a gap of at least the label's margin between the two rewards.")
    center_rewards_coefficient: float | None = Field(0.01, ge=0, description="Pull towards rewards of mean zero.")


# TRL 1.16 learns of an unknown one only in the first training step.
DpoLoss = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip


class DpoSection(EpochSection):
    """Direct preference optimisation: TRL's DPOTrainer, reference = the same model with the adapter off."""

    config_class: ClassVar[str] = "trl.DPOConfig"
    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate of AdamW.")
    beta: float = Field(0.1, gt=0, description="Strength of the pull towards the reference.")
    loss_type: list[DpoLoss] = Field(
        ["sigmoid"], min_length=1, description="Any of TRL's loss types by name, or several with loss_weights."
    )
    precompute_ref_log_probs: bool = Field(
        False, description="Reference log-probabilities once, before training; pays from the second epoch on."
    )

    @field_validator("loss_type", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class PpoSection(TrainerSection):
    """Proximal policy optimisation on one shared base: policy, value, reward and reference."""

    config_class: ClassVar[str] = "align.ppo.trainer.PPOConfig"
    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate of AdamW.")
    lr_scheduler_type: str = Field("constant_with_warmup", description="Any scheduler of transformers by name.")
    warmup_steps: float = Field(0, ge=0, description="Warm-up, in steps, or as a share of all steps if below 1.")
    total_episodes: int = Field(256, gt=0, description="Episodes (a prompt and its answer) in all, over all processes.")
    num_ppo_epochs: int = Field(2, gt=0, description="Passes over the episodes of an update.")
    num_mini_batches: int = Field(
        1,
        gt=0,
        description="Optimiser steps per pass. An update takes per_device_train_batch_size x "
        "gradient_accumulation_steps x num_mini_batches episodes on each process.",
    )
    response_length: int = Field(64, gt=0, description="Longest answer in tokens.")
    temperature: float = Field(1.0, gt=0, description="Of sampling and of log-probabilities alike.")
    kl_coef: float = Field(
        0.05, ge=0, description="Weight of the KL penalty in the reward (starting value if adaptive)."
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        "k1", description="Schulman's estimators of KL(policy || reference)."
    )
    kl_target: float | None = Field(
        None, gt=0, description="Adapt kl_coef towards this KL (nats per answer); null: fixed."
    )
    kl_horizon: int = Field(10_000, gt=0, description="Episodes over which the adaptive controller acts.")
    gamma: float = Field(1.0, gt=0, le=1, description="Discount.")
    lam: float = Field(0.95, ge=0, le=1, description="Lambda of generalised advantage estimation.")
    cliprange: float = Field(0.2, gt=0, description="Clip range of the policy ratio.")
    cliprange_value: float = Field(0.2, gt=0, description="Clip range of the value.")
    vf_coef: float = Field(0.1, ge=0, description="Weight of the value loss.")
    whiten_rewards: bool = Field(False, description="Scale the shaped rewards of an update to unit variance.")
    missing_eos_penalty: float | None = Field(
        None, ge=0, description="Taken from the score of an answer that did not stop."
    )
    max_prompt_length: int = Field(
        512, gt=0, description="Longest prompt in tokens; longer ones are left out and counted."
    )


class CompareSection(GenerationSection):
    """The verdict: every model answers the same held-out prompts."""

    models: list[Literal["base", "sft", "dpo", "ppo"]] | None = Field(
        None,
        min_length=2,
        description="Models compared, the first is the one to beat; null: the base and every policy in `stages`.",
    )
    judges: list[Literal["simulated", "reward"]] | None = Field(
        None,
        description="Who decides; null: simulated where labels are simulated, and the reward model where there is one.",
    )
    max_prompts: int | None = Field(None, gt=0, description="At most this many held-out prompts.")
    max_prompt_length: int = Field(
        512, gt=0, description="Longest prompt in tokens; longer ones are left out and counted."
    )
    examples: int = Field(24, ge=0, description="Prompts shown side by side in the report.")


class Config(Section):
    """One pipeline."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Names the folder under `runs`.")
    runs: FilePath = Field(
        "runs", description="Folder that holds all run folders; by default in the working directory."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of every stage.")
    stages: list[StageName] = Field([*STAGES], min_length=1, description="Stages that `align run` goes through.")
    model: ModelSection = Field(default_factory=ModelSection)
    data: DataSection = Field(default_factory=DataSection)
    sft: SftSection = Field(default_factory=SftSection)
    sample: SampleSection = Field(default_factory=SampleSection)
    label: LabelSection = Field(default_factory=LabelSection)
    reward: RewardSection = Field(default_factory=RewardSection)
    dpo: DpoSection = Field(default_factory=DpoSection)
    ppo: PpoSection = Field(default_factory=PpoSection)
    compare: CompareSection = Field(default_factory=CompareSection)

    @field_validator("stages")
    @classmethod
    def _in_order(cls, stages: list[StageName]) -> list[StageName]:
        if len(set(stages)) < len(stages):
            raise ValueError(f"is {stages}, where a stage is named twice; name each of them once")
        return [stage for stage in STAGES if stage in stages]

    def compared_models(self) -> list[str]:
        """The models that compare looks at, the one to beat first.

        Raises:
            InputError: a model is named whose stage the pipeline does not have, or there are fewer than two.
        """
        have = ["base", *(name for name in ("sft", "dpo", "ppo") if name in self.stages)]
        names = [*(self.compare.models or have)]
        if missing := [name for name in names if name not in have]:
            raise InputError(f"compare.models names {', '.join(missing)}, but the stages are {', '.join(self.stages)}.")
        if len(set(names)) < max(2, len(names)):
            raise InputError(f"compare needs at least two different models, but has {', '.join(names)}: add a stage.")
        return names

    def folder(self, stage: str) -> Path:
        """The run folder of a stage: `runs/<name>/<n>-<stage>`."""
        return Path(self.runs) / self.name / f"{STAGES.index(stage) + 1}-{stage}"

    def section(self, stage: str) -> Section:
        section: Section = getattr(self, stage)
        return section


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """The config in a YAML file, with `section.key=value` overrides (the value is read as YAML).

    Raises:
        InputError: missing or malformed file, unknown key (with the nearest known one), wrong type or value.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"config {path} {what}: give the path of a YAML file, such as configs/quickstart.yaml.")
    raw, lines = _read_yaml(path)
    raw.setdefault("name", path.stem)
    raw.setdefault("runs", str(Path.cwd() / "runs"))
    _resolve_paths(raw, Config, path.resolve().parent)
    for override in overrides:
        _apply_override(raw, lines, override)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise InputError("\n".join(_sentence(group, path, lines) for group in _by_key(error))) from None


def json_schema() -> dict[str, Any]:
    """The JSON schema of a config file, trainer and adapter keys included, for editors."""
    schema = Config.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    for section in (AdapterSection, SftSection, RewardSection, DpoSection, PpoSection):
        properties = schema["$defs"][section.__name__]["properties"]
        for key, hint in config_fields(section.config_class).items():
            if key not in _owned_keys(section):
                properties.setdefault(key, _hint_schema(hint))
        schema["$defs"][section.__name__]["additionalProperties"] = False
    return schema


@functools.cache
def config_fields(config_class: str) -> dict[str, Any]:
    """Field name -> type of a library's config dataclass, such as "trl.SFTConfig". Imports the library."""
    import dataclasses
    import importlib

    module, _, name = config_class.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    try:
        hints = typing.get_type_hints(cls)
    except (NameError, TypeError):  # an annotation that names something only type checkers see
        hints = {}
    return {field.name: hints.get(field.name, Any) for field in dataclasses.fields(cls) if field.init}


def _check_extras(section: AdapterSection | TrainerSection) -> None:
    """Check the keys that are not documented here against the library's own config class, and convert their values."""
    if not section.model_extra:
        return
    known, owned = config_fields(section.config_class), _owned_keys(type(section))
    for key, value in section.model_extra.items():
        if key in owned:
            raise _KeyError(key, f"`{key}` cannot be set: {owned[key]}")
        if key not in known:
            fields = type(section).model_fields
            raise _KeyError(key, _unknown(key, fields, known, f", and every other field of {section.config_class}"))
        try:
            section.model_extra[key] = _library_type(known[key]).validate_python(value)
        except ValidationError as error:
            wanted = " or ".join(dict.fromkeys(_wanted(e) for e in error.errors()))
            raise _KeyError(key, f"`{key}` is {_shown(value)}, but {wanted} is wanted") from None
        except PydanticUserError:  # a type pydantic has no schema for: the library checks it itself
            pass


def _owned_keys(section: type[Section]) -> dict[str, str]:
    """The keys of a library's config class that this section refuses, with the reason."""
    if issubclass(section, AdapterSection):
        return ADAPTER_OWNED_KEYS
    return OWNED_KEYS | (PPO_OWNED_KEYS if issubclass(section, PpoSection) else {})


def _unknown(key: str, fields: typing.Iterable[str], more: typing.Iterable[str] = (), and_more: str = "") -> str:
    """`fields` are ours and listed where nothing is near; `more` are a library's, too many to list."""
    nearest = difflib.get_close_matches(key, [*fields, *more], n=1, cutoff=0.5)
    hint = f"did you mean `{nearest[0]}`?" if nearest else f"known keys are {', '.join(sorted(fields))}{and_more}"
    return f"unknown key `{key}`: {hint}"


def _library_type(hint: Any) -> TypeAdapter[Any]:
    """The checker of a library's type: true is not a number, and infinity is not a setting."""
    if {hint, *typing.get_args(hint)} & {int, float} and bool not in (hint, *typing.get_args(hint)):
        hint = Annotated[hint, BeforeValidator(_no_bool)]
    try:
        return TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False))
    except PydanticUserError:  # a type that brings a configuration of its own
        return TypeAdapter(hint)


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("float_type", "a number")
    return value


def _hint_schema(hint: Any) -> dict[str, Any]:
    try:
        return TypeAdapter(hint).json_schema()
    except (PydanticUserError, ValueError):
        return {}


class _Lines(dict[tuple[str | int, ...], str]):
    """Where each key was written: ("sft", "r") -> "configs/a.yaml, line 12"."""

    def of(self, location: tuple[str | int, ...], fallback: str) -> str:
        while location:
            if location in self:
                return self[location]
            location = location[:-1]
        return fallback


def _read_yaml(path: Path) -> tuple[dict[str, Any], _Lines]:
    """The mapping in the file and the place of every key in it."""
    try:
        text = path.read_text("utf-8-sig")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        raw = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{path}{line}: not valid YAML ({error.problem or error.context}).") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())}).") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: a mapping of sections is wanted, but the file holds {_kind(raw)}.")
    lines = _Lines()

    def walk(node: yaml.Node, location: tuple[str | int, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                place = (*location, str(key.value))
                where = f"{path}, line {key.start_mark.line + 1}"
                if place in lines:
                    raise InputError(f"{where}: `{'.'.join(map(str, place))}` is set twice; keep one of them.")
                lines[place] = where
                walk(value, place)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                walk(value, (*location, index))

    if node is not None:
        try:
            walk(node, ())
        except RecursionError:
            raise InputError(f"{path}: not valid here (an alias stands inside its own anchor).") from None
    return _unshared(raw), lines


def _unshared(value: Any) -> Any:
    """A copy in which no two keys share a mapping: overriding one use of an anchor must not change the others."""
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value


def _apply_override(raw: dict[str, Any], lines: _Lines, override: str) -> None:
    key, equals, text = override.partition("=")
    parts = tuple(key.split("."))
    if not equals or not all(parts):
        raise InputError(f"`{override}` is not an override: write section.key=value, such as dpo.learning_rate=1e-5.")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        value = text
    written: Any = value
    for part in reversed(parts):
        written = {part: written}
    _resolve_paths(written, Config, Path.cwd())
    target = raw
    for part in parts[:-1]:
        written = written[part]
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise InputError(f"`{override}`: `{part}` holds {_kind(target)}, not a section of keys.")
    target[parts[-1]] = written[parts[-1]]
    for place in [place for place in lines if place[: len(parts)] == parts]:
        del lines[place]  # what the file says below this key is replaced
    lines[parts] = f"command line, {override}"
    for length in range(1, len(parts)):
        lines.setdefault(parts[:length], lines[parts])


def _resolve_paths(raw: dict[str, Any], section: type[BaseModel], folder: Path) -> None:
    """Make every path in `raw` absolute, relative ones counted from `folder`."""
    for key, field in section.model_fields.items():
        if key not in raw:
            continue
        value = raw[key]
        inner = _section_type(field.annotation)
        if inner and isinstance(value, dict):
            _resolve_paths(value, inner, folder)
        elif isinstance(value, str) and _is_path(field):
            raw[key] = _absolute(value, folder)
        elif _is_path(field, _PathOrName):
            found = [_absolute(v, folder) if _is_folder(v, folder) else v for v in _listed(value)]
            raw[key] = found if isinstance(value, list) else found[0]


def _absolute(path: str, folder: Path) -> str:
    return str((folder / Path(path).expanduser()).resolve())


def _is_folder(value: Any, folder: Path) -> bool:
    """Whether a value that may be a name or a folder is a folder."""
    return isinstance(value, str) and value not in ("", "base", *STAGES) and Path(_absolute(value, folder)).is_dir()


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_path(field: FieldInfo, kind: type = _Path) -> bool:
    options = [field.metadata, *(getattr(option, "__metadata__", ()) for option in typing.get_args(field.annotation))]
    return any(isinstance(mark, kind) for marks in options for mark in marks)


def _section_type(annotation: Any) -> type[BaseModel] | None:
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def _by_key(error: ValidationError) -> list[list[Any]]:
    """Pydantic's errors, those of one key together: a value that may be of two types fails once for each of them."""
    groups: dict[tuple[int | str, ...], list[Any]] = {}
    for problem in error.errors():
        location = problem["loc"] if problem["type"] == "extra_forbidden" else _without_types(problem["loc"])
        groups.setdefault(location, []).append({**problem, "loc": location})
    # A wrong item of a list is told by its place; that the list is not of the other type too would only confuse.
    return [
        group for at, group in groups.items() if not any(len(o) > len(at) > 0 and o[: len(at)] == at for o in groups)
    ]


def _without_types(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """A pydantic location without the type names it puts behind the key of a union: `str`, `list[str]`."""
    return tuple(part for part in location if part not in ("str", "list[str]"))


def _sentence(errors: list[Any], path: Path, lines: _Lines) -> str:
    """What is wrong with one key as a sentence for people."""
    error = errors[0]
    location = error["loc"]
    name = ".".join(str(part) for part in location)
    where = lines.of(location, str(path))
    if error["type"] == "extra_forbidden":
        section: type[BaseModel] = Config
        for part in location[:-1]:
            section = _section_type(section.model_fields[str(part)].annotation) or section
        message = _unknown(str(location[-1]), section.model_fields)
        return (
            f"{where}: {message}"
            if len(location) == 1
            else f"{where}: in `{'.'.join(map(str, location[:-1]))}`, {message}"
        )
    if error["type"] == "value_error":
        problem = error["ctx"]["error"]
        if isinstance(problem, _KeyError):
            where = lines.of((*location, problem.key), where)
            return f"{where}: in `{name}`, {problem}{'' if str(problem).endswith('?') else '.'}"
        return f"{where}: `{name}` {problem}."
    if error["type"] == "missing":
        return f"{where}: `{name}` is missing."
    if error["type"] == "invalid_key":
        return f"{where}: the key {error['input']!r} is {_kind(error['input'])}, but keys are text."
    wanted = " or ".join(dict.fromkeys(_wanted(error) for error in errors))
    return f"{where}: `{name}` is {_shown(error['input'])}, but {wanted} is wanted."


def _shown(value: Any) -> str:
    text = repr(value)
    return "null" if value is None else f"{text if len(text) <= 80 else text[:77] + '...'} ({_kind(value)})"


def _wanted(error: Any) -> str:
    """What pydantic would have accepted, in words."""
    context = error.get("ctx", {})
    limits = {"greater_than": "above {gt}", "greater_than_equal": "at least {ge}", "less_than": "below {lt}"}
    limits |= {"less_than_equal": "at most {le}"}
    kind = error["type"]
    if kind == "string_pattern_mismatch":
        return "text of letters, digits, dots, dashes and underscores that begins with a letter or a digit"
    if kind == "too_short":
        return f"a list of at least {context['min_length']}"
    if kind == "finite_number":
        return "a finite number"
    if kind in limits:
        return "a number " + limits[kind].format(**context)
    if kind in ("literal_error", "enum"):
        return f"one of {context['expected']}"
    kinds = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text", "list": "a list"}
    kinds |= {"model": "a section of keys", "dict": "a section of keys", "none": "null"}
    return kinds.get(kind.split("_")[0], error["msg"][0].lower() + error["msg"][1:])


def _kind(value: Any) -> str:
    names = {bool: "true/false", int: "a whole number", float: "a number", str: "text", list: "a list"}
    names |= {dict: "a section", type(None): "nothing"}
    return names.get(type(value), f"a {type(value).__name__}")
