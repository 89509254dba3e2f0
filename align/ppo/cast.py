"""The cast of PPO on one shared base: policy, value, reward and reference, holding the base weights once.

With a LoRA policy, one `PeftModel` carries two adapters on the frozen SFT model: "default" (the policy, trained) and
"reward" (frozen). The reference is the same model with adapters off. The value is a linear head on the policy's last
hidden states, so one forward pass serves both. The reward is the reward stage's adapter and score head.

With `adapter: null` the policy is a whole model of its own, and the frozen SFT model beside it plays reference and
carries the reward adapter. A reward model that is itself a whole model is held as a third.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from align import models
from align.config import Config
from align.logprobs import Batch, before_answers, hidden_states, vocabulary_logits
from align.ppo.maths import token_entropy, token_logprobs
from reward.records import InputError, file_digest

VALUE_HEAD = "value_head.safetensors"


class PolicyWithValue(nn.Module):
    """What is trained: the policy's adapter (or weights) and the value head, behind one forward pass.

    It is the module that launchers wrap, so everything with a gradient passes through `forward`.
    """

    def __init__(self, policy: Any, temperature: float) -> None:
        super().__init__()
        self.policy = policy
        self.temperature = temperature
        self.config = policy.config  # launchers size their buffers by it
        hidden = policy.config.get_text_config().hidden_size
        self.value_head = nn.Linear(hidden, 1, device=next(policy.parameters()).device)
        # Zero, not random: before the critic has seen a return, it has no opinion.
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(logprobs_BT, value_BT, entropy_BT) of the batch's answers: nats, reward units, nats; zero off the answer.

        value_BT[b, t] is the value of the state before the t-th answer token: the prompt and the tokens before it.
        """
        hidden_NH = before_answers(hidden_states(self.policy, batch), batch)
        logits_NV = vocabulary_logits(self.policy, hidden_NH)
        logprobs_N = token_logprobs(logits_NV, batch.targets_N, self.temperature)
        with torch.no_grad():
            entropy_N = token_entropy(logits_NV, self.temperature)
        value_N = self.value_head(hidden_NH.to(self.value_head.weight.dtype))[:, 0].float()
        return batch.spread(logprobs_N), batch.spread(value_N), batch.spread(entropy_N)

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        self.policy.gradient_checkpointing_enable(**kwargs)
        self.policy.enable_input_require_grads()

    def save(self, folder: Path) -> None:
        """Write the policy in PEFT or Hugging Face layout and the value head beside it."""
        self.policy.save_pretrained(folder, **({"selected_adapters": ["default"]} if _is_peft(self.policy) else {}))
        save_file({k: v.contiguous() for k, v in self.value_head.state_dict().items()}, folder / VALUE_HEAD)

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote, into this module."""
        if _is_peft(self.policy):
            from peft import set_peft_model_state_dict
            from peft.utils import load_peft_weights

            set_peft_model_state_dict(self.policy, load_peft_weights(str(folder), device="cpu"), "default")
        else:
            weights: dict[str, Tensor] = {}
            for file in folder.glob("model*.safetensors"):
                weights |= load_file(file)
            self.policy.load_state_dict(weights, strict=False)  # tied heads are stored once
            self.policy.tie_weights()
        self.value_head.load_state_dict(load_file(folder / VALUE_HEAD))


class Cast:
    """Everyone PPO needs, built from run folders. `trained` is the only member with gradients."""

    def __init__(
        self, trained: PolicyWithValue, frozen: Any, score_head: Tensor | None, reward_model: Any | None
    ) -> None:
        self.trained, self.frozen = trained, frozen
        self.score_head, self.reward_model = score_head, reward_model

    @torch.no_grad()
    def reference_logprobs(self, batch: Batch) -> Tensor:
        """Log-probabilities BT (nats) of the answers under the reference, at the sampling temperature."""
        with self._adapter(None):
            hidden_NH = before_answers(hidden_states(self.frozen, batch), batch)
            logits_NV = vocabulary_logits(self.frozen, hidden_NH)
        return batch.spread(token_logprobs(logits_NV, batch.targets_N, self.trained.temperature))

    @torch.no_grad()
    def scores(self, batch: Batch) -> Tensor:
        """The reward model's score B of each prompt and answer, read at the answer's last token."""
        last_B = batch.attention_BS.sum(1) - 1
        if self.reward_model is not None:
            logits = self.reward_model(input_ids=batch.ids_BS, attention_mask=batch.attention_BS.long()).logits
            return logits[:, 0].float()
        assert self.score_head is not None
        with self._adapter("reward"):
            hidden_BSH = hidden_states(self.frozen, batch)
        last_BH = hidden_BSH[torch.arange(len(last_B), device=last_B.device), last_B]
        return (last_BH.to(self.score_head.dtype) @ self.score_head[0]).float()

    @contextlib.contextmanager
    def _adapter(self, name: str | None) -> Iterator[None]:
        """Another adapter, or none, for the time of a block; the policy's gradients are as before afterwards."""
        if not _is_peft(self.frozen):
            assert name is None
            yield
            return
        active = self.frozen.active_adapter
        try:
            if name is None:
                with self.frozen.disable_adapter():
                    yield
            else:
                self.frozen.set_adapter(name)
                yield
        finally:
            # PEFT marks whatever adapter is active as trainable.
            self.frozen.set_adapter(active)
            if self.frozen is not self.trained.policy:
                self.frozen.requires_grad_(False)


