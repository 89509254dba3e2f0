"""K-wise reward training: all pairs of one prompt are one element, and each of its answers is read once.

A prompt with K ranked answers has up to K (K - 1) / 2 pairs. Shuffled into a batch of their own, each would pass the
prompt and both answers through the model again, and a model that sees an answer K - 1 times an epoch overfits it
(section 3.5 of arXiv 2203.02155). Here the answers of a prompt are the rows, and the loss is taken over its pairs:

    mean over prompts of  mean over the prompt's pairs of  -log sigmoid(r_chosen - r_rejected [- margin])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from trl import RewardTrainer

from reward.records import Record


def groups_of(rows: Sequence[Record], *, margin: bool) -> list[Record]:
    """Elements `{answers, pairs, margins}`, one a prompt, in order of first appearance.

    answers: distinct rows prompt + answer, as tokens. pairs: (chosen, rejected) as indices into them.

    Args:
        rows: `{prompt_ids, chosen_ids, rejected_ids, margin}`.
        margin: whether margins are taken; else they are 0.
    """
    groups: dict[tuple[int, ...], Record] = {}
    numbers: dict[tuple[int, ...], dict[tuple[int, ...], int]] = {}
    for row in rows:
        prompt = tuple(row["prompt_ids"])
        group = groups.setdefault(prompt, {"answers": [], "pairs": [], "margins": []})
        known = numbers.setdefault(prompt, {})
        pair = []
        for side in ("chosen_ids", "rejected_ids"):
            answer = tuple(row[side])
            if answer not in known:
                known[answer] = len(known)
                group["answers"].append([*prompt, *answer])
            pair.append(known[answer])
        group["pairs"].append(pair)
        group["margins"].append(float(row["margin"]) if margin else 0.0)
    return list(groups.values())


def group_loss(
    reward_R: Tensor, pairs_P2: Tensor, margin_P: Tensor, weight_P: Tensor, center_rewards_coefficient: float | None
) -> Tensor:
    """The loss of the rows' rewards, a scalar.

    Args:
        pairs_P2: (chosen, rejected) as indices into the R rewards.
        weight_P: each pair's share of the batch, 1 in all.
        center_rewards_coefficient: weight of the squared sum of a pair's rewards, as in TRL.
    """
    chosen_P, rejected_P = reward_R[pairs_P2[:, 0]], reward_R[pairs_P2[:, 1]]
    loss_P = -logsigmoid(chosen_P - rejected_P - margin_P)
    if center_rewards_coefficient is not None:
        loss_P = loss_P + center_rewards_coefficient * (chosen_P + rejected_P) ** 2
    return (weight_P * loss_P).sum()


class GroupedRewardTrainer(RewardTrainer):
    """TRL's RewardTrainer on the elements of `groups_of`; a batch is so many prompts."""

    def __init__(self, *, processing_class: Any, **settings: Any) -> None:
        pad_id = processing_class.pad_token_id
        super().__init__(
            processing_class=processing_class, data_collator=lambda rows: collate(rows, pad_id), **settings
        )

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["answers", "pairs", "margins"]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        pairs_P2, margin_P, weight_P = (inputs[name] for name in ("pairs", "margins", "weights"))
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        reward_R = outputs.logits.squeeze(-1).float()
        loss = group_loss(reward_R, pairs_P2, margin_P, weight_P, self.args.center_rewards_coefficient)
        with torch.no_grad():
            gap_P = reward_R[pairs_P2[:, 0]] - reward_R[pairs_P2[:, 1]]
            figures = {
                "accuracy": (gap_P > 0).float().mean(),
                "margin": gap_P.mean(),
                "mean_reward": reward_R.mean(),
                "pairs": torch.tensor(float(len(pairs_P2)), device=loss.device),
            }
            for name, figure in figures.items():
                everywhere = self.accelerator.gather_for_metrics(figure).mean()
                self._metrics["train" if self.model.training else "eval"][name].append(everywhere.item())
        return (loss, outputs) if return_outputs else loss


def collate(elements: Sequence[Record], pad_id: int) -> dict[str, Tensor]:
    """One batch of all answers of the elements, padded right, and their pairs."""
    rows = [torch.tensor(answer) for element in elements for answer in element["answers"]]
    ids_RS = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
    attention_RS = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    pairs, margins, weights, first = [], [], [], 0
    for element in elements:
        pairs += [[first + chosen, first + rejected] for chosen, rejected in element["pairs"]]
        margins += element["margins"]
        weights += [1 / len(elements) / len(element["pairs"])] * len(element["pairs"])
        first += len(element["answers"])
    return {
        "input_ids": ids_RS,
        "attention_mask": attention_RS,
        "pairs": torch.tensor(pairs),
        "margins": torch.tensor(margins),
        "weights": torch.tensor(weights),
    }
