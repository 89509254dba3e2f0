"""PPO on one shared base: pure maths, the cast of adapters, rollouts and the trainer."""
