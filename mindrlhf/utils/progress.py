"""Progress on rank 0: a bar on a terminal, elsewhere a plain line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.file_proxy import FileProxy
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mindrlhf.utils.logging import get_logger
from mindrlhf.utils.ranks import env_rank

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 10.0


class ProgressBar:
    """A context manager that shows the progress of a loop; silent on ranks other than 0.

    Args:
        description: of the work, in a few words.
        total: number of steps, ``None`` when unknown.
    """

    def __init__(self, description: str, total: int | None = None) -> None:
        self.description = description
        self.total = total
        self.done = 0
        self._shown = env_rank() == 0
        self._progress: Progress | None = None
        self._started = self._last_line = time.monotonic()

    def __enter__(self) -> ProgressBar:
        """Shows the bar."""
        self._started = self._last_line = time.monotonic()
        # Where the live console has the terminal, lines go above it.
        if self._shown and sys.stderr.isatty() and not isinstance(sys.stderr, FileProxy):
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._progress.add_task(self.description, total=self.total)
            self._progress.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Removes the bar; after plain lines, writes a last one."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        elif self._last_line > self._started:
            self._write_line()

    def update(self, n: int = 1) -> None:
        """Counts ``n`` more steps as done."""
        self.done += n
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=self.done)
        elif self._shown and time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._write_line()

    def _write_line(self) -> None:
        self._last_line = time.monotonic()
        of_total = "" if self.total is None else f"/{self.total}"
        seconds = self._last_line - self._started
        get_logger(__name__).info("%s: %d%s in %.0f s", self.description, self.done, of_total, seconds)


def track(iterable: Iterable[T], *, description: str, total: int | None = None) -> Iterator[T]:
    """Yields from ``iterable`` and shows progress as :class:`ProgressBar` does.

    Args:
        iterable: any iterable.
        description: of the work, in a few words.
        total: number of items; ``len(iterable)`` by default, where it has one.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with ProgressBar(description, total) as bar:
        for item in iterable:
            yield item
            bar.update()
