"""Reinforcement learning from human feedback on MindSpore: weights in, data in, PPO, checkpoints out."""

from __future__ import annotations

__version__ = "0.1.0"
