"""PPO on `transformers.Trainer`: pure maths, the cast of adapters, rollouts, rewards, diagnosis and the trainer.

from align.ppo import PPOConfig, PPOTrainer
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align.ppo.config import PPOConfig
    from align.ppo.trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer"]


def __getattr__(name: str) -> Any:
    """Imported when first asked for: the maths alone must not cost the libraries' seconds."""
    if name == "PPOConfig":
        from align.ppo.config import PPOConfig

        return PPOConfig
    if name == "PPOTrainer":
        from align.ppo.trainer import PPOTrainer

        return PPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
