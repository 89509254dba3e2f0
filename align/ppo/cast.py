"""The cast of PPO: policy, value, reference and reward, holding the base weights once where that is possible.

With a LoRA policy one `PeftModel` carries the adapters: "default" (the policy, trained), "reward" (frozen) and, if
asked for, "value" (trained). The reference is the same model with adapters off. By default the value is a linear head
on the policy's own last hidden states, so that one forward pass serves both.

Without an adapter the policy is a whole model, and a frozen copy of it is the reference. A reward may also be a model
of its own on any base, a function, or a weighted sum of several: see `align.ppo.rewards`.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from align import reward_heads
from align.logprobs import (
    Batch,
    base_model,
    by_tiles,
    collate,
    hidden_states,
    states_before_answers,
    target_logprobs,
    token_figures,
    vocabulary_logits,
)
from align.ppo.maths import full_kl, token_entropy, token_logprobs
from align.ppo.rewards import Episodes, Mixture, ModelReward, Reward, as_reward, same_tokenizer
from align.quantised import same_base
from reward.records import InputError, file_digest
from reward.scoring import Aggregate, RewardScores

VALUE_HEAD = "value_head.safetensors"


class PolicyOutput(NamedTuple):
    """What one forward pass tells of the answers of a batch; zero off the answer."""

    logprobs_BT: Tensor  # nats, at the sampling temperature
    value_BT: Tensor  # of the state before the t-th answer token, in reward units
    entropy_BT: Tensor  # nats, at the sampling temperature
    ptx_nll: Tensor  # scalar: summed negative log-likelihood of the demonstrations' answers, in nats; 0 without them


class Views(NamedTuple):
    """What policy, value and reference say of the episodes at rollout time."""

    logprobs_BT: Tensor
    ref_logprobs_BT: Tensor
    value_BT: Tensor
    entropy_BT: Tensor
    kl_BT: Tensor | None  # the full KL, where it was asked for


class PolicyWithValue(nn.Module):
    """What is trained: the policy's adapter (or weights) and the critic, behind one forward pass.

    It is the module that launchers wrap, so everything with a gradient passes through `forward`.

    Args:
        value_adapter: the critic has an adapter "value" of its own on `policy` instead of sharing the policy's.
    """

    def __init__(self, policy: Any, temperature: float, value_adapter: bool = False) -> None:
        super().__init__()
        self.policy = policy
        self.temperature = temperature
        self.value_adapter = value_adapter
        self.config = policy.config  # launchers size their buffers by it
        hidden = policy.config.get_text_config().hidden_size
        self.value_head = nn.Linear(hidden, 1, device=next(policy.parameters()).device)
        # Zero, not random: before the critic has seen a return, it has no opinion.
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(
        self, batch: Batch, ptx: Batch | None = None, with_entropy: bool = False, critic_only: bool = False
    ) -> PolicyOutput:
        """One pass over `batch`, and one over the demonstrations `ptx`.

        Args:
            with_entropy: the entropy is part of the loss; else it is not computed, and 0.
            critic_only: keep the value's gradient out of a trunk that the policy shares.
        """
        hidden_NH = states_before_answers(self.policy, batch)

        if with_entropy:
            logprobs_N, entropy_N = by_tiles(self._logprobs_and_entropy, hidden_NH, batch.targets_N)
        else:
            logprobs_N = target_logprobs(self.policy, hidden_NH, batch.targets_N, self.temperature)
            entropy_N = torch.zeros_like(logprobs_N)
        ptx_nll = logprobs_N.new_zeros(())
        if ptx is not None:
            ptx_NH = states_before_answers(self.policy, ptx)
            ptx_nll = -target_logprobs(self.policy, ptx_NH, ptx.targets_N).sum()
        value_NH = self._value_states(batch) if self.value_adapter else hidden_NH
        if critic_only and not self.value_adapter:
            value_NH = value_NH.detach()
        value_N = self.value_of(value_NH)
        return PolicyOutput(batch.spread(logprobs_N), batch.spread(value_N), batch.spread(entropy_N), ptx_nll)

    def _logprobs_and_entropy(self, hidden_NH: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        logits_NV = vocabulary_logits(self.policy, hidden_NH)
        return token_logprobs(logits_NV, targets_N, self.temperature), token_entropy(logits_NV, self.temperature)

    def values(self, batch: Batch, hidden_NH: Tensor) -> Tensor:
        """Values N from the policy's hidden states, or from the critic's own where it has an adapter."""
        return self.value_of(self._value_states(batch) if self.value_adapter else hidden_NH)

    def value_of(self, value_NH: Tensor) -> Tensor:
        """Values N of the critic's own hidden states, in f32."""
        return self.value_head(value_NH.to(self.value_head.weight.dtype))[:, 0].float()

    def _value_states(self, batch: Batch) -> Tensor:
        with switched(self.policy, "value"):
            return states_before_answers(self.policy, batch)

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        if self.value_adapter:
            raise InputError(
                "gradient_checkpointing computes layers again when another adapter may be active: switch it off, or "
                "let the critic share the policy's adapter (value_adapter: false)."
            )
        self.policy.gradient_checkpointing_enable(**kwargs)
        if is_peft(self.policy):
            self.policy.enable_input_require_grads()

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that are trained; none where the whole policy is."""
        return ["default", *(["value"] if self.value_adapter else [])] if is_peft(self.policy) else []

    def save(self, folder: Path) -> None:
        """Write the policy in PEFT or Hugging Face layout and the critic beside it."""
        self.policy.save_pretrained(folder, **({"selected_adapters": self.adapters} if self.adapters else {}))
        save_file({k: v.contiguous() for k, v in self.value_head.state_dict().items()}, folder / VALUE_HEAD)

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote, into this module."""
        from peft import set_peft_model_state_dict
        from peft.utils import load_peft_weights

        for name in self.adapters:
            place = folder if name == "default" else folder / name
            set_peft_model_state_dict(self.policy, load_peft_weights(str(place), device="cpu"), name)
        if not self.adapters:
            weights: dict[str, Tensor] = {}
            for file in folder.glob("model*.safetensors"):
                weights |= load_file(file)
            self.policy.load_state_dict(weights, strict=False)  # tied heads are stored once
            self.policy.tie_weights()
        self.value_head.load_state_dict(load_file(folder / VALUE_HEAD))


