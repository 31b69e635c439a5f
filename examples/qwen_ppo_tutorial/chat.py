"""Talks to a checkpoint, or to two side by side; its flags are in mindrlhf/cli/chat.py."""

from __future__ import annotations

from mindrlhf.cli.chat import command

if __name__ == "__main__":
    command()
