"""CValues jsonl -> MindRecord prompt data set; its flags are in mindrlhf/cli/data.py."""

from __future__ import annotations

from mindrlhf.cli.data import command

if __name__ == "__main__":
    command()