class Cast:
    """Everyone PPO needs. `trained` is the only member with gradients.

    Args:
        reference: the policy's own `PeftModel`, which is the reference with its adapters off, or a frozen model.
        rewards: what the policy is to climb.
    """

    def __init__(self, trained: PolicyWithValue, reference: Any, rewards: Mixture) -> None:
        self.trained, self.reference, self.rewards = trained, reference, rewards

    @torch.no_grad()
    def look(self, batch: Batch, with_full_kl: bool = False) -> Views:
        """Policy, value and reference of a batch; no vocabulary row outlives its tile."""
        policy, temperature = self.trained.policy, self.trained.temperature
        hidden_NH = states_before_answers(policy, batch)
        ref_NH = self._reference_states(batch)
        policy_figures = token_figures(policy, hidden_NH, batch.targets_N, temperature)
        ref_N = target_logprobs(self.reference, ref_NH, batch.targets_N, temperature)
        value_N = self.trained.values(batch, hidden_NH)
        kl_BT = None
        if with_full_kl:

            def full(hidden_NH: Tensor, ref_NH: Tensor) -> tuple[Tensor]:
                logits_NV, ref_NV = vocabulary_logits(policy, hidden_NH), vocabulary_logits(self.reference, ref_NH)
                return (full_kl(logits_NV, ref_NV, temperature),)

            kl_BT = batch.spread(by_tiles(full, hidden_NH, ref_NH)[0])
        return Views(
            batch.spread(policy_figures.logprobs_N),
            batch.spread(ref_N),
            batch.spread(value_N),
            batch.spread(policy_figures.entropy_N),
            kl_BT,
        )

    @torch.no_grad()
    def judge_states(self, hidden_BH: Tensor, logprobs_BV: Tensor) -> Tensor:
        """(value, entropy in nats) of the states that the sampler passes through, B2; for a critic without an adapter
        of its own.

        Args:
            logprobs_BV: of every token, at the sampling temperature.
        """
        finite_BV = logprobs_BV.clamp(
            min=torch.finfo(logprobs_BV.dtype).min
        )  # a forbidden token: 0 x -inf is no number
        entropy_B = -torch.linalg.vecdot(logprobs_BV.exp(), finite_BV)
        return torch.stack([self.trained.value_of(hidden_BH), entropy_B], dim=1)

    @torch.no_grad()
    def reference_logprobs(self, batch: Batch) -> Tensor:
        """Log-probabilities BT (nats) of the answers under the reference, at the sampling temperature."""
        ref_NH = self._reference_states(batch)
        return batch.spread(target_logprobs(self.reference, ref_NH, batch.targets_N, self.trained.temperature))

    def _reference_states(self, batch: Batch) -> Tensor:
        with switched(self.reference, None) if is_peft(self.reference) else contextlib.nullcontext():
            return states_before_answers(self.reference, batch)


