"""CValues jsonl -> MindRecord prompt data set.

    rlhf_data.py --vocab_path vocab.json --merges_file_path merges.txt \\
        --file_path train.jsonl --output_path cvalues.mindrecord --max_prompt_length 4096 --seq_length 8193

`mindrlhf-data` is the same.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from mindrlhf.configs.parser import optional_path
from mindrlhf.data.preprocess import PreprocessOptions, PreprocessSummary, preprocess
from mindrlhf.data.tokenizer_loading import load_tokenizer
from mindrlhf.utils.command_line import new_parser, run_main, str_to_bool


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = new_parser(__doc__)
    files = parser.add_argument_group("files")
    add = files.add_argument
    lines = "jsonl with the strings prompt and pos_resp on each line, with --pairs neg_resp too"
    add("--file_path", type=Path, required=True, help=lines)
    written = "MindRecord file to write; its index goes to <output_path>.db"
    add("--output_path", type=Path, required=True, help=written)
    add("--overwrite", action="store_true", help="replace an existing output file")
    add(
        "--eval_output_path",
        type=optional_path,
        help="hold prompts out and write them to this MindRecord file instead",
    )
    add(
        "--eval_fraction",
        type=float,
        default=0.05,
        help="with --eval_output_path: fraction of the different prompts, chosen by a hash of their text",
    )
    add = parser.add_argument_group("tokenizer").add_argument
    add("--vocab_path", type=Path, help="vocab.json of the tokenizer")
    add("--merges_file_path", type=Path, help="merges.txt of the tokenizer")
    add(
        "--tokenizer_path",
        type=Path,
        help="instead of the two: tokenizer directory, .model, or .tiktoken ranks file",
    )
    add(
        "--tokenizer_config",
        type=Path,
        help="tokenizer_config.json with the added tokens (default: the Qwen2 instruct ones)",
    )
    _add_row_flags(parser)
    return parser


def _add_row_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("rows").add_argument
    add("--max_prompt_length", type=int, default=4096, help="columns of prompt_ids, in tokens")
    add(
        "--seq_length",
        type=int,
        default=8193,
        help="columns of pretrain_ids and loss_mask, in tokens: the model's seq_length + 1",
    )
    add(
        "--overlong",
        choices=("drop", "truncate"),
        default="drop",
        help="prompts longer than max_prompt_length: leave out, or cut at the front; with --pairs, pairs "
        "with a response that does not fit in seq_length: leave out, or cut at the end",
    )
    add(
        "--no_chat_template",
        dest="chat_template",
        action="store_false",
        help="take prompts as they are, without the chat template around them",
    )
    add(
        "--system_prompt",
        help="text of the system turn (default: the template's own; '' leaves the turn out)",
    )
    add("--prompt_only", action="store_true", help="the lines have a prompt and no responses")
    add(
        "--pairs",
        type=str_to_bool,
        nargs="?",
        const=True,
        default=False,
        help="write neg_resp too, as rejected_ids and rejected_mask, for reward_model.py; sft.py and "
        "ppo_one_stage.py read such a file as any other",
    )
    add("--skip_bad_lines", action="store_true", help="count bad lines and continue instead of stopping")
    add("--batch", type=int, default=256, help="lines per encoding and rows per write")


def report(options: PreprocessOptions, summary: PreprocessSummary) -> None:
    """Reports on standard output what was written."""
    counts = summary.counts
    pairs = (
        f"{counts.dropped_pairs:,} (a response does not fit), "
        f"{counts.equal_pairs:,} (both responses are the same)"
    )
    lines = {
        "rows written": f"{counts.rows:,}",
        **({} if summary.eval_counts is None else {"rows held out": f"{summary.eval_counts.rows:,}"}),
        "prompts dropped": f"{counts.dropped_prompts:,} (longer than {options.max_prompt_length} tokens)",
        "prompts truncated": f"{counts.truncated_prompts:,}",
        "responses truncated": f"{counts.truncated_responses:,} (at {options.seq_length} tokens in all)",
        **({} if not options.pairs else {"pairs dropped": pairs}),
        "bad lines skipped": f"{summary.bad_lines:,}",
        "tokens": f"{counts.prompt_tokens:,} in prompts, {counts.response_tokens:,} in responses"
        + (f", {counts.rejected_tokens:,} in rejected responses" if options.pairs else ""),
        "chat template": summary.prompt_format.source,
        "prompt": repr(summary.prompt_format.example),
        "speed": f"{summary.rows_per_second:,.0f} rows/s ({summary.seconds:.1f} s)",
        "file": f"{options.output_path} (index: {options.output_path}.db)",
        **({} if options.eval_output_path is None else {"held-out file": str(options.eval_output_path)}),
    }
    for name, value in lines.items():
        sys.stdout.write(f"{name:<20} {value}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, preprocess, report."""
    arguments = vars(build_parser().parse_args(argv))
    flags = ("tokenizer_path", "vocab_path", "merges_file_path", "tokenizer_config")
    path, vocab, merges, config = files = [arguments.pop(flag) for flag in flags]
    tokenizer = load_tokenizer(path, vocab_path=vocab, merges_path=merges, config_path=config)
    options = PreprocessOptions(**arguments)
    inputs = [(f"--{flag}", file) for flag, file in zip(flags, files, strict=True)]
    report(options, preprocess(tokenizer, options, inputs))
    return 0


def command() -> NoReturn:
    """``mindrlhf-data``."""
    run_main(main)


if __name__ == "__main__":
    command()
