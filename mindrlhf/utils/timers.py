"""Wall-clock time of a block and of the phases of a loop."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from mindrlhf.utils.logging import get_logger

logger = get_logger(__name__)


class Timer:
    """A context manager that measures its block; ``.seconds`` may also be read inside it."""

    def __init__(self) -> None:
        self._started: float | None = None
        self._elapsed = 0.0

    def __enter__(self) -> Timer:
        """Starts the clock from zero."""
        self._elapsed = 0.0
        self._started = time.perf_counter()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Stops the clock."""
        self._elapsed = self.seconds
        self._started = None

    @property
    def seconds(self) -> float:
        """Seconds in the block, so far or in all."""
        return self._elapsed if self._started is None else time.perf_counter() - self._started


class PhaseListener(Protocol):
    """Is called at the phases of a loop as they happen: a console or a watchdog."""

    def phase_started(self, name: str, total: int | None, unit: str) -> None:
        """A phase begins; ``total`` units of work when that is known."""
        ...

    def phase_advanced(self, done: int) -> None:
        """The phase has done ``done`` more units."""
        ...

    def phase_ended(self, name: str) -> None:
        """The phase is over, or has failed."""
        ...


class PhaseTimer:
    """Adds up the seconds spent in each named phase of a loop, and calls listeners.

    Args:
        listeners: called in this order.
    """

    def __init__(self, listeners: Iterable[PhaseListener] = ()) -> None:
        self.seconds: dict[str, float] = {}
        self.listeners = list(listeners)

    @contextmanager
    def phase(self, name: str, total: int | None = None, unit: str = "") -> Iterator[None]:
        """Adds the time of the block to ``name``, also when the block raises.

        Args:
            name: of the phase.
            total: units of work in it, when known; :meth:`advance` counts them.
            unit: what is counted, in the plural.
        """
        for listener in self.listeners:
            listener.phase_started(name, total, unit)
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            logger.debug("%s: %.3f s", name, seconds)
            for listener in self.listeners:
                listener.phase_ended(name)

    def advance(self, done: int = 1) -> None:
        """``done`` more units of the running phase are finished."""
        for listener in self.listeners:
            listener.phase_advanced(done)

    def reset(self) -> None:
        """Forgets all phases; the listeners stay."""
        self.seconds = {}
