"""Preference records, aggregation of labels, reward training, scoring and trust."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reward.scoring import RewardScores, score

__all__ = ["RewardScores", "score"]


def __getattr__(name: str) -> Any:
    # Records are read where nothing is scored, and numpy takes a tenth of a second to import.
    if name in __all__:
        from reward import scoring

        return getattr(scoring, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