def build_cast(config: Config, base: str, reward_folder: Path) -> Cast:
    """The cast of a pipeline: policy on `base`, reward from the reward stage's `model` folder.

    Raises:
        InputError: the reward adapter belongs to another base, or its score head is missing.
    """
    from peft import PeftConfig, get_peft_model

    section = config.ppo
    shared_reward = (reward_folder / "adapter_config.json").is_file()
    if shared_reward:
        reward_base = str(PeftConfig.from_pretrained(str(reward_folder)).base_model_name_or_path)
        if not _same_weights(Path(reward_base), Path(base)):
            raise InputError(
                f"the reward model stands on {reward_base}, but the policy on {base}: train `reward` again."
            )
    frozen = models.load_causal_lm(base, config.model)
    frozen.requires_grad_(False)
    if section.adapter:
        policy: Any = get_peft_model(frozen, models.lora_config(section.adapter, "CAUSAL_LM"))
        frozen = policy
    else:
        policy = models.load_causal_lm(base, config.model)
    for module in policy.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # the ratio of new to old policy must measure learning, not dropout
    score_head = None
    if shared_reward:
        frozen, score_head = add_reward(frozen, reward_folder)
        reward_model = None
    else:
        reward_model = models.load_reward_model(str(reward_folder), config.model).eval()
    return Cast(PolicyWithValue(policy, section.temperature), frozen, score_head, reward_model)


def _same_weights(a: Path, b: Path) -> bool:
    """Whether two model folders are one, or copies of one another."""
    if a.resolve() == b.resolve():
        return True
    digests = [{file.name: file_digest(file) for file in folder.glob("*.safetensors")} for folder in (a, b)]
    return bool(digests[0]) and digests[0] == digests[1]


def add_reward(model: Any, folder: Path) -> tuple[Any, Tensor]:
    """Hang a reward stage's adapter on `model` under the name "reward"; returns the model and the score head 1H.

    The adapter was trained on the sequence classifier of the same base, whose decoder has the same module names.

    Raises:
        InputError: weights are missing, left over, or there is no score head.
    """
    from peft import PeftConfig, PeftModel, TaskType, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    weights = load_peft_weights(str(folder), device="cpu")
    heads = [name for name in weights if ".score." in name]
    if len(heads) != 1 or weights[heads[0]].shape[0] != 1:
        raise InputError(f"{folder} has no score head with one output ({len(heads)} found): train `reward` again.")
    head_1H = weights.pop(heads[0]).to(models.device(), torch.float32)
    config = PeftConfig.from_pretrained(str(folder))
    config.task_type, config.modules_to_save, config.inference_mode = TaskType.CAUSAL_LM, None, True
    if _is_peft(model):
        model.add_adapter("reward", config)
    else:
        model = PeftModel(model, config, adapter_name="reward")
    result = set_peft_model_state_dict(model, weights, "reward")
    missing = [key for key in result.missing_keys if ".reward." in key]
    if result.unexpected_keys or missing:
        raise InputError(
            f"{folder} does not fit its base: {len(missing)} weights missing, {len(result.unexpected_keys)} left over."
        )
    for name, parameter in model.named_parameters():
        if ".reward." in name:
            parameter.requires_grad_(False)
    return model, head_1H


def _is_peft(model: Any) -> bool:
    from peft import PeftModel

    return isinstance(model, PeftModel)
