"""Supervised fine-tuning, the first stage of RLHF; its flags are in mindrlhf/cli/sft.py."""

from __future__ import annotations

from mindrlhf.cli.sft import command

if __name__ == "__main__":
    command()
