"""PPO on Qwen2, training and inference in one job; its flags are in mindrlhf/cli/ppo.py."""

from __future__ import annotations

from mindrlhf.cli.ppo import command

if __name__ == "__main__":
    command()
