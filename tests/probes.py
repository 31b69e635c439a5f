"""What only tests ask of the library: whole columns of a file, and a policy's view of a rollout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from mindrlhf.data.mindrecord import read_rows, read_schema
from mindrlhf.runtime.host_exchange import HostExchange
from mindrlhf.trainer.experience import Rollout
from mindrlhf.trainer.scoring import judge_rollout


def read_columns(path: str | Path, columns: Sequence[str]) -> dict[str, np.ndarray]:
    """Columns of a MindRecord file, (rows, length) each, in row order."""
    rows = read_rows(path, np.arange(read_schema(path)[1]), columns)
    return {name: np.stack([row[name] for row in rows]) for name in columns}


def policy_logprobs(
    model: Any, rollout: Rollout, exchange: HostExchange, *, rows_per_pass: int
) -> np.ndarray:
    """Log-probs (B, R) of a rollout's responses under a training network, 0 after the end."""
    models: Any = SimpleNamespace(ref=model, reward=None)
    logprobs, _ = judge_rollout(models, rollout, exchange, rows_per_pass=rows_per_pass)
    return np.where(rollout.mask, logprobs, 0.0).astype(np.float32)
