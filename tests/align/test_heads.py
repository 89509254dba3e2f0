"""The lean head gives TRL's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from align import heads, logprobs

OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")


def run(tiny_model: Path, lean: bool, labels: torch.Tensor, **extra: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    add_fused_lm_head(model, outputs=OUTPUTS)
    if lean:
        heads.lean_head(model)
    ids = torch.arange(3 * 11).reshape(3, 11) % 200 + 3
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, fused_lm_head=True, **extra)
    output.loss.backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tile", [2048, 4])
@pytest.mark.parametrize("extra", [{}, {"num_items_in_batch": 7}])
def test_equal_to_trl(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tile: int, extra: dict[str, int]) -> None:
    monkeypatch.setattr(logprobs, "TILE", tile)
    labels = torch.arange(3 * 11).reshape(3, 11) % 200 + 3
    labels[0, :5] = labels[1, :8] = labels[2, 9:] = -100
    (theirs, their_grads), (ours, our_grads) = (run(tiny_model, lean, labels, **extra) for lean in (False, True))
    for name in (*OUTPUTS, "loss"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=1e-5, rtol=0, check_dtype=False)
    assert torch.equal(ours.label_mask, theirs.label_mask)
    assert their_grads.keys() == our_grads.keys()
    for name, gradient in their_grads.items():
        torch.testing.assert_close(our_grads[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_nothing_labelled_is_a_differentiable_zero(tiny_model: Path) -> None:
    output, gradients = run(tiny_model, True, torch.full((3, 11), -100))
    assert output.loss == 0
    assert all((gradient == 0).all() for gradient in gradients.values())


def test_plain_calls_reach_the_model_as_before(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.arange(6)[None] + 3
    expected = model(input_ids=ids, labels=ids)
    add_fused_lm_head(model, outputs=OUTPUTS)
    heads.lean_head(model)
    found = model(input_ids=ids, labels=ids)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 10)