class AdapterReward:
    """The reward stage's adapter "reward" and score heads MH on `model`, which other roles share.

    It reads the policy's tokens as they are, at the answer's last one.

    Attributes:
        aggregate, lcb_coefficient: how the scores of several heads become one.
        spread: standard deviation over heads of each answer scored last.
    """

    name = "reward_model"
    aggregate: Aggregate = "mean"
    lcb_coefficient = 1.0
    spread: Sequence[float] = ()

    def __init__(self, model: Any, heads_MH: Tensor, batch_size: int) -> None:
        self.model, self.heads_MH, self.batch_size = model, heads_MH, batch_size

    @torch.no_grad()
    def __call__(self, episodes: Episodes) -> list[float | None]:
        pairs = list(zip(episodes.prompt_ids, episodes.completion_ids, strict=True))
        device = next(self.model.parameters()).device
        per_head_BM = torch.empty(len(pairs), len(self.heads_MH), dtype=torch.float64)
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
        with switched(self.model, "reward"):
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                per_head_BM[rows] = self._scores(collate([pairs[i] for i in rows], 0, device)).double().cpu()
        scores = RewardScores.of(per_head_BM.numpy())
        self.spread = scores.std.tolist()
        return list(scores.aggregated(self.aggregate, self.lcb_coefficient).tolist())

    def _scores(self, batch: Batch) -> Tensor:
        """Scores BM."""
        hidden_BSH = hidden_states(self.model, batch)
        last_B = batch.attention_BS.sum(1) - 1
        last_BH = hidden_BSH[torch.arange(len(last_B), device=last_B.device), last_B]
        return last_BH.float() @ self.heads_MH.to(last_BH.device).T


@contextlib.contextmanager
def switched(model: Any, adapter: str | None) -> Iterator[None]:
    """Another adapter of a `PeftModel`, or none, for the time of a block; what has gradients stays as it was."""
    active = model.active_adapter
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        if adapter is None:
            with model.disable_adapter():
                yield
        else:
            model.set_adapter(adapter)
            _only(model, trained)
            yield
    finally:
        model.set_adapter(active)  # PEFT marks whatever adapter is active as trainable, and the others as not
        _only(model, trained)


def _only(model: Any, trained: Sequence[nn.Parameter]) -> None:
    keep = {id(parameter) for parameter in trained}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in keep)


def build_cast(
    model: Any,
    rewards: Sequence[Any],
    tokenizer: Any,
    *,
    peft_config: Any = None,
    temperature: float = 1.0,
    value_adapter: bool = False,
    reward_weights: Sequence[float] | None = None,
    reward_tokenizers: Sequence[Any] | None = None,
    batch_size: int = 16,
    aggregate: Aggregate = "mean",
    lcb_coefficient: float = 1.0,
) -> Cast:
    """The cast around a policy.

    Args:
        model: a `PreTrainedModel` (trained whole, or under `peft_config`), or a `PeftModel` whose active adapter,
            named "default", is trained.
        rewards: each as `as_reward` takes it. A folder with a PEFT adapter on the policy's own base is hung on that
            base instead of being loaded beside it.
        reward_tokenizers: for rewards given as loaded models; None for the others.
        batch_size: rows a forward pass of a reward model.
        aggregate, lcb_coefficient: how the heads of a reward model become one score, as `RewardScores.aggregated` has
            it.

    Raises:
        InputError: a reward does not fit, or `value_adapter` without an adapter.
    """
    from peft import get_peft_model

    if is_peft(model):
        if peft_config is not None:
            raise InputError("the model is a PeftModel and a peft_config is given as well: give one of the two.")
        if model.active_adapters != ["default"]:
            raise InputError(
                f"the policy's active adapters are {model.active_adapters}: one, named 'default', is trained."
            )
        peft_config = model.peft_config["default"]
    if peft_config is not None and type(peft_config).__name__ != "LoraConfig":
        raise InputError(f"the policy's adapter is a {type(peft_config).__name__}; PPO trains LoRA or every weight.")
    if peft_config is not None and not is_peft(model):
        model.requires_grad_(False)
        model = get_peft_model(model, peft_config)
    if is_peft(model):
        _check_trained(model)
        reference = model
    else:
        if value_adapter:
            raise InputError("value_adapter puts the critic in an adapter of its own, but the policy has none.")
        reference = copy.deepcopy(model).eval().requires_grad_(False)
    tokenizers = list(reward_tokenizers) if reward_tokenizers else [None] * len(rewards)
    if len(tokenizers) != len(rewards):
        raise InputError(
            f"there are {len(tokenizers)} reward tokenizers for {len(rewards)} rewards: give one for each."
        )
    named: list[Reward] = []
    for thing, reward_tokenizer in zip(rewards, tokenizers, strict=True):
        if isinstance(thing, (str, Path)) and _is_adapter_on(thing, model):
            if any(isinstance(r, AdapterReward) for r in named):
                raise InputError(f"{thing} is a second reward adapter on the policy's base: one can share it.")
            _same_tokenizer(Path(thing), tokenizer)
            reference, heads_MH = add_reward(reference, Path(thing))
            named.append(AdapterReward(reference, heads_MH, batch_size))
        else:
            named.append(as_reward(thing, reward_tokenizer, batch_size=batch_size))
        if isinstance(judge := named[-1], (AdapterReward, ModelReward)):
            judge.aggregate, judge.lcb_coefficient = aggregate, lcb_coefficient
    if value_adapter:
        active = model.active_adapter
        model.add_adapter("value", copy.deepcopy(peft_config))
        model.set_adapter(active)
        for name, parameter in model.named_parameters():
            if belongs(name, "value"):
                parameter.requires_grad_(True)
    for member in (model, reference):
        _no_dropout(member)
    trained = PolicyWithValue(model, temperature, value_adapter)
    return Cast(trained, model if is_peft(model) else reference, Mixture(named, reward_weights))


