"""The console without a terminal: one log line now and then while a phase is long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

from mindrlhf.trainer.console.state import RunState
from mindrlhf.utils.logging import get_logger

SECONDS_BETWEEN_LINES = 10.0

logger = get_logger(__name__)


class PlainConsole(RunState):
    """Logs every ten seconds which phase is running, how far it is and for how long it has run.

    The results of a finished step are not logged here but by :class:`mindrlhf.trainer.recorder.Recorder`.
    A thread watches the clock, so that phases that report no progress are named, too.
    """

    def __init__(self, title: str, unit: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(title, unit, clock=clock)
        self._last_line = self.started

    def open(self) -> None:
        """Starts the thread."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="console", daemon=True)
        self._thread.start()

    def shut(self) -> None:
        """Stops the thread."""
        self._stop.set()
        self._thread.join()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """A step is done, which the recorder may log: the next line is due in ten seconds."""
        self._last_line = self.clock()
        super().scalars(step, values)

    def tick(self) -> None:
        """Logs a line when one is due."""
        phase, now = self.phase, self.clock()
        if phase is None or now - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        words = [f"{self.unit} {self.current_step}/{self.total}:"] if self.total and self.step_runs else []
        words += [phase.name, phase.progress(), f"{now - phase.started:.0f} s"]
        logger.info("%s", " ".join(filter(None, words)))

    @property
    def step_runs(self) -> bool:
        """Whether the phase belongs to a step rather than to what comes before, between and after."""
        return self.phase is not None and self.phase.name not in ("load", "save", "evaluate")

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            self.tick()
