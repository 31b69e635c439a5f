"""Supervised fine-tuning of Qwen2 on prompts and preferred responses, the first stage of RLHF.

    sft.py --use_parallel False --sft_path finetune_X.yaml --load_sft_checkpoint weights.ckpt \\
        --mind_dataset_dir data.mindrecord --save_ckpt_dir sft

Under msrun the YAML's data_parallel x model_parallel workers share the work. `mindrlhf-sft` is the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from mindrlhf.runtime.supervision import run_worker
from mindrlhf.trainer.stages.flags import add_stage_flags, optional_path
from mindrlhf.trainer.stages.options import SFTOptions
from mindrlhf.utils.command_line import new_parser


def build_parser() -> argparse.ArgumentParser:
    """The flags of :class:`mindrlhf.trainer.stages.options.SFTOptions`."""
    parser = new_parser(__doc__)
    files = add_stage_flags(
        parser,
        config_flag="--sft_path",
        data="MindRecord of rlhf_data.py (with or without --pairs)",
        result="a policy for --load_sft_checkpoint_train of ppo_one_stage.py",
    )
    files.add_argument("--export_hf_dir", type=optional_path, help="export the policy in Hugging Face format")
    files.add_argument("--tokenizer_path", type=optional_path, help="copied into the export")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Parses, then trains."""
    options = SFTOptions(**vars(build_parser().parse_args(argv)))
    from mindrlhf.trainer.stages.sft import run_sft

    run_sft(options)


def command() -> NoReturn:
    """``mindrlhf-sft``."""
    run_worker(main)


if __name__ == "__main__":
    command()