def belongs(name: str, adapter: str) -> bool:
    """Whether the parameter of this name is one of a PEFT adapter's."""
    return re.search(rf"\.(lora_\w+|modules_to_save|trainable_tokens_\w+)\.{adapter}(\.|$)", name) is not None


def _check_trained(model: Any) -> None:
    """Refuse a `PeftModel` that would not learn, or whose reference would."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        raise InputError(
            "the policy's adapter is frozen, so that PPO could only train the critic: load it with "
            "PeftModel.from_pretrained(base, folder, is_trainable=True)."
        )
    if others := [name for name in trained if not belongs(name, "default")]:
        raise InputError(
            f"{len(others)} weights beside the policy's adapter would be trained ({others[0]}, ...), but they are the "
            "reference's too, which must not move: freeze them (bias: none in a LoraConfig)."
        )


def _no_dropout(model: Any) -> None:
    """The ratio of new to old policy must measure learning, and a reward the answer: not dropout."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # models that call the function keep its share as a number
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _is_adapter_on(folder: str | Path, model: Any) -> bool:
    """Whether `folder` holds a PEFT adapter whose base has the same weights as the policy's, quantised alike."""
    from peft import PeftConfig

    if not (Path(folder) / "adapter_config.json").is_file() or not same_base(str(folder), model):
        return False
    its, ours = str(PeftConfig.from_pretrained(str(folder)).base_model_name_or_path), base_model(model).name_or_path
    return its == ours or same_weights(Path(its), Path(ours))


def same_weights(a: Path, b: Path) -> bool:
    """Whether two model folders are one, or copies of one another."""
    if a.resolve() == b.resolve():
        return True
    digests = [{file.name: file_digest(file) for file in folder.glob("*.safetensors")} for folder in (a, b)]
    return bool(digests[0]) and digests[0] == digests[1]


def _same_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Refuse a reward adapter trained on other tokens than the policy's; a folder without tokenizer has its base's."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer_config.json").is_file():
        return
    if difference := same_tokenizer(tokenizer, AutoTokenizer.from_pretrained(str(folder))):
        raise InputError(
            f"the reward adapter {folder} reads the policy's tokens, but was trained with another tokenizer: "
            f"{difference}. Train it again on the policy's."
        )


def add_reward(model: Any, folder: Path) -> tuple[Any, Tensor]:
    """Hang a reward stage's adapter on `model` under the name "reward"; returns the model and its score heads MH.

    The adapter was trained on the sequence classifier of the same base, whose decoder has the same module names.

    Raises:
        InputError: weights are missing, left over, or there is no score head with one output.
    """
    from peft import PeftConfig, PeftModel, TaskType, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    weights = load_peft_weights(str(folder), device="cpu")
    heads = [name for name in weights if ".score." in name]
    if len(heads) != 1:
        raise InputError(f"{folder} has no score head with one output ({len(heads)} found): train `reward` again.")
    if weights[heads[0]].shape[0] != 1:
        raise InputError(f"{folder} has {weights[heads[0]].shape[0]} labels: a reward model has one.")
    mean_1H, several = weights.pop(heads[0]), reward_heads.load(folder)
    heads_MH = (mean_1H if several is None else several[0]).to(next(model.parameters()).device, torch.float32)
    config = PeftConfig.from_pretrained(str(folder))
    config.task_type, config.modules_to_save, config.inference_mode = TaskType.CAUSAL_LM, None, True
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if is_peft(model):
        active = model.active_adapter
        model.add_adapter("reward", config)
        model.set_adapter(active)
    else:
        model = PeftModel(model, config, adapter_name="reward")
    result = set_peft_model_state_dict(model, weights, "reward")
    missing = [key for key in result.missing_keys if ".reward." in key]
    if result.unexpected_keys or missing:
        raise InputError(
            f"{folder} does not fit its base: {len(missing)} weights missing, {len(result.unexpected_keys)} left over."
        )
    _only(model, trained)
    return model, heads_MH


def is_peft(model: Any) -> bool:
    from peft import PeftModel

    return isinstance(model, PeftModel)
