"""A lean vocabulary head under TRL's trainers, for CPUs.

TRL 1.16 asks the model for per-token log-probabilities (`fused_lm_head=True`) instead of logits. On a GPU its kernels
project only the labelled positions; elsewhere it projects every position, prompts included, in tiles that are computed
again in the backward pass. This head projects the labelled positions only, and keeps their logits when they are few.
The numbers are the same; a test holds them against TRL's own.
"""

from __future__ import annotations

import types
from typing import Any

from torch import Tensor

from align.logprobs import base_model, token_figures


def lean_head(model: Any) -> None:
    """Replace TRL's head on `model` (a causal LM, adapted or not), which must lie on a CPU; elsewhere do nothing.

    Call it after the trainer is built. Calls without `fused_lm_head=True` reach the model as before.
    """
    model = base_model(model)
    if next(model.parameters()).device.type != "cpu":
        return
    from trl.trainer.utils import FusedCausalLMOutput

    trl_forward = model.forward

    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **kwargs: Any) -> Any:
        routed = getattr(self.config, "output_router_logits", False)
        if not fused_lm_head or labels is None or routed or "shift_labels" in kwargs:
            return trl_forward(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        items = kwargs.pop("num_items_in_batch", None)
        kwargs["use_cache"] = False
        hidden_BSH = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        labels_BS = labels[:, 1:]
        answer_BS = labels_BS != -100
        per_token = token_figures(self, hidden_BSH[answer_BS], labels_BS[answer_BS])
        # masked_scatter keeps the graph connected when no position is labelled.
        log_probs, entropy, mean_logits, is_top1 = (
            values_N.new_zeros(answer_BS.shape).masked_scatter(answer_BS, values_N) for values_N in per_token
        )
        return FusedCausalLMOutput(
            loss=-log_probs.sum() / (answer_BS.sum().clamp(min=1) if items is None else items),
            log_probs=log_probs,
            entropy=entropy,
            mean_logits=mean_logits,
            is_top1=is_top1,
            label_mask=answer_BS,
        )

    model.forward = types.MethodType(forward, model)
