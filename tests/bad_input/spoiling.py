"""Ways to spoil the inputs of a job that rows of several scripts share."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

from tests.bad_input.harness import PAD, Case, prompt_columns, write_records

REAL = frozenset({"subprocess"})
FULL = frozenset({"full_disk"})
NO_SPACE = r"No space left on device|File too large|MindRecord"
MODEL = "model.model_config"


def hf_config(case: Case, **changes: object) -> None:
    """Changes keys of ``hf/config.json``."""
    content = json.loads((case / "hf/config.json").read_text())
    case.write("hf/config.json", json.dumps({**content, **changes}))


def records(case: Case, name: str = "data.mindrecord", **changes: Any) -> None:
    """Writes a data set again with columns replaced (a function of the old one), added or (None) removed."""
    columns = prompt_columns(case / name)
    for key, change in changes.items():
        if change is None:
            del columns[key]
        else:
            columns[key] = change(columns.get(key))
    write_records(case / name, **columns)


def other_pad(column: np.ndarray) -> np.ndarray:
    return np.where(column == PAD, PAD + 1, column)


def checkpoint(case: Case, directory: str = "runs/old/iteration_000001", **fixed: Any) -> str:
    """A checkpoint as far as its manifest and its state go; keywords are what a job must not change."""
    from mindrlhf.trainer.checkpoints import FORMAT

    state = {"format": FORMAT, "step": 1, "parts": {}, "layouts": {}, "fixed": {"recipe": "ppo"} | fixed}
    files = {"state.json": json.dumps(state).encode(), "policy/rank_0/checkpoint_0.ckpt": b"x" * 100}
    for name, content in files.items():
        case.write(f"{directory}/{name}", content)
    listed = {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files.items()
    }
    case.write(f"{directory}/manifest.json", json.dumps({"version": 1, "files": listed}))
    case.give(resume_from=directory)
    return directory
