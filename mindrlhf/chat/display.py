"""Shows replies as they arrive: plain text for one model, two columns for two."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mindrlhf.chat.conversation import printable


class PlainDisplay:
    """Text of one model goes to ``out`` at once; that of several models when all replies are complete.

    Args:
        names: of the models.
        out: for replies.
        notices: for everything else, so that ``out`` holds replies alone.
    """

    def __init__(self, names: Sequence[str], out: IO[str], notices: Console) -> None:
        self._names, self._out, self._notices = names, out, notices
        self._texts = [""] * len(names)

    def piece(self, place: int, text: str) -> None:
        """More text of the model at ``place``."""
        self._texts[place] += text
        if len(self._names) == 1:
            self._write(printable(text))

    def notice(self, text: str) -> None:
        """A line about the conversation that is not part of it."""
        self._notices.print(Text(printable(text), style="dim"))

    @contextmanager
    def reply(self) -> Iterator[None]:
        """Surrounds all pieces of the replies to one message."""
        self._texts = [""] * len(self._names)
        try:
            yield
        finally:
            if len(self._names) == 1:
                self._write("\n")
            else:
                for name, text in zip(self._names, self._texts, strict=True):
                    self._write(f"--- {name}\n{printable(text)}\n")

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


class ColumnsDisplay(PlainDisplay):
    """Two models side by side on a terminal, both columns growing as the replies arrive."""

    def __init__(self, names: Sequence[str], console: Console) -> None:
        super().__init__(names, console.file, console)
        self._live: Live | None = None

    def piece(self, place: int, text: str) -> None:
        """Drawn with the next frame."""
        self._texts[place] += text
        if self._live is not None:
            self._live.update(self._columns())

    @contextmanager
    def reply(self) -> Iterator[None]:
        """Redraws as the replies arrive; what stays on the screen is complete, however long."""
        self._texts = [""] * len(self._names)
        try:
            with Live(self._columns(), console=self._notices, transient=True, refresh_per_second=12) as live:
                self._live = live
                yield
        finally:
            self._live = None
            self._notices.print(self._columns())

    def _columns(self) -> Table:
        table = Table.grid(expand=True, padding=0)
        panels = []
        for name, text in zip(self._names, self._texts, strict=True):
            table.add_column(ratio=1)
            panels.append(Panel(Text(printable(text)), title=Text(printable(name)), title_align="left"))
        table.add_row(*panels)
        return table


def new_display(names: Sequence[str]) -> PlainDisplay:
    """Columns for two models on a terminal, plain text otherwise."""
    if len(names) > 1 and sys.stdout.isatty():
        return ColumnsDisplay(names, Console(highlight=False))
    return PlainDisplay(names, sys.stdout, Console(file=sys.stderr, highlight=False, soft_wrap=True))


def short_names(names: Iterable[str]) -> list[str]:
    """Names without the directories that all of them share; equal names are numbered."""
    parts = [name.rstrip("/").split("/") for name in names]
    shortest = min(map(len, parts))
    same = next((i for i in range(shortest - 1) if len({tuple(p[: i + 1]) for p in parts}) > 1), shortest - 1)
    short = ["/".join(part[same:]) for part in parts]
    if len(set(short)) < len(short):
        return [f"{name} ({number})" for number, name in enumerate(short, start=1)]
    return short
