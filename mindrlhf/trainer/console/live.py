"""The console on a terminal: bars, the last metrics, memory and the time that is left, drawn in place."""

from __future__ import annotations

import contextlib
import logging
import resource
import sys
import time
from collections.abc import Callable, Mapping

import psutil
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mindrlhf.trainer.console.state import Column, RunState, clock_text
from mindrlhf.utils.logging import get_logger

REFRESHES_PER_SECOND = 4
_ROWS_BETWEEN_TITLES = 20
_BAR_WIDTH = 32
_GAP = "  "
_GIB = 2.0**30


class LiveConsole(RunState):
    """Draws the state of a run at the foot of the terminal; log lines and finished steps scroll above it.

    While it is shown, ``sys.stderr`` (and ``sys.stdout``, where that is the same terminal) goes through it,
    so that no log line tears the drawing.

    Args:
        title, unit: see :class:`RunState`.
        console: rich's.
    """

    shows_metrics = True
    has_ended = False

    def __init__(
        self,
        title: str,
        unit: str,
        *,
        console: Console,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(title, unit, clock=clock)
        self.console = console
        self._rows = 0
        self._process = psutil.Process()
        self._log_handler = _LogHandler(console)
        self._live = Live(
            get_renderable=self.render,
            console=console,
            refresh_per_second=REFRESHES_PER_SECOND,
            redirect_stderr=sys.stderr.isatty(),
            redirect_stdout=sys.stdout.isatty(),
        )
        self._is_gone = False

    def open(self) -> None:
        """Begins to draw."""
        if not sys.stderr.isatty():  # a file under msrun: log lines go there, and to the terminal
            get_logger(__name__)  # makes the library's own handler
            logging.getLogger("mindrlhf").addHandler(self._log_handler)
        self._on_terminal(self._live.start)
        # A process that is killed could not bring a hidden cursor back.
        self._on_terminal(self.console.show_cursor)

    def shut(self) -> None:
        """Draws for the last time and restores the terminal."""
        self.has_ended = True
        self._on_terminal(self._live.stop)
        logging.getLogger("mindrlhf").removeHandler(self._log_handler)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """A finished step's line, above the drawing."""
        super().scalars(step, values)
        is_due = step % self.log_interval == 0 or step == self.total
        if self.columns and self.metrics is values and is_due:
            columns = self._fitting()
            if self._rows % _ROWS_BETWEEN_TITLES == 0:
                self._print(_GAP.join([self.unit, *(column.title.rjust(column.width) for column in columns)]))
            self._rows += 1
            cells = (_cell(values, column).rjust(column.width) for column in columns)
            self._print(_GAP.join([str(step).rjust(len(self.unit)), *cells]))
        self._on_terminal(self._live.refresh)

    def phase_started(self, name: str, total: int | None, unit: str) -> None:
        """Shown at once: the phase may hold the interpreter until it ends."""
        super().phase_started(name, total, unit)
        self._on_terminal(self._live.refresh)

    def render(self) -> Group:
        """The drawing as it is now."""
        now = self.clock()
        grid = Table.grid(padding=(0, 1))
        for _ in range(3):
            grid.add_column(no_wrap=True)
        grid.add_column(no_wrap=True, justify="right")
        elapsed = f"{clock_text(now - self.started)} elapsed"
        if self.total:
            where = f"{self.unit} {self.step if self.has_ended else self.current_step}/{self.total}"
            left = "" if self.has_ended else f", {clock_text(self.seconds_left())} left"
            grid.add_row(Text(self.title, "bold"), self._bar(self.step, self.total), where, elapsed + left)
        else:
            grid.add_row(Text(self.title, "bold"), "", "", elapsed)
        for phase in list(self.phases):
            bar = self._bar(phase.done, phase.total)
            times = clock_text(now - phase.started)
            if not self.total and phase.total and phase.done:
                rest = (now - phase.started) / phase.done * (phase.total - phase.done)
                times += f", {clock_text(rest)} left"
            grid.add_row(phase.name, bar, phase.progress(), times)
        return Group(grid, self._status())

    def _bar(self, done: int, total: int | None) -> ProgressBar:
        """Full, partly filled, or pulsing when the total is unknown."""
        width = min(max(self.console.width - 68, 6), _BAR_WIDTH)
        if total is None:
            return ProgressBar(width=width, pulse=True, animation_time=self.clock())
        return ProgressBar(total=max(total, 1), completed=min(done, total), width=width)

    def _fitting(self) -> list[Column]:
        """Columns that a line of this terminal has room for."""
        room, fitting = self.console.width - len(self.unit), []
        for column in self.columns:
            room -= column.width + len(_GAP)
            if room < 0:
                break
            fitting.append(column)
        return fitting

    def _status(self) -> Text:
        """Last metrics, how those with a sign have changed, and memory."""
        parts = []
        values = {**self.evaluation, **self.metrics}
        for column in self.status:
            if column.metric in values:
                text = f"{column.title} {_cell(values, column)}"
                if column.metric in self.previous and column.format.startswith("+"):
                    change = self.metrics[column.metric] - self.previous[column.metric]
                    text += f" ({change:{column.format}})"
                parts.append(text)
        memory = self._process.memory_info().rss / _GIB
        highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIB
        parts.append(f"memory {memory:.2f} GiB, peak {max(highest, memory):.2f}")
        return Text("  ".join(parts), "dim")

    def _print(self, line: str) -> None:
        self._on_terminal(lambda: self.console.print(Text(line), soft_wrap=True))

    def _on_terminal(self, write: Callable[[], object]) -> None:
        """Writes; a terminal that was closed ends the drawing, not the training."""
        if self._is_gone:
            return
        try:
            write()
        except OSError:
            self._is_gone = True
            with contextlib.suppress(OSError):
                self._live.stop()


class _LogHandler(logging.Handler):
    """Log lines above the drawing."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console
        self.setFormatter(logging.Formatter("%(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.console.print(Text(self.format(record)), soft_wrap=True)
        except OSError:
            self.handleError(record)


def _cell(values: Mapping[str, float], column: Column) -> str:
    return format(values[column.metric], column.format) if column.metric in values else "-"
