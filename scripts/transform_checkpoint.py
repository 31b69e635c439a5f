"""Rewrites a checkpoint for another layout.

    full file -> ranks     transform_checkpoint.py --input FILE --output DIR  --output_config infer.yaml
    ranks -> full file     transform_checkpoint.py --input DIR  --output FILE
    ranks -> other ranks   transform_checkpoint.py --input DIR  --output DIR2 --output_config infer.yaml

Without --output_config the output is one full file; a Hugging Face directory is a full input. How ranks are
split is seen in them; ranks without config.json need --input_config for their sizes when it is the only YAML.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mindrlhf.checkpoint.transform import transform_checkpoint
from mindrlhf.utils.command_line import new_parser, run_main


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = new_parser(__doc__)
    add = parser.add_argument_group("input").add_argument
    add("--input", type=Path, required=True, help="full file, directory of rank_i, or a run or checkpoint")
    add("--input_config", type=Path, help="YAML of a model that does not say its sizes")
    add = parser.add_argument_group("output").add_argument
    add("--output", type=Path, required=True, help="full file or directory of rank_i")
    add("--output_config", type=Path, help="YAML to split the output for")
    add("--format", choices=["ckpt", "safetensors"], default="ckpt", help="of rank files")
    add("--overwrite", action="store_true", help="replace an output that exists")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Parses, transforms, reports."""
    args = build_parser().parse_args(argv)
    files = transform_checkpoint(
        args.input,
        args.output,
        input_config=args.input_config,
        output_config=args.output_config,
        suffix=f".{args.format}",
        overwrite=args.overwrite,
    )
    gigabytes = sum(file.stat().st_size for file in files) / 1e9
    print(f"{len(files)} file(s), {gigabytes:.2f} GB -> {args.output}")


if __name__ == "__main__":
    run_main(main)
