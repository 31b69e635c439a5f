"""The watchdog reports every phase to the supervisor, which names the rank that hangs, and where."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass

from mindrlhf.configs.flags import DEFAULT_TIMEOUT
from mindrlhf.runtime import supervision
from mindrlhf.runtime.processes import start_ticks
from mindrlhf.utils.ranks import env_rank, env_world_size


@dataclass
class _Phase:
    """A phase that is running, perhaps around another."""

    name: str
    total: int | None
    unit: str
    done: int = 0


class Watchdog:
    """Listens to the phases of a loop and writes this rank's heartbeat at each.

    Args:
        timeout: seconds without progress, on all ranks of a host, after which the job is ended; 0: never.
        computing: phases in which a rank waits only for other ranks: not for a disk, a network or a device. A
            job in which no rank uses the CPU for half a minute of such a phase counts as hanging, too.
        device_target: of the job; off the CPU the host may legitimately wait in every phase.
    """

    def __init__(
        self,
        timeout: float = DEFAULT_TIMEOUT,
        *,
        computing: Set[str] = frozenset(),
        device_target: str = "CPU",
    ) -> None:
        self.timeout = timeout
        self._computing = computing if timeout and device_target == "CPU" else frozenset()
        self._iteration: Callable[[], int] = int
        self._phases: list[_Phase] = []
        self._steps = 0
        self._number = 0

    def follow(self, iteration: Callable[[], int]) -> None:
        """Asks ``iteration``, at the start of each phase, for the number of the running one, from 1."""
        self._iteration = iteration

    def suspend(self, phase: str) -> None:
        """Lifts the time limit for good, for work after the loop that reports no progress."""
        self.timeout, self._computing = 0.0, frozenset()
        supervision.report_progress(phase=phase, between=False, total=None, timeout=0.0, may_idle=True)

    def phase_started(self, name: str, total: int | None, unit: str) -> None:
        """A phase begins."""
        self._phases.append(_Phase(name, total, unit))
        self._steps += 1
        self._number = self._iteration()
        self._beat()

    def phase_advanced(self, done: int) -> None:
        """The phase makes progress."""
        if self._phases:
            self._phases[-1].done += done
        self._beat()

    def phase_ended(self, name: str) -> None:
        """The phase is over; after a failure the heartbeat keeps the phase of the failure."""
        if sys.exc_info()[0] is not None:
            return
        self._steps += 1
        last = self._phases.pop() if self._phases else _Phase(name, None, "")
        if self._phases:
            self._beat()
        else:
            self._write(last, between=True)

    def _beat(self) -> None:
        if self._phases:
            self._write(self._phases[-1], between=False)

    def _write(self, phase: _Phase, *, between: bool) -> None:
        supervision.report_progress(
            iteration=self._number,
            phase=phase.name,
            between=between,
            steps=self._steps,
            done=phase.done,
            total=phase.total,
            unit=phase.unit,
            timeout=self.timeout,
            may_idle=between or phase.name not in self._computing,
        )


@contextmanager
def supervised(timeout: float) -> Iterator[None]:
    """Supervises a job in one process, unless it is supervised already or the watchdog is off."""
    if not timeout or supervision.current_process() is not None:
        yield
        return
    pid = os.getpid()
    supervision.join(f"{pid}_{start_ticks(pid)}", env_rank(), env_world_size())
    try:
        yield
    finally:
        supervision.leave()
