"""Qwen2 weights between Hugging Face and MindSpore; its flags are in mindrlhf/cli/convert.py."""

from __future__ import annotations

from mindrlhf.cli.convert import command

if __name__ == "__main__":
    command()
