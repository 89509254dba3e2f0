"""Reward training: the Bradley-Terry loss of TRL's RewardTrainer on tokenised pairs.

The model comes in loaded and adapted or not; nothing is fetched here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reward.records import Record


def reward_trainer(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Record],
    arguments: Any,
    adapter: Any | None,
    *,
    margin: bool,
    group_pairs: bool = False,
) -> Any:
    """TRL's trainer on rows `{prompt_ids, chosen_ids, rejected_ids, margin}`; the loss is

        -log sigmoid(r(prompt, chosen) - r(prompt, rejected) [- margin])

    (equation 1 of arXiv 2203.02155, with the margin of arXiv 2307.09288).

    Args:
        adapter: a PEFT config of task type SEQ_CLS that saves the `score` head, or None to train every weight.
        margin: whether the rows' margins enter the loss.
        group_pairs: all pairs of a prompt are one element of a batch, as `reward.grouped` has it.
    """
    from datasets import Dataset
    from trl import RewardTrainer

    if group_pairs:
        from reward.grouped import GroupedRewardTrainer, groups_of

        return GroupedRewardTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(groups_of(rows, margin=margin)),
            processing_class=tokenizer,
            peft_config=adapter,
        )
    columns = [
        {
            "chosen_ids": row["prompt_ids"] + row["chosen_ids"],
            "rejected_ids": row["prompt_ids"] + row["rejected_ids"],
            **({"margin": float(row["margin"])} if margin else {}),
        }
        for row in rows
    ]
    return RewardTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(columns),
        processing_class=tokenizer,
        peft_config=adapter,
    )
