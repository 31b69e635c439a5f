"""Wall-clock time of a block, and of the phases of a loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Timer:
    """Context manager that measures its block; ``.seconds`` may also be read inside it."""

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


class PhaseTimer:
    """Adds up the seconds spent in each named phase of a loop."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of the block to ``name``, also when the block raises."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def reset(self) -> None:
        """Forgets all phases."""
        self.seconds = {}
