"""What the training loop asks of a recipe, and what a recipe returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from mindrlhf.trainer.checkpoints import Stateful, Trained
from mindrlhf.trainer.shown_metrics import ShownMetrics
from mindrlhf.trainer.trackers.tracker import Histogram


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Length of a run and intervals of what it does, in steps; an interval of 0 turns it off."""

    total: int
    eval_interval: int = 0
    """In addition to the evaluations before the first step and after the last one."""
    save_interval: int = 0
    save_at_end: bool = True
    """Whether the last step is followed by a checkpoint."""
    log_interval: int = 1


class StepResult(NamedTuple):
    """The result of one step of a recipe, global and equal on every rank except for ``samples``."""

    metrics: Mapping[str, float]
    tokens: int
    """Real tokens that ``tokens_per_second`` counts."""
    samples: Sequence[Mapping[str, Any]] = ()
    """Prompts with responses; the main rank's are recorded."""
    histograms: Mapping[str, Histogram] = {}
    skipped: Sequence[Mapping[str, Any]] = ()
    """One entry per optimizer step that was skipped."""
    failure: str = ""
    """Why training cannot continue; empty when it can."""
    experience: Mapping[str, np.ndarray] | None = None
    """Columns for ``--save_data_file``."""


class HeldOut(NamedTuple):
    """The data that a recipe is evaluated on."""

    digest: str
    """Identifies it; evaluations of other data cannot be compared."""
    size: int
    unit: str
    """What ``size`` counts, in the plural."""


class EvaluationResult(NamedTuple):
    """The result of an evaluation on held-out data."""

    metrics: Mapping[str, float]
    samples: Sequence[Mapping[str, Any]] = ()


class Recipe(Protocol):
    """What the loop trains."""

    @property
    def schedule(self) -> Schedule:
        """Steps and intervals."""
        ...

    @property
    def shown(self) -> ShownMetrics:
        """Which of its metrics people see, and how."""
        ...

    @property
    def trained(self) -> Sequence[Trained]:
        """The models that steps change, with their optimizers."""
        ...

    @property
    def stateful(self) -> Mapping[str, Stateful]:
        """What else a checkpoint keeps, by name."""
        ...

    @property
    def held_out(self) -> HeldOut | None:
        """The held-out data; ``None`` when there is none."""
        ...

    def begin(self) -> None:
        """Called once, before the first step and after a checkpoint has been loaded; collective."""
        ...

    def step(self, step: int) -> StepResult:
        """One step, counted from 0; collective."""
        ...

    def evaluate(self) -> EvaluationResult:
        """Evaluates on the held-out data; collective."""
        ...
