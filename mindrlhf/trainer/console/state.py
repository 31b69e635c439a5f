"""The progress of a run: its step, the phase it is in, its last metrics, and the time that is left."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mindrlhf.trainer.trackers.tracker import RunStart, Tracker

_STEPS_AVERAGED = 10


class Column(NamedTuple):
    """A metric that is shown."""

    metric: str
    title: str
    format: str
    width: int


@dataclass
class Phase:
    """A phase that is running; ``total`` is ``None`` when the work in it is not known."""

    name: str
    total: int | None
    unit: str
    started: float
    done: int = 0

    def progress(self) -> str:
        """``120/512 tokens``; empty when nothing is counted."""
        return "" if self.total is None else f"{self.done}/{self.total} {self.unit}".rstrip()


class RunState(Tracker):
    """Listens to the phases and metrics of a run; shows nothing. Consoles are made from it.

    It is a :class:`mindrlhf.utils.timers.PhaseListener`, too. Phases may run inside one another.

    Args:
        title: what runs.
        unit: what a step is.
        clock: monotonic, in seconds.

    Attributes:
        total: steps of the run; 0 until they are known.
        log_interval: steps between lines of finished steps.
        columns: of such a line; there is none without them.
        status: metrics of the last step and the last evaluation that are in the drawing.
    """

    name = "console"
    columns: Sequence[Column] = ()
    status: Sequence[Column] = ()

    def __init__(self, title: str, unit: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.title, self.unit, self.clock = title, unit, clock
        self.total = 0
        self.log_interval = 1
        self.step = 0
        self.started = clock()
        self.phases: list[Phase] = []
        self.metrics: Mapping[str, float] = {}
        self.previous: Mapping[str, float] = {}
        self.evaluation: Mapping[str, float] = {}
        self._ends: deque[tuple[int, float]] = deque(maxlen=_STEPS_AVERAGED + 1)

    @property
    def phase(self) -> Phase | None:
        """The innermost phase that is running."""
        phases = self.phases[-1:]  # one look: another thread may draw while a phase ends
        return phases[0] if phases else None

    @property
    def current_step(self) -> int:
        """The step in progress, counted from 1."""
        return min(self.step + 1, self.total) if self.total else self.step

    def start(self, run: RunStart) -> None:
        """A resumed run begins after the steps that are done."""
        self.step = max(run.first_step - 1, 0)
        self._ends.clear()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics of a step that is done. Evaluations are not steps."""
        if not any(name.startswith(("objective/", "loss/")) for name in values):
            self.evaluation = values
            return
        self.step, self.previous, self.metrics = step, self.metrics, values
        self._ends.append((step, self.clock()))

    def phase_started(self, name: str, total: int | None, unit: str) -> None:
        """A phase begins, perhaps inside another."""
        self.phases.append(Phase(name, total, unit, self.clock()))

    def phase_advanced(self, done: int) -> None:
        """The innermost phase has done ``done`` more units."""
        if self.phase is not None:
            self.phase.done += done

    def phase_ended(self, name: str) -> None:
        """The phase is over."""
        if self.phases and self.phases[-1].name == name:
            self.phases.pop()

    def seconds_left(self) -> float | None:
        """Estimated from the last steps, saving and evaluating included; ``None`` before two are done.

        The first step of a process is left out: it compiles.
        """
        if len(self._ends) < 2 or not self.total:
            return None
        (first, begin), (last, end) = self._ends[0], self._ends[-1]
        if last <= first:
            return None
        each = (end - begin) / (last - first)
        return max(each * (self.total - last) - (self.clock() - end), 0.0)


def clock_text(seconds: float | None) -> str:
    """``1:02:03`` or ``2:03``; ``-:--`` when unknown."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
