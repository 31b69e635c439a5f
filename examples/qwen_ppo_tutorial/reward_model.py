"""Reward model on pairs of responses, the second stage of RLHF; its flags are in mindrlhf/cli/reward.py."""

from __future__ import annotations

from mindrlhf.cli.reward import command

if __name__ == "__main__":
    command()
