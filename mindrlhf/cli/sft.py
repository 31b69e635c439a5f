"""Supervised fine-tuning of Qwen2 on prompts and preferred responses, the first stage of RLHF.

    sft.py --use_parallel False --sft_path finetune_X.yaml --load_sft_checkpoint weights.ckpt \\
        --mind_dataset_dir data.mindrecord --save_ckpt_dir sft

Under msrun the YAML's data_parallel x model_parallel workers share the work. `mindrlhf-sft` is the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from mindrlhf.configs.flags import SFTOptions
from mindrlhf.configs.parser import add_flags
from mindrlhf.runtime.supervision import run_worker
from mindrlhf.utils.command_line import new_parser


def build_parser() -> argparse.ArgumentParser:
    """The flags of :class:`mindrlhf.configs.flags.SFTOptions`."""
    parser = new_parser(__doc__)
    add_flags(parser, SFTOptions)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Parses, then trains."""
    options = SFTOptions(**vars(build_parser().parse_args(argv)))
    from mindrlhf.trainer.programs import run_stage

    run_stage(options)


def command() -> NoReturn:
    """``mindrlhf-sft``."""
    run_worker(main)


if __name__ == "__main__":
    command()
