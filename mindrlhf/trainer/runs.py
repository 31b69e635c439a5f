"""``runs/NAME/``: where a run of that name leaves all it has, and how it goes on there."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from mindrlhf.runtime.watchdog import DEFAULT_TIMEOUT
from mindrlhf.utils.command_line import seconds, str_to_bool
from mindrlhf.utils.errors import MindRLHFError

RUNS = Path("runs")

RUN_NAME_HELP = "short for --save_ckpt_dir runs/NAME"

_NAME = re.compile(r"\w[\w.+=-]{0,99}")


def run_directory(name: str) -> Path:
    """The argparse type of ``--run_name``: NAME -> ``runs/NAME`` below the working directory.

    Raises:
        argparse.ArgumentTypeError: the name is no plain name of a directory.
    """
    if _NAME.fullmatch(name) is None:
        raise argparse.ArgumentTypeError(
            f"{name!r} is no name of a run: letters, digits and _ . + = - only, at most 100, "
            "the first a letter, digit or _; for a path use --save_ckpt_dir"
        )
    return RUNS / name


def add_results_flags(
    files: argparse._ArgumentGroup,
    help_text: str,
    *,
    required: bool,
    path_type: Callable[[str], Path | None] = Path,
) -> None:
    """Adds ``--save_ckpt_dir`` and ``--run_name``, of which one is given; both set ``save_ckpt_dir``.

    Args:
        files: group of a parser.
        help_text: what goes to the directory.
        required: whether one of the two must be there.
        path_type: argparse type of the first.
    """
    results = files.add_mutually_exclusive_group(required=required)
    results.add_argument("--save_ckpt_dir", type=path_type, help=help_text)
    results.add_argument(
        "--run_name", dest="save_ckpt_dir", metavar="NAME", type=run_directory, help=RUN_NAME_HELP
    )


def add_resume_flags(
    files: argparse._ArgumentGroup, checkpoint: str, *, path_type: Callable[[str], Path | None] = Path
) -> None:
    """Adds ``--resume_from`` and ``--resume_training``.

    Args:
        files: group of a parser.
        checkpoint: what a checkpoint's directory is called.
        path_type: argparse type of the first.
    """
    files.add_argument("--resume_from", type=path_type, help=f"{checkpoint} directory to go on from")
    files.add_argument(
        "--resume_training",
        type=str_to_bool,
        default=False,
        help="True: go on from the newest whole checkpoint of --save_ckpt_dir; start anew when there is none",
    )


def add_device_flags(run: argparse._ArgumentGroup) -> None:
    """Adds ``--device_target`` and ``--cpu_matmul_dtype``."""
    run.add_argument(
        "--device_target", choices=["CPU", "Ascend", "GPU"], help="override device_target of every YAML"
    )
    run.add_argument(
        "--cpu_matmul_dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="bfloat16: on CPU round the operands of products to it, sums and all else stay float32; needs a "
        "processor with avx512_bf16, and g++ (default: float32)",
    )


def add_watchdog_flag(run: argparse._ArgumentGroup) -> None:
    """Adds ``--watchdog_timeout``."""
    run.add_argument(
        "--watchdog_timeout",
        type=seconds,
        default=DEFAULT_TIMEOUT,
        metavar="SECONDS",
        help="end the job when no rank has made progress for so long; the first compilation counts; 0: never",
    )


def check_resume_flags(resume_from: Path | None, *, resume_training: bool, checkpoint: str) -> None:
    """Refuses two answers to where the run goes on, and a directory that is not there.

    Raises:
        MindRLHFError: names both flags, or the path.
    """
    if resume_from is None:
        return
    if resume_training:
        raise MindRLHFError(
            "--resume_training True takes the newest whole checkpoint of --save_ckpt_dir, --resume_from "
            f"takes {resume_from}: give one of the two"
        )
    if not resume_from.is_dir():
        raise MindRLHFError(
            f"--resume_from {resume_from}: there is no such directory; name {checkpoint} directory"
        )
