"""Supervised fine-tuning of Qwen2 on prompts and preferred responses, the first stage of RLHF.

    python sft.py --use_parallel False --sft_path finetune_X.yaml --load_sft_checkpoint weights.ckpt \\
        --mind_dataset_dir data.mindrecord --save_ckpt_dir sft

Under msrun the YAML's data_parallel x model_parallel workers share the work.
"""

from __future__ import annotations

import argparse

from mindrlhf.trainer.stages.flags import add_stage_flags, optional_path
from mindrlhf.trainer.stages.options import SFTOptions
from mindrlhf.utils.cli import run_main


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    files = add_stage_flags(
        parser,
        config_flag="--sft_path",
        data="MindRecord of rlhf_data.py (with or without --pairs)",
        result="a policy for --load_sft_checkpoint_train of ppo_one_stage.py",
    )
    files.add_argument("--export_hf_dir", type=optional_path, help="export the policy in Hugging Face format")
    files.add_argument("--tokenizer_path", type=optional_path, help="copied into the export")
    return parser.parse_args()


def main() -> None:
    """Parses, then trains."""
    options = SFTOptions(**vars(parse_arguments()))
    from mindrlhf.trainer.stages.sft import run_sft

    run_sft(options)


if __name__ == "__main__":
    run_main(main)
