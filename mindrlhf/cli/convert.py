"""Converts Qwen2 weights between a Hugging Face directory and one MindSpore file.

    convert_weight.py --torch_ckpt_dir DIR --mindspore_ckpt_path FILE --dtype bf16
    convert_weight.py --model qwen2 --input_path DIR --output_path FILE --dtype bf16

and back with --reversed (the first spelling keeps its meaning, the second is still input and output):

    convert_weight.py --reversed --mindspore_ckpt_path FILE --torch_ckpt_dir OUT_DIR --config DIR
    convert_weight.py --reversed --input_path FILE --output_path OUT_DIR --config DIR

A file name that ends with .safetensors instead of .ckpt chooses that format. `mindrlhf-convert` is the same.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from mindrlhf.checkpoint.conversion import ConversionReport, hf_to_mindspore, mindspore_to_hf, parse_size
from mindrlhf.checkpoint.element_types import OUTPUT_DTYPES, parse_dtype
from mindrlhf.models.families import FAMILIES
from mindrlhf.utils.command_line import new_parser, run_main, str_to_bool
from mindrlhf.utils.errors import MindRLHFError


def build_parser() -> argparse.ArgumentParser:
    """Both spellings of the flags."""
    parser = new_parser(__doc__)
    paths = parser.add_argument_group("input and output, by what they are")
    paths.add_argument("--torch_ckpt_dir", type=Path, help="Hugging Face directory")
    paths.add_argument(
        "--mindspore_ckpt_path", type=Path, help="MindSpore file, rank directories, or a run or checkpoint"
    )
    paths = parser.add_argument_group("input and output, by direction")
    paths.add_argument("--input_path", type=Path, help="what is read, in either direction")
    paths.add_argument("--output_path", type=Path, help="what is written, in either direction")
    how = parser.add_argument_group("conversion")
    how.add_argument("--model", choices=list(FAMILIES), default="qwen2", help="model family")
    how.add_argument("--dtype", choices=OUTPUT_DTYPES, help="type of the weights; default: as they are")
    how.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    back = parser.add_argument_group("MindSpore to Hugging Face")
    back.add_argument(
        "--reversed", type=str_to_bool, nargs="?", const=True, default=False, help="convert that way"
    )
    back.add_argument(
        "--config",
        type=Path,
        help="config.json, its directory, or a model YAML (default: the input's own)",
    )
    back.add_argument("--tokenizer_dir", type=Path, help="where tokenizer files are copied from")
    back.add_argument(
        "--max_shard_size", default="5GB", help="limit of one weights file, in bytes or as 500MB, 2GiB"
    )
    return parser


def chosen(parser: argparse.ArgumentParser, args: argparse.Namespace, first: str, second: str) -> Path:
    """The path given under one of two flags, or under both alike."""
    given = {path for path in (getattr(args, first), getattr(args, second)) if path is not None}
    if len(given) == 1:
        return Path(given.pop())
    problem = f"are {'different' if given else 'both missing'}: give one of them"
    return parser.error(f"--{first} and --{second} {problem}")


def convert(parser: argparse.ArgumentParser, args: argparse.Namespace) -> ConversionReport:
    """Calls the conversion that the flags ask for."""
    dtype = parse_dtype(args.dtype) if args.dtype else None
    if args.reversed:
        return mindspore_to_hf(
            chosen(parser, args, "mindspore_ckpt_path", "input_path"),
            chosen(parser, args, "torch_ckpt_dir", "output_path"),
            config=args.config,
            tokenizer_dir=args.tokenizer_dir,
            dtype=dtype,
            max_shard_bytes=parse_size(args.max_shard_size),
            overwrite=args.overwrite,
        )
    if args.config or args.tokenizer_dir:
        raise MindRLHFError("--config and --tokenizer_dir need --reversed; forward, config.json is read")
    return hf_to_mindspore(
        chosen(parser, args, "torch_ckpt_dir", "input_path"),
        chosen(parser, args, "mindspore_ckpt_path", "output_path"),
        dtype=dtype,
        overwrite=args.overwrite,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Parses, converts, reports."""
    parser = build_parser()
    sys.stdout.write(f"{convert(parser, parser.parse_args(argv))}\n")


def command() -> NoReturn:
    """``mindrlhf-convert``."""
    run_main(main)


if __name__ == "__main__":
    command()
