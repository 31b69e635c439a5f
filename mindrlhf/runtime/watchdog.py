"""The watchdog: tells the supervisor of each phase, so that it can name who makes no progress, and where."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass

from mindrlhf.runtime import supervision
from mindrlhf.runtime.processes import birth_of
from mindrlhf.utils.ranks import env_rank, env_world_size

DEFAULT_TIMEOUT = 1800.0
"""Seconds; above what the first iteration of a large model compiles without a sign."""


@dataclass
class _Phase:
    """A phase that is running, perhaps around another."""

    name: str
    total: int | None
    unit: str
    done: int = 0


class Watchdog:
    """A listener of phases that writes this rank's heartbeat at each of them.

    Args:
        timeout: seconds without progress, on all ranks of a host, after which the job is ended; 0: never.
        computing: phases in which a rank waits for nothing but the other ranks: not for a disk, a network or
            a device. A job in which no rank uses the CPU for half a minute of such a phase stands still, too.
        device_target: of the job; the host of a device other than CPU may rightly wait in every phase.
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
        self._first_phase = ""
        self._phases: list[_Phase] = []
        self._steps = 0
        self._number = 0

    def follow(self, iteration: Callable[[], int], first_phase: str) -> None:
        """Asks a loop, at each start of its first phase, which iteration begins, counted from 1."""
        self._iteration, self._first_phase = iteration, first_phase

    def phase_started(self, name: str, total: int | None, unit: str) -> None:
        """A phase begins."""
        self._phases.append(_Phase(name, total, unit))
        self._steps += 1
        if name == self._first_phase:
            self._number = self._iteration()
        self._beat()

    def phase_advanced(self, done: int) -> None:
        """The phase goes on."""
        if self._phases:
            self._phases[-1].done += done
        self._beat()

    def phase_ended(self, name: str) -> None:
        """The phase is over; when it has failed, it stays where the failure was."""
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
        member = supervision.membership()
        if member is None:
            return
        member.heartbeat.update(
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


def suspend_watchdog(phase: str) -> None:
    """After the loop, where nothing tells of progress, there is no limit."""
    member = supervision.membership()
    if member is not None:
        member.heartbeat.update(phase=phase, between=False, total=None, timeout=0.0, may_idle=True)


@contextmanager
def supervised(timeout: float) -> Iterator[None]:
    """Has a job in one process supervised, unless it is already or the watchdog is off."""
    if not timeout or supervision.membership() is not None:
        yield
        return
    pid = os.getpid()
    supervision.join(f"{pid}_{birth_of(pid)}", env_rank(), env_world_size())
    try:
        yield
    finally:
        supervision.leave()
