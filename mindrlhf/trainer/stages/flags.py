"""The flags that ``sft.py`` and ``reward_model.py`` share."""

from __future__ import annotations

import argparse
from pathlib import Path

from mindrlhf.trainer.runs import (
    add_device_flags,
    add_results_flags,
    add_resume_flags,
    add_watchdog_flag,
)
from mindrlhf.trainer.trackers.choice import DEFAULT_TRACKERS, TRACKERS_HELP, tracker_names
from mindrlhf.utils.command_line import str_to_bool


def optional_path(text: str) -> Path | None:
    """A path; an empty string means none, as scripts pass it for an unused flag."""
    return Path(text) if text else None


def add_stage_flags(
    parser: argparse.ArgumentParser, *, config_flag: str, data: str, result: str
) -> argparse._ArgumentGroup:
    """Adds the flags of :class:`mindrlhf.trainer.stages.options.StageOptions`.

    Args:
        parser: of the script.
        config_flag: name of the flag for the YAML.
        data: what the data set is.
        result: what the weights that come out are.

    Returns:
        the group of files, for more of them.
    """
    files = parser.add_argument_group("model, data and results")
    add = files.add_argument
    add(
        config_flag,
        dest="config_path",
        type=Path,
        required=True,
        help="finetune_X.yaml: sizes, split, optimizer and schedule, runner_config",
    )
    add(
        "--load_sft_checkpoint",
        type=Path,
        required=True,
        help="language model to start from: a full .ckpt/.safetensors file, a Hugging Face directory, or "
        "rank_0/ rank_1/ ... of this YAML's split",
    )
    add("--mind_dataset_dir", type=Path, required=True, help=data)
    add_results_flags(
        files,
        f"final/rank_i: {result} where its YAML has the same split; configuration, metrics, checkpoints",
        required=True,
    )
    add(
        "--save_full_ckpt",
        type=optional_path,
        help="write the weights to this .ckpt or .safetensors file too, merged: any split reads it",
    )
    add_resume_flags(files, "a step_NNNNNN", path_type=optional_path)
    _add_training_flags(parser)
    return files


def _add_training_flags(parser: argparse.ArgumentParser) -> None:
    training = parser.add_argument_group("training")
    add = training.add_argument
    add("--epochs", type=int, help="passes over the data (default: runner_config.epochs)")
    add(
        "--batch_size",
        type=int,
        help="rows an optimizer step, over all ranks (default: runner_config.batch_size x data_parallel)",
    )
    add(
        "--micro_batch_size",
        type=int,
        default=0,
        help="rows a forward/backward on a rank; changes memory, not the result; 0: all (default: 0)",
    )
    add(
        "--learning_rate",
        type=float,
        help="peak of the YAML's lr_schedule, whose shape stays (default: the YAML's, which is for PPO)",
    )
    add("--max_grad_norm", type=float, default=1.0, help="clip the gradient's norm; 0: off (default: 1.0)")
    add(
        "--valid_vocab_size",
        type=int,
        default=0,
        help="length of the tokenizer: ids from here on have probability 0; 0: the YAML's vocab_size",
    )
    add(
        "--eval_fraction",
        type=float,
        default=0.1,
        help="prompts held out of training and evaluated on; 0: none (default: 0.1)",
    )
    add("--max_eval_prompts", type=int, default=512, help="most prompts held out; 0: no bound (default: 512)")
    add(
        "--eval_interval",
        type=int,
        default=50,
        help="steps between evaluations; 0: before and after training only (default: 50)",
    )
    add(
        "--save_interval",
        type=int,
        default=0,
        help="steps between checkpoints of the whole state in step_NNNNNN, after the last step one, too; "
        "0: only when a signal stops the job (default: 0)",
    )
    add(
        "--keep_checkpoints",
        type=int,
        default=2,
        help="number of checkpoints that stay, the newest ones; 0: all (default: 2)",
    )
    add(
        "--max_skipped_updates",
        type=int,
        default=3,
        help="so many updates in a row with a NaN or infinite loss or gradient stop the job (default: 3)",
    )
    add("--seed", type=int, default=1, help="of the split, the order and a new head (default: 1)")
    run = parser.add_argument_group("run")
    run.add_argument("--trackers", type=tracker_names, default=DEFAULT_TRACKERS, help=TRACKERS_HELP)
    run.add_argument("--use_parallel", type=str_to_bool, default=True, help="False: one process, no msrun")
    add_device_flags(run)
    add_watchdog_flag(run)
