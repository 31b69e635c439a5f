"""Talks to a Qwen2 checkpoint, or to two side by side; answers a file of prompts.

    chat.py --checkpoint HF_DIR
    chat.py --checkpoint HF_DIR --compare runs/NAME
    chat.py --checkpoint weights.ckpt --config generate_X.yaml --tokenizer_path DIR
    chat.py --checkpoint HF_DIR --prompt_file prompts.jsonl --output_file replies.jsonl

Messages come from standard input, a line each: /reset forgets the conversation, /quit ends it. Under msrun
all workers hold a part of the model and worker 0 talks. `mindrlhf-chat` is the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from mindrlhf.chat.options import ChatOptions
from mindrlhf.runtime.supervision import run_worker
from mindrlhf.utils.command_line import new_parser


def build_parser() -> argparse.ArgumentParser:
    """The flags of :class:`mindrlhf.chat.options.ChatOptions`."""
    parser = new_parser(__doc__)
    defaults = ChatOptions(checkpoint=Path())
    add = parser.add_argument_group("model").add_argument
    add(
        "--checkpoint",
        type=Path,
        required=True,
        help="Hugging Face directory; full .ckpt/.safetensors file; directory with rank_0/ rank_1/ ...; "
        "iteration_NNNNNN of a PPO run (its policy is meant), or the run itself (its last weights are meant)",
    )
    add("--compare", type=Path, help="a second one: the same messages to both, shown side by side")
    add(
        "--config",
        type=Path,
        help="generate_X.yaml or finetune_X.yaml (for rank directories: the one that split them), or a "
        "config.json, for weights that bring no sizes of their own",
    )
    add("--tokenizer_path", type=Path, help="tokenizer for weights that bring none: directory or file")
    add(
        "--device_target",
        choices=["CPU", "Ascend", "GPU"],
        help="overrides the YAML's device_target (default: the YAML's, else CPU)",
    )
    _add_conversation_flags(parser, defaults)
    _add_sampling_flags(parser, defaults)
    return parser


def _add_conversation_flags(parser: argparse.ArgumentParser, defaults: ChatOptions) -> None:
    add = parser.add_argument_group("conversation").add_argument
    add("--system_prompt", help="text of the system turn (default: the model's own; '' leaves the turn out)")
    add(
        "--no_chat_template",
        action="store_true",
        help="take each message as it is, without ChatML around it and without history",
    )
    add(
        "--max_context",
        type=int,
        default=defaults.max_context,
        help="most tokens of prompt and reply together; older turns are forgotten; 0: what the model has",
    )
    add = parser.add_argument_group("file of prompts").add_argument
    add("--prompt_file", type=Path, help="answer these: jsonl with the string prompt, or one text a line")
    add(
        "--output_file",
        type=Path,
        help="jsonl with prompt, response, tokens, stopped (default: the screen)",
    )
    add("--batch_size", type=int, default=defaults.batch_size, help="prompts answered at a time")
    add("--skip_bad_lines", action="store_true", help="pass over bad lines of the file, instead of stopping")


def _add_sampling_flags(parser: argparse.ArgumentParser, defaults: ChatOptions) -> None:
    add = parser.add_argument_group("sampling").add_argument
    add("--max_tokens", type=int, default=defaults.max_tokens, help="most tokens of a reply")
    add(
        "--temperature",
        type=float,
        default=defaults.temperature,
        help="divides the logits: below 1 likelier tokens, above 1 more surprising ones",
    )
    add(
        "--top_p",
        type=float,
        default=defaults.top_p,
        help="draw from the likeliest tokens that have this probability together; 1: from all",
    )
    add("--top_k", type=int, default=defaults.top_k, help="draw from so many likeliest tokens; 0: from all")
    add("--greedy", action="store_true", help="take the likeliest token, do not draw")
    add("--seed", type=int, default=defaults.seed, help="of the draws: same seed, same replies")


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
