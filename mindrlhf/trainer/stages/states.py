"""The configuration of a stage as its checkpoints keep it, and what of it must stay when a run goes on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mindrlhf.configs.options import StageOptions
from mindrlhf.configs.schema import StagePlan
from mindrlhf.trainer.compatibility import MODEL_KEYS, Kind


def stage_kind(part: str) -> Kind:
    """Checkpoints of a stage whose model is called ``part``: ``policy`` or ``reward``."""
    return Kind(
        unit="step",
        parts={part: "plan.config"},
        # Rows, their split and their order are what the place in the data is a place in.
        fixed=re.compile(
            rf"stage|rows\.\w+|plan\.batch_size|plan\.config\.({MODEL_KEYS}|optimizer\.type)"
            r"|options\.(seed|eval_fraction|max_eval_prompts)"
        ),
        # Paths may move; what a flag puts into the plan is told of there.
        unimportant=re.compile(
            r"plan\.config\.(path|ignored.*)"
            r"|options\.(\w+_(path|dir|checkpoint|ckpt)|resume_\w+|trackers|watchdog_timeout|use_parallel"
            r"|device_target|cpu_matmul_dtype|epochs|batch_size|micro_batch_size|learning_rate)"
        ),
    )


def stage_configuration(
    stage: str, options: StageOptions, plan: StagePlan, train_rows: np.ndarray, held_out_rows: np.ndarray
) -> Mapping[str, Any]:
    """What ``config.json`` of a run and of its checkpoints holds: stage, flags, plan and size of the data.

    Args:
        stage: ``sft`` or ``reward``.
        options, plan: of the job.
        train_rows, held_out_rows: row numbers.
    """
    rows = {"train": len(train_rows), "held_out": len(held_out_rows)}
    return {"stage": stage, "options": options, "plan": plan, "rows": rows}
