"""Names in a directory of results (``--save_ckpt_dir``), each stated once; who reads results imports them."""

from __future__ import annotations

import os
import re
from itertools import count
from pathlib import Path

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
EVAL_SAMPLES_FILE = "eval_samples.jsonl"
SKIPPED_FILE = "skipped_updates.jsonl"
CURVES_FILE = "curves.png"
SUMMARY_FILE = "evaluation_summary.json"
TABLE_FILE = "before_after.md"

FINAL = "final"
"""Directory of the last weights of SFT or a reward model."""
STATE_FILE = "state.json"
"""In a checkpoint, beside the directories of its models."""
MODELS = ("policy", "critic", "reward")
UNITS = ("iteration", "step")
"""What PPO and the other recipes count; a checkpoint is named after its unit."""


def checkpoint_numbers(directory: Path, unit: str) -> list[int]:
    """Iterations or steps of the checkpoints below ``directory``, whole or not, newest first.

    Only names that :func:`checkpoint_directory` gives count: ``iteration_3`` is not a checkpoint.
    """
    name = re.compile(rf"{unit}_([0-9]{{6}}|[1-9][0-9]{{6,17}})")  # fits an int64
    found = (name.fullmatch(path.name) for path in directory.glob(f"{unit}_*") if path.is_dir())
    return sorted((int(match.group(1)) for match in found if match), reverse=True)


def checkpoint_directory(directory: Path, number: int, unit: str) -> Path:
    """The checkpoint after an iteration or step, below ``directory``."""
    return directory / f"{unit}_{number:06d}"


def set_aside(path: Path) -> Path:
    """Renames what is not of this run to ``left_NAME``, or ``left_2_NAME`` if taken, ...; returns the path.

    Raises:
        OSError: it cannot be renamed.
    """
    names = (f"left_{number}_{path.name}" if number > 1 else f"left_{path.name}" for number in count(1))
    return path.rename(next(new for name in names if not os.path.lexists(new := path.with_name(name))))
