"""Strict YAML -> typed config, with `key=value` overrides and errors that name the file, the line and the nearest key.

One YAML file describes a pipeline, a section a stage. Keys that go to a trainer keep the trainer's own names; keys that
go to PEFT keep PEFT's. A training section therefore also takes every other field of its trainer's config class (the
documented fields below are those whose default is ours or which most users touch); the trainer's class is imported
only when such a key is met.

Relative paths written in a YAML file are relative to that file; relative paths given on the command line are relative
to the working directory.
"""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import (
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from align.config_base import FilePath as FilePath
from align.config_base import PathOrName as PathOrName
from align.config_base import Section as Section
from align.config_data import DATA_KEYS as DATA_KEYS
from align.config_data import AugmentSection as AugmentSection
from align.config_data import BalanceSection as BalanceSection
from align.config_data import DataSection as DataSection
from align.config_data import DataSource as DataSource
from align.config_data import PrepareSection as PrepareSection
from align.config_fields import KeyProblem, LibrarySection, check_extras, config_fields
from reward.records import InputError

StageName = Literal["prepare", "sft", "sample", "label", "reward", "dpo", "ppo", "compare"]
PREPARE: StageName = "prepare"  # comes first, and only where its section is there
STAGES: tuple[StageName, ...] = typing.get_args(StageName)[1:]
POLICIES = ("sft", "dpo", "ppo")  # the stages whose folder holds a policy


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


class AdapterSection(LibrarySection, Section):
    """LoRA, with PEFT's names. Any other field of `peft.LoraConfig` may be added."""

    model_config = ConfigDict(extra="allow")
    config_class: ClassVar[str] = "peft.LoraConfig"
    owned_keys: ClassVar[dict[str, str]] = ADAPTER_OWNED_KEYS

    r: int = Field(16, gt=0, description="Rank of the adapter.")
    lora_alpha: float = Field(32, gt=0, description="Scale of the adapter; the update is multiplied by lora_alpha / r.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: list[str] | str = Field(
        "all-linear",
        description="Module names, a regular expression, or 'all-linear' (all linear layers but the head).",
    )

    @model_validator(mode="after")
    def _known_extras(self) -> Self:
        check_extras(self)
        return self


class TrainerSection(LibrarySection, Section):
    """What every training stage shares; the names are those of `transformers.TrainingArguments`."""

    model_config = ConfigDict(extra="allow")
    owned_keys: ClassVar[dict[str, str]] = OWNED_KEYS

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
    share_prefixes: bool = Field(
        True, description="Compute once what the rows of a batch begin with alike; the numbers are the same."
    )
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
        check_extras(self)
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


class QuantizationSection(Section):
    """The base in 4 or 8 bits, by bitsandbytes; the names are those of `transformers.BitsAndBytesConfig`."""

    load_in_4bit: bool = Field(False, description="Hold the base's linear layers in 4 bits (QLoRA).")
    load_in_8bit: bool = Field(False, description="Hold them in 8 bits (LLM.int8).")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field("nf4", description="The 16 values that 4 bits stand for.")
    bnb_4bit_use_double_quant: bool = Field(
        True, description="Quantise the blocks' own constants too: 4.13 bits a weight instead of 4.5."
    )
    bnb_4bit_compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type in which 4-bit weights are multiplied; auto: that of model.dtype."
    )
    llm_int8_threshold: float = Field(
        6.0, ge=0, description="With 8 bits on a GPU, inputs above this are multiplied in 16 bits; 0: none."
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if self.load_in_4bit and self.load_in_8bit:
            raise KeyProblem("load_in_8bit", "load_in_4bit and load_in_8bit are both true: set one of them")
        if not self.load_in_4bit and not self.load_in_8bit:
            raise KeyProblem(
                "load_in_4bit",
                "neither load_in_4bit nor load_in_8bit is true: set one of them, or leave `quantization` out",
            )
        idle, used = ("bnb_4bit_", "load_in_8bit") if self.load_in_8bit else ("llm_int8_", "load_in_4bit")
        for key, field in type(self).model_fields.items():
            if key.startswith(idle) and getattr(self, key) != field.default:
                raise KeyProblem(key, f"`{key}` has no effect with {used}: leave it out")
        return self


class ModelSection(Section):
    base: PathOrName = Field(
        "smollm2-135m",
        description="The model to align: a hub id, a folder in Hugging Face layout, or the alias smollm2-135m.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Storage and compute type of the base; auto: bfloat16 where the hardware has it, else float32.",
    )
    quantization: QuantizationSection | None = Field(
        None, description="The base in 4 or 8 bits, by bitsandbytes; null: as `dtype` says."
    )
    attn_implementation: str | None = Field(None, description="As in transformers' from_pretrained, e.g. sdpa, eager.")
    chat_template: FilePath | None = Field(
        None, description="A Jinja chat template file, for a tokenizer that has none (or to replace its own)."
    )
    trust_remote_code: bool = Field(
        False, description="Run code that comes with a hub model. Only for models you trust."
    )


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


class LabelAppSection(Section):
    """Where the labelling app is served while labels are awaited; none of this changes what is labelled."""

    host: str = Field(
        "127.0.0.1", description="Address to listen on; another than loopback needs TLS, or a proxy's url."
    )
    port: int = Field(8765, ge=1, le=65535, description="Port to listen on.")
    local: bool = Field(False, description="One person on this machine, without a password; loopback only.")
    tls_certificate: FilePath | None = Field(None, description="Certificate file (PEM), with its chain.")
    tls_key: FilePath | None = Field(None, description="The certificate's private key.")
    url: str | None = Field(
        None, description="How browsers name the app where a proxy ends TLS (https://label.example.org)."
    )


class LabelSection(Section):
    """Where preferences come from."""

    source: Literal["simulated", "dataset", "people"] = Field(
        "simulated",
        description="simulated: a panel with a documented taste; dataset: data.preferences; people: the app.",
    )
    annotators: int = Field(6, gt=0, description="Size of the simulated panel.")
    labels_per_item: int = Field(3, gt=0, description="Labels by different annotators on each pair of answers.")
    aggregate: Literal["majority", "dawid-skene", "bradley-terry"] = Field(
        "majority",
        description="How the labels of a pair become one preference: one vote each, or weighed by reliability.",
    )
    store: FilePath | None = Field(
        None,
        description="The label database: a file, or postgresql://user@host/name (the password belongs into PGPASSWORD "
        "or ~/.pgpass); null: labels.sqlite beside the run folders.",
    )
    project: str | None = Field(
        None, description="people: the project in the label database; null: the pipeline's name."
    )
    mode: Literal["pairwise", "ranking"] = Field(
        "pairwise", description="people: two answers at a time on a scale of 1 to 7, or all answers of a prompt ranked."
    )
    policy: Literal["random", "least", "active"] = Field(
        "random", description="people: which item comes next: any, the least labelled, or the least certain."
    )
    uncertain_by: PathOrName | None = Field(
        None,
        description="people: with policy active, the reward run, or model, whose uncertainty orders the items.",
    )
    criteria: list[str] = Field(
        [], description="people: what answers are rated for from 1 to 5, beside the preference."
    )
    gold_share: float = Field(0.07, ge=0, le=0.5, description="people: share of items with a known answer mixed in.")
    lease_seconds: float = Field(900.0, ge=10, description="people: how long an item is kept for a silent annotator.")
    guidelines: FilePath | None = Field(None, description="people: Markdown file of what annotators should look for.")
    labels: int | None = Field(
        None, gt=0, description="people: go on when so many labels are in; null: labels_per_item for every item."
    )
    finish: bool = Field(False, description="people: go on with the labels there are, without waiting for more.")
    min_labels: int = Field(1, gt=0, description="people: refuse to go on with fewer labels than this.")
    app: LabelAppSection = Field(
        default_factory=LabelAppSection, description="Where the labelling app is served while labels are awaited."
    )


# Those of reward.probes: an unknown one is said before a reward model is trained for it.
ProbeName = Literal["empty", "echo", "repeated", "gibberish", "refusal", "flattery", "markdown"]


class GateSection(Section):
    """What a reward model must show on held-out pairs before a policy may climb it; see `reward.trust_gate.Gate`."""

    min_pairs: int = Field(30, gt=0, description="Held-out pairs below which nothing is said.")
    min_accuracy: float = Field(
        0.5, ge=0, le=1, description="What the lower end of held-out accuracy must be above; 0.5 is a coin."
    )
    min_beyond_length: float = Field(
        0.5, ge=0, le=1, description="The same with length taken out, where counting characters gives 0.5 at most."
    )
    max_below_baseline: float = Field(
        0.05, ge=0, le=1, description="How far below length alone or words alone its accuracy may be settled to be."
    )
    max_ece: float = Field(
        0.1, ge=0, le=1, description="Calibration error after temperature scaling, beside what chance makes."
    )
    max_length_correlation: float = Field(
        0.8, ge=0, le=1, description="Rank correlation, either way, of reward and length within a prompt."
    )
    max_probe_rate: float = Field(0.5, ge=0, le=1, description="Share of answers whose reward a probe may raise.")
    min_probe_gain: float = Field(
        0.2, ge=0, description="Mean gain, in standard deviations of rewards, up to which a probe is harmless."
    )
    max_flips: float = Field(0.1, ge=0, le=1, description="Share of pairs that white space at the end may turn round.")
    forgiven_probes: list[ProbeName] = Field(
        [], description="Probes that only warn, such as refusal where the labels prefer refusing."
    )


class RewardSection(EpochSection):
    """The reward model: TRL's RewardTrainer, LoRA + score head on the SFT model."""

    config_class: ClassVar[str] = "trl.RewardConfig"
    base: PathOrName | None = Field(
        None, description="Another model to train on, such as an encoder (hub id or folder); null: the SFT model."
    )
    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate of AdamW.")
    per_device_eval_batch_size: int = Field(32, gt=0, description="Rows a forward pass when scoring held-out answers.")
    margin: bool = Field(False, description="Ask for a gap of at least the label's margin between the two rewards.")
    group_pairs: bool = Field(
        False,
        description="All pairs of a prompt are one element of a batch, and each of its answers is read once; "
        "per_device_train_batch_size then counts prompts.",
    )
    disagreement: Literal["ignore", "soft", "weight"] = Field(
        "ignore",
        description="What labels against the winner do: nothing, make its win a probability, or weigh the pair less.",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="Share of wrong labels that is assumed.")
    ties: Literal["ignore", "davidson", "rao-kupper"] = Field(
        "ignore", description="How tied pairs enter the loss: not at all, or by one of the two likelihoods with ties."
    )
    ensemble: int = Field(
        1, gt=0, description="Score heads, each trained on a reweighting of the prompts; their spread is uncertainty."
    )
    center_rewards_coefficient: float | None = Field(0.01, ge=0, description="Pull towards rewards of mean zero.")
    probed: int = Field(64, gt=0, description="Held-out answers that the trust report's probes are tried on, at most.")
    trust: Literal["enforce", "ignore"] = Field(
        "enforce", description="Whether ppo refuses the reward model where it fails a check of its trust report."
    )
    gate: GateSection = Field(default_factory=GateSection, description="Thresholds of the trust report's checks.")
    aggregate: Literal["mean", "min", "lcb"] = Field(
        "mean",
        description="What of an ensemble ppo climbs: the mean, the least head's score, or a lower confidence bound.",
    )
    lcb_coefficient: float = Field(
        1.0, ge=0, description="Standard deviations over heads that the bound lies below the mean."
    )


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
        True,
        description="Reference log-probabilities once, before training, kept in the cache folder for the next run.",
    )

    @field_validator("loss_type", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class PpoSection(TrainerSection):
    """Proximal policy optimisation on one shared base: policy, value, reward and reference."""

    config_class: ClassVar[str] = "align.ppo.PPOConfig"
    owned_keys: ClassVar[dict[str, str]] = OWNED_KEYS | PPO_OWNED_KEYS
    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate of AdamW.")
    lr_scheduler_type: str = Field("constant_with_warmup", description="Any scheduler of transformers by name.")
    warmup_steps: float = Field(0, ge=0, description="Warm-up, in steps, or as a share of all steps if below 1.")
    max_prompt_length: int = Field(
        512, gt=0, description="Longest prompt in tokens; longer ones are left out and counted."
    )

    total_episodes: int = Field(256, gt=0, description="Episodes (a prompt and its answer) in all, over all processes.")
    num_ppo_epochs: int = Field(2, gt=0, description="Passes over the episodes of an update.")
    num_mini_batches: int = Field(
        1,
        gt=0,
        description="Optimiser steps per pass. An update takes per_device_train_batch_size x "
        "gradient_accumulation_steps x num_mini_batches episodes on each process.",
    )
    rollout_batch_size: int | None = Field(
        None, gt=0, description="Answers sampled at a time; null: all of an update's."
    )
    response_length: int = Field(64, gt=0, description="Longest answer in tokens.")
    temperature: float = Field(1.0, gt=0, description="Of sampling and of log-probabilities alike.")
    stop_token_ids: list[int] | None = Field(
        None, min_length=1, description="Tokens that end an answer; null: the model's and the tokenizer's own."
    )
    old_logprobs: Literal["auto", "recomputed", "rollout"] = Field(
        "auto",
        description="What ratio and KL are taken against: a forward pass of training, or what was sampled; auto: "
        "the latter in float32.",
    )

    rewards: list[PathOrName] = Field(
        ["reward"],
        min_length=1,
        description="What to climb: `reward` (the reward stage's model), `package.module:function`, or the folder or "
        "hub id of a reward model.",
    )
    reward_weights: list[float] | None = Field(None, description="Weight of each reward in their sum; null: 1 each.")
    reward_clip: float | None = Field(None, gt=0, description="Scores are clipped to plus and minus this.")
    missing_eos_penalty: float | None = Field(
        None, ge=0, description="Taken from the score of an answer that did not stop."
    )
    overlong_penalty: float | None = Field(
        None, ge=0, description="Taken from the score of an answer of response_length tokens; less from shorter ones."
    )
    overlong_buffer: int = Field(
        16, gt=0, description="Tokens before response_length over which overlong_penalty grows from 0."
    )
    whiten_rewards: bool = Field(False, description="Scale the shaped rewards of an update to unit variance.")
    whiten_advantages: bool = Field(
        True, description="Shift and scale the advantages of an update to mean 0 and variance 1."
    )

    kl_coef: float = Field(
        0.05, ge=0, description="Weight of the KL penalty in the reward (starting value if adaptive)."
    )
    kl_estimator: Literal["k1", "k2", "k3", "full"] = Field(
        "k1", description="Schulman's estimators of KL(policy || reference), or the KL over the whole vocabulary."
    )
    kl_target: float | None = Field(
        None, gt=0, description="Adapt kl_coef towards this KL (nats per answer); null: fixed."
    )
    kl_horizon: int = Field(10_000, gt=0, description="Episodes over which the adaptive controller acts.")

    gamma: float = Field(1.0, gt=0, le=1, description="Discount.")
    lam: float = Field(0.95, ge=0, le=1, description="Lambda of generalised advantage estimation.")
    cliprange: float = Field(0.2, gt=0, description="Clip range of the policy ratio.")
    cliprange_high: float | None = Field(
        None, gt=0, description="Clip range of the ratio above 1 (clip-higher); null: cliprange."
    )
    dual_clip: float | None = Field(
        None, gt=1, description="Where the advantage is negative, the loss stops growing at this ratio; null: never."
    )
    cliprange_value: float = Field(0.2, gt=0, description="Clip range of the value.")
    vf_coef: float = Field(0.1, ge=0, description="Weight of the value loss.")
    entropy_coef: float = Field(0.0, ge=0, description="Weight of the entropy bonus.")
    ptx_coef: float = Field(
        0.0, ge=0, description="Weight of the loss on data.demonstrations, mixed into every step (PPO-ptx)."
    )
    early_stop_kl: float | None = Field(
        None, gt=0, description="End an update once a mini-batch's approx_kl (nats per token) is above this."
    )
    critic_warmup_updates: int = Field(0, ge=0, description="First updates, which train the critic only.")
    keep_policies: int = Field(
        0,
        ge=0,
        description="Policies kept along the way, evenly spaced; compare then says where the reward was over-climbed.",
    )
    value_adapter: bool = Field(
        False, description="Give the critic a LoRA adapter of its own instead of the policy's hidden states."
    )


class LlmJudgeSection(Section):
    """A language model as judge: it is asked about every pair of answers in both orders."""

    model: PathOrName = Field(
        description="Folder or hub id of a model that is loaded here, or the endpoint's name for it (with base_url)."
    )
    base_url: str | None = Field(
        None, description="An OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1; null: load `model` here."
    )
    api_key_env: str | None = Field(
        None, description="Environment variable that holds the endpoint's key; a key itself never goes into a config."
    )
    guidelines: str | None = Field(None, description="What the judge is told to look at; null: helpfulness and truth.")
    parallel: int = Field(4, gt=0, description="Questions put to an endpoint at a time.")
    timeout: float = Field(60, gt=0, description="Seconds an endpoint has for one answer.")
    retries: int = Field(4, ge=0, description="Times a question is asked again after an error or an unusable answer.")


class CompareSection(GenerationSection):
    """The verdict: every model answers the same held-out prompts."""

    models: list[PathOrName] | None = Field(
        None,
        min_length=2,
        description="Models compared, the first is the one to beat: base, sft, dpo, ppo, a folder, a hub id, or a "
        "JSONL file of answers; null: the base and every policy in `stages`.",
    )
    judges: list[PathOrName] | None = Field(
        None,
        min_length=1,
        description="Who decides, the first is told first: simulated, reward, llm, people, or any other reward as in "
        "ppo.rewards (package.module:function, the folder or hub id of a reward model that ppo never saw); null: "
        "simulated where labels are simulated, and the reward model where there is one.",
    )
    llm: LlmJudgeSection | None = Field(None, description="The judge called llm.")
    max_prompts: int | None = Field(None, gt=0, description="At most this many held-out prompts.")
    max_prompt_length: int = Field(
        512, gt=0, description="Longest prompt in tokens; longer ones are left out and counted."
    )
    tasks: list[FilePath] = Field(
        [], description="JSONL files of tasks with labels, {prompt, label, choices?}: accuracy, F1, precision, recall."
    )
    lm_eval: list[str] = Field([], description="Tasks of lm-eval by name; wants `pip install lm-eval` and their data.")
    checkpoint_prompts: int = Field(
        64, ge=0, description="Prompts on which the policies that ppo kept along the way are looked at; 0: not at all."
    )
    best_of_n: int = Field(
        0, ge=0, description="Answers of the reference a prompt for the best-of-n curve beside ppo's; 0: no curve."
    )
    examples: int = Field(48, ge=0, description="Prompts shown side by side in the report, worst regressions first.")
    blind_pairs: bool = Field(
        False,
        description="Also put the answers, pair by pair and without names, into the label database, for people; the "
        "judge `people` reads their votes back.",
    )


class Config(Section):
    """One pipeline."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Names the folder under `runs`.")
    runs: FilePath = Field(
        "runs", description="Folder that holds all run folders; by default in the working directory."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of every stage.")
    stages: list[StageName] = Field(
        [*STAGES],
        min_length=1,
        description="Stages that `align run` goes through; prepare comes first where its section is there.",
    )
    model: ModelSection = Field(default_factory=ModelSection)
    data: DataSection = Field(default_factory=DataSection)
    prepare: PrepareSection | None = Field(
        None, description="What is done to the data first; null: the stages read the files of `data` as they are."
    )
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
        return [stage for stage in (PREPARE, *STAGES) if stage in stages]

    @model_validator(mode="after")
    def _prepared_or_not(self) -> Self:
        if self.prepare is None:
            if PREPARE in self.stages:
                raise KeyProblem(
                    "stages", "`stages` names prepare, but there is no section `prepare`: add `prepare: {}`"
                )
            return self
        for key in DATA_KEYS:
            if getattr(self.prepare, key) and getattr(self.data, key):
                raise KeyProblem(
                    f"prepare.{key}", f"`prepare.{key}` and `data.{key}` both say where the {key} come from: keep one"
                )
        if PREPARE not in self.stages:
            self.stages = [PREPARE, *self.stages]
        return self

    @model_validator(mode="after")
    def _adapters_on_what_is_quantised(self) -> Self:
        """Quantised weights have no gradient. A reward model on another base is never quantised."""
        for stage in self.stages:
            section = self.section(stage)
            whole = isinstance(section, TrainerSection) and section.adapter is None
            if whole and self.model.quantization is not None and not (stage == "reward" and self.reward.base):
                raise KeyProblem(
                    f"{stage}.adapter",
                    f"`{stage}.adapter` is null, which trains every weight, but the weights under model.quantization "
                    f"cannot be trained: leave {stage}.adapter out, or model.quantization",
                )
        return self

    def compared_models(self) -> list[str]:
        """The models that compare looks at, the one to beat first.

        Raises:
            InputError: a model is named whose stage the pipeline does not have, or there are fewer than two.
        """
        have = ["base", *(name for name in POLICIES if name in self.stages)]
        names = [*(self.compare.models or have)]
        if missing := [name for name in names if name in POLICIES and name not in have]:
            raise InputError(f"compare.models names {', '.join(missing)}, but the stages are {', '.join(self.stages)}.")
        if len(set(names)) < max(2, len(names)):
            raise InputError(f"compare needs at least two different models, but has {', '.join(names)}: add a stage.")
        return names

    def folder(self, stage: str) -> Path:
        """The run folder of a stage: `runs/<name>/<n>-<stage>`, with 0 for prepare."""
        number = (PREPARE, *STAGES).index(typing.cast(StageName, stage))
        return Path(self.runs) / self.name / f"{number}-{stage}"

    def sources(self, key: str) -> list[DataSource]:
        """What the prepare stage makes a file of records from; none where the pipeline has no such records."""
        given: list[DataSource] | None = getattr(self.prepare, key, None)
        path: str | None = getattr(self.data, key)
        return given or ([DataSource(path=path)] if path else [])

    def prepared(self) -> Config:
        """The config of the stages after prepare: they read what it wrote. Without that section, this one."""
        if self.prepare is None:
            return self
        written = {key: str(self.folder(PREPARE) / f"{key}.jsonl") for key in DATA_KEYS if self.sources(key)}
        return self.model_copy(
            update={
                "stages": [stage for stage in self.stages if stage != PREPARE],
                "data": self.data.model_copy(update={**written, "max_rows": None}),
                "prepare": None,
            }
        )

    def section(self, stage: str) -> Section:
        section: Section = getattr(self, stage)
        return section
