"""Checks of the paths among the flags of ``sft.py`` and ``reward_model.py``, before anything is built."""

from __future__ import annotations

from mindrlhf.checkpoint.weight_files import check_output_file
from mindrlhf.configs.options import StageOptions
from mindrlhf.trainer.records import METRICS_FILE
from mindrlhf.trainer.runs import check_resume_flags
from mindrlhf.trainer.trackers.choice import check_trackers
from mindrlhf.utils.errors import MindRLHFError

FINAL = "final"
"""Directory of the last weights in the directory of results."""


def check_paths(options: StageOptions) -> None:
    """Refuses weights that are not there, a directory of results that is used, trackers not installed.

    Raises:
        MindRLHFError: names the flag and the path.
    """
    check_trackers(options.trackers)
    if not options.load_sft_checkpoint.exists():
        raise MindRLHFError(
            f"--load_sft_checkpoint {options.load_sft_checkpoint} does not exist; name weights that are there"
        )
    check_resume_flags(
        options.resume_from, resume_training=options.resume_training, checkpoint="a step_NNNNNN"
    )
    _check_results(options)
    full = options.save_full_ckpt
    if full is not None:
        if full.suffix not in (".ckpt", ".safetensors"):
            raise MindRLHFError(f"--save_full_ckpt {full}: name a .ckpt or .safetensors file")
        if full.exists() and not options.goes_on:
            raise MindRLHFError(f"--save_full_ckpt {full} exists: give another name")
        check_output_file(full, overwrite=options.goes_on)


def _check_results(options: StageOptions) -> None:
    """Refuses a directory of results whose run is not to go on, or cannot."""
    save = options.save_ckpt_dir
    for name in () if options.goes_on else (METRICS_FILE, FINAL):
        if (save / name).exists():
            raise MindRLHFError(
                f"--save_ckpt_dir {save} holds the results of an earlier run ({name}); give another "
                "directory, or go on with --resume_training True or --resume_from one of its step_NNNNNN"
            )
    if options.resume_training and (save / FINAL).exists() and not any(save.glob("step_*")):
        raise MindRLHFError(
            f"--save_ckpt_dir {save} holds the weights of a run that has finished ({FINAL}) and no "
            "checkpoint to go on from: there is nothing left to do; to train anew, give another directory"
        )
