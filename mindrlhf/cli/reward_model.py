"""Reward model on pairs of responses: Bradley-Terry loss, scores of the SFT model with mean 0 and std 1.

    reward_model.py --use_parallel False --reward_path finetune_X.yaml \\
        --load_sft_checkpoint sft/final --mind_dataset_dir pairs.mindrecord --save_ckpt_dir reward

Under msrun the YAML's data_parallel x model_parallel workers share the work. `mindrlhf-reward` is the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from mindrlhf.configs.flags import RewardOptions
from mindrlhf.configs.parser import add_flags
from mindrlhf.runtime.supervision import run_worker
from mindrlhf.utils.command_line import new_parser


def build_parser() -> argparse.ArgumentParser:
    """The flags of :class:`mindrlhf.configs.flags.RewardOptions`."""
    parser = new_parser(__doc__)
    add_flags(parser, RewardOptions)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Parses, then trains."""
    options = RewardOptions(**vars(build_parser().parse_args(argv)))
    from mindrlhf.trainer.programs import run_stage

    run_stage(options)


def command() -> NoReturn:
    """``mindrlhf-reward``."""
    run_worker(main)


if __name__ == "__main__":
    command()
