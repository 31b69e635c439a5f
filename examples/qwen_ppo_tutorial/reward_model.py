"""The reward model, trained on pairs of responses: the second stage of RLHF.

Its flags are those of mindrlhf/cli/reward_model.py.
"""

from __future__ import annotations

from mindrlhf.cli.reward_model import command

if __name__ == "__main__":
    command()
