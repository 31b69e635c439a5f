"""Weights & Biases, through its ``wandb`` package."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mindrlhf.trainer.trackers.tracker import (
    SAMPLE_COLUMNS,
    Histogram,
    RunStart,
    Tracker,
    run_id,
    sample_cells,
)

PROJECT = "mindrlhf"


class WandbTracker(Tracker):
    """One W&B run, named after the directory of results, in the project of WANDB_PROJECT or ``mindrlhf``.

    A resumed run continues under its id: W&B accepts no second point for a step.
    """

    name = "wandb"

    def __init__(self) -> None:
        self._run: Any = None

    def start(self, run: RunStart) -> None:
        """Joins or opens the W&B run.

        Raises:
            RuntimeError: not logged in; W&B would ask on the terminal, which may be unattended.
        """
        import wandb

        self.close()
        offline = os.environ.get("WANDB_MODE", "").lower() in ("offline", "disabled", "dryrun")
        if not offline and wandb.api.api_key is None:
            raise RuntimeError("not logged in to W&B: wandb login, or set WANDB_MODE=offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", run.directory.resolve().name),
            id=run_id(run, self.name),
            resume="allow",
            dir=str(run.directory),
            config=dict(run.configuration),
            # Its own handling of stdout and stderr would interfere with the live console.
            settings=wandb.Settings(console="off", silent=True),
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Sent under their names."""
        self._run.log(dict(values), step=step)

    def histograms(self, step: int, values: Mapping[str, Histogram]) -> None:
        """Sent as W&B histograms with our bins."""
        import wandb

        self._run.log(
            {
                name: wandb.Histogram(np_histogram=(part.counts.astype(np.float64), part.edges))
                for name, part in values.items()
            },
            step=step,
        )

    def samples(self, step: int, name: str, samples: Sequence[Mapping[str, Any]]) -> None:
        """Sent as a table."""
        import wandb

        rows = [list(sample_cells(sample)) for sample in samples]
        self._run.log({name: wandb.Table(columns=list(SAMPLE_COLUMNS), data=rows)}, step=step)

    def close(self) -> None:
        """Waits until everything is sent."""
        if self._run is not None:
            self._run.finish()
            self._run = None


TRACKER = WandbTracker
