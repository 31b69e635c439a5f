"""Reward model on pairs of responses: Bradley-Terry loss, scores of the SFT model with mean 0 and std 1.

    reward_model.py --use_parallel False --reward_path finetune_X.yaml \\
        --load_sft_checkpoint sft/final --mind_dataset_dir pairs.mindrecord --save_ckpt_dir reward

Under msrun the YAML's data_parallel x model_parallel workers share the work. `mindrlhf-reward` is the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from mindrlhf.runtime.supervision import run_worker
from mindrlhf.trainer.stages.flags import add_stage_flags
from mindrlhf.trainer.stages.options import CALIBRATIONS, RewardOptions
from mindrlhf.utils.command_line import new_parser


def build_parser() -> argparse.ArgumentParser:
    """The flags of :class:`mindrlhf.trainer.stages.options.RewardOptions`."""
    parser = new_parser(__doc__)
    add_stage_flags(
        parser,
        config_flag="--reward_path",
        data="MindRecord of rlhf_data.py --pairs",
        result="a reward model for --load_rm_checkpoint and --load_critic_checkpoint of ppo_one_stage.py",
    )
    reward = parser.add_argument_group("reward model")
    reward.add_argument(
        "--center_coef",
        type=float,
        default=0.0,
        help="coefficient of the mean (chosen + rejected score)^2 in the loss (default: 0, off)",
    )
    reward.add_argument(
        "--calibrate",
        choices=CALIBRATIONS,
        default="sft",
        help="whose scores get mean 0 and std 1: responses that --load_sft_checkpoint samples for training "
        "prompts, the data's preferred responses, or nobody's (default: sft)",
    )
    reward.add_argument(
        "--calibration_samples", type=int, default=256, help="responses for that (default: 256)"
    )
    reward.add_argument(
        "--max_response_length",
        type=int,
        default=0,
        help="most tokens of a sampled response; 0: the data's longest (default: 0)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Parses, then trains."""
    options = RewardOptions(**vars(build_parser().parse_args(argv)))
    from mindrlhf.trainer.stages.reward import run_reward

    run_reward(options)


def command() -> NoReturn:
    """``mindrlhf-reward``."""
    run_worker(main)


if __name__ == "__main__":
    command()
