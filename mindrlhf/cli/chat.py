"""Talks to a Qwen2 checkpoint, or to two side by side; answers a file of prompts.

    chat.py --checkpoint HF_DIR
    chat.py --checkpoint HF_DIR --compare runs/NAME
    chat.py --checkpoint weights.ckpt --config generate_X.yaml --tokenizer_path DIR
    chat.py --checkpoint HF_DIR --prompt_file prompts.jsonl --output_file replies.jsonl

Messages come from standard input, one per line: /reset forgets the conversation, /quit ends it. Under msrun
all workers hold a part of the model, and worker 0 talks. `mindrlhf-chat` is the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from mindrlhf.configs.flags import CHAT_GROUPS, ChatOptions
from mindrlhf.configs.parser import add_flags
from mindrlhf.runtime.supervision import run_worker
from mindrlhf.utils.command_line import new_parser


def build_parser() -> argparse.ArgumentParser:
    """The flags of :class:`mindrlhf.configs.flags.ChatOptions`."""
    parser = new_parser(__doc__)
    add_flags(parser, ChatOptions, CHAT_GROUPS)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Parses, then talks."""
    options = ChatOptions(**vars(build_parser().parse_args(argv)))
    from mindrlhf.chat.session import run_chat

    run_chat(options)


def command() -> NoReturn:
    """``mindrlhf-chat``."""
    run_worker(main)


if __name__ == "__main__":
    command()
