"""Reward training on TRL's RewardTrainer: tokenised pairs, ties and whole rankings, for one head or several.

The model comes in loaded and adapted or not; nothing is fetched here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from trl import RewardTrainer

from reward.elements import Labels, collate, elements_of
from reward.losses import likelihood, preference_loss
from reward.records import Record

MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def reward_trainer(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Record],
    arguments: Any,
    adapter: Any | None,
    labels: Labels,
    *,
    encoder: bool = False,
) -> Any:
    """A trainer on rows as `reward.elements.elements_of` takes them. In the plain case the loss is TRL's own,

        -log sigmoid(r(prompt, chosen) - r(prompt, rejected) [- margin])

    (equation 1 of arXiv 2203.02155, with the margin of arXiv 2307.09288); else it is that of `reward.losses`, which is
    the same where nothing more is asked of it.

    Args:
        model: a sequence classifier with as many outputs as `labels.ensemble`.
        adapter: a PEFT config of task type SEQ_CLS that saves the score head, or None to train every weight.
        encoder: the model is one, and reads prompt and answer as two texts.

    Raises:
        InputError: as `elements_of`.
    """
    from datasets import Dataset

    own = {"model": model, "args": arguments, "processing_class": tokenizer, "peft_config": adapter}
    if not labels.plain or encoder:
        elements = Dataset.from_list(elements_of(rows, labels))
        tied = sum(bool(row.get("tied")) for row in rows) / len(rows)
        return PreferenceTrainer(labels, tied, encoder, train_dataset=elements, **own)
    columns = [
        {
            "chosen_ids": row["prompt_ids"] + row["chosen_ids"],
            "rejected_ids": row["prompt_ids"] + row["rejected_ids"],
            **({"margin": float(row["margin"])} if labels.margin else {}),
        }
        for row in rows
    ]
    return RewardTrainer(train_dataset=Dataset.from_list(columns), **own)


class PreferenceTrainer(RewardTrainer):
    """TRL's RewardTrainer on the elements of `elements_of`; a batch is so many elements.

    Args:
        tie_share: share of ties among the pairs.
    """

    def __init__(
        self, labels: Labels, tie_share: float, encoder: bool, *, processing_class: Any, **settings: Any
    ) -> None:
        pad_id = processing_class.pad_token_id
        segments = encoder and "token_type_ids" in processing_class.model_input_names
        self.encoder = encoder
        self.likelihood = likelihood(labels.ties, tie_share)
        super().__init__(
            processing_class=processing_class,
            data_collator=lambda rows: collate(rows, pad_id, segments=segments),
            **settings,
        )

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        names = ["answers", "prompt_sizes", "pairs", "outcomes", "margins", "weights", "draws"]
        self._signature_columns = names

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        given = {name: inputs[name] for name in MODEL_INPUTS if name in inputs}
        if not self.encoder:
            given["use_cache"] = False
        outputs = model(**given)
        reward_RM, pairs_P2 = outputs.logits.float(), inputs["pairs"]
        loss = preference_loss(
            reward_RM,
            pairs_P2,
            inputs["outcomes"],
            margin_P=inputs["margins"],
            weight_P=inputs["weights"],
            draw_PM=inputs["draws"],
            likelihood=self.likelihood,
            center_rewards_coefficient=self.args.center_rewards_coefficient,
        )
        self._note(reward_RM.detach(), pairs_P2, inputs["outcomes"])
        return (loss, outputs) if return_outputs else loss

    def _note(self, reward_RM: torch.Tensor, pairs_P2: torch.Tensor, outcome_P3: torch.Tensor) -> None:
        """The figures of a batch over all processes: every pair, and every answer, counts as much as any other."""
        mean_R = reward_RM.mean(1)
        gap_P = mean_R[pairs_P2[:, 0]] - mean_R[pairs_P2[:, 1]]
        gap_D = gap_P[outcome_P3[:, 1] == 0]  # D pairs that are no ties
        several = reward_RM.shape[1] > 1
        spread_R = reward_RM.std(1) if several else torch.zeros_like(mean_R)
        sums = [(gap_D > 0).float().sum(), gap_D.sum(), mean_R.sum(), spread_R.sum()]
        counts = [gap_P.new_tensor(float(len(counted))) for counted in (gap_D, mean_R, gap_P)]
        everywhere = self.accelerator.gather(torch.stack([*sums, *counts])[None]).sum(0).tolist()
        right, gaps, rewards, spreads, decided, answers, pairs = everywhere
        figures = {
            # Of a batch with ties alone there is no accuracy: it counts as a coin's.
            "accuracy": right / decided if decided else 0.5,
            "margin": gaps / decided if decided else 0.0,
            "mean_reward": rewards / answers,
            "pairs": pairs,
            **({"spread": spreads / answers} if several else {}),
        }
        for name, figure in figures.items():
            self._metrics["train" if self.model.training else "eval"][name].append(figure)
