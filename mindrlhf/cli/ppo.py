"""PPO on Qwen2, training and inference in one job. Run it with msrun, or alone with --use_parallel False.

`mindrlhf-ppo` is the same as ppo_one_stage.py, which finds rewards.py beside itself for --reward_fn.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from mindrlhf.runtime.supervision import run_worker
from mindrlhf.trainer.job import JobOptions, run_ppo, save_strategies
from mindrlhf.trainer.runs import add_device_flags, add_results_flags, add_resume_flags, add_watchdog_flag
from mindrlhf.trainer.stages.flags import optional_path
from mindrlhf.trainer.trackers.choice import DEFAULT_TRACKERS, TRACKERS_HELP, tracker_names
from mindrlhf.utils.command_line import new_parser, str_to_bool


def build_parser() -> argparse.ArgumentParser:
    """The flags of :class:`mindrlhf.trainer.job.JobOptions`."""
    parser = new_parser(__doc__)
    models = parser.add_argument_group("model configurations (MindFormers YAML)")
    models.add_argument("--sft_path_infer", type=Path, required=True, help="policy as it generates")
    models.add_argument("--sft_path_train", type=Path, required=True, help="policy as it is trained")
    models.add_argument("--reward_path", type=Path, required=True, help="reward model")
    models.add_argument("--critic_path", type=Path, required=True, help="critic")
    models.add_argument(
        "--ppo_config", type=Path, help="PPO hyper-parameters; default: ppo_X.yaml beside finetune_X.yaml"
    )
    models.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
        help="override a PPO hyper-parameter; may be repeated",
    )  # fmt: skip

    weights = parser.add_argument_group(
        "weights (a full .ckpt/.safetensors file, a Hugging Face directory, or rank_0/ rank_1/ ... in one)"
    )
    weights.add_argument("--load_sft_checkpoint_infer", type=optional_path, help="policy as it generates")
    weights.add_argument("--load_sft_checkpoint_train", type=optional_path, help="policy as it is trained")
    weights.add_argument("--load_ref_checkpoint", type=optional_path, help="reference; default: the policy")
    weights.add_argument(
        "--load_rm_checkpoint", type=optional_path, help="reward model; default: the policy with a fresh head"
    )
    weights.add_argument(
        "--load_critic_checkpoint",
        type=optional_path,
        help="critic; default: the reward model, else the policy",
    )
    weights.add_argument(
        "--reward_fn",
        metavar="PACKAGE.MODULE:FUNCTION",
        help="own reward of (prompts, responses) texts; added to --load_rm_checkpoint's, or alone without it",
    )

    files = parser.add_argument_group("data and results")
    files.add_argument(
        "--mind_dataset_dir", type=optional_path, help="MindRecord of prompts from rlhf_data.py"
    )
    files.add_argument(
        "--eval_dataset_dir",
        type=optional_path,
        help="MindRecord of held-out prompts to evaluate on (eval_interval); default: no evaluation",
    )
    files.add_argument(
        "--ptx_dataset_dir",
        type=optional_path,
        help="MindRecord of texts for the pre-training loss (ptx_coef); default: --mind_dataset_dir",
    )
    add_results_flags(
        files, "configuration, metrics, samples, curves, checkpoints", required=False, path_type=optional_path
    )
    files.add_argument(
        "--save_data_file", type=optional_path, help="store each iteration's experience as MindRecord"
    )
    files.add_argument(
        "--export_hf_dir", type=optional_path, help="export the final policy in Hugging Face format"
    )
    files.add_argument("--tokenizer_path", type=optional_path, help="for sample texts and the export")
    add_resume_flags(files, "an iteration_NNNNNN", path_type=optional_path)

    run = parser.add_argument_group("run")
    run.add_argument("--trackers", type=tracker_names, default=DEFAULT_TRACKERS, help=TRACKERS_HELP)
    run.add_argument("--use_parallel", type=str_to_bool, default=True, help="False: one process, no msrun")
    add_device_flags(run)
    run.add_argument(
        "--enable_compile_cache",
        type=str_to_bool,
        default=False,
        help="True: keep compiled graphs for later runs (MS_COMPILER_CACHE_PATH or ~/.cache/mindrlhf/graphs)",
    )
    run.add_argument(
        "--verify_sync", type=str_to_bool, default=False, help="checksum weights after each sync"
    )
    run.add_argument(
        "--only_save_strategy",
        type=str_to_bool,
        default=False,
        help="write ./strategy and exit; no device needed",
    )
    add_watchdog_flag(run)
    run.add_argument("--world_size", type=int, help="ranks to write strategies for without msrun")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Parses, then runs the job or writes the strategies."""
    arguments = vars(build_parser().parse_args(argv))
    only_save_strategy = arguments.pop("only_save_strategy")
    options = JobOptions(**arguments)
    if only_save_strategy:
        save_strategies(options, Path("strategy"))
    else:
        run_ppo(options)


def command() -> NoReturn:
    """``mindrlhf-ppo``."""
    run_worker(main)


if __name__ == "__main__":
    command()
