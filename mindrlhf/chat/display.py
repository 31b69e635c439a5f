"""Shows replies while they come: plain text for one speaker, two columns for two."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Protocol

from rich.console import Console
from rich.text import Text

from mindrlhf.chat.reply import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.table import Table


class Display(Protocol):
    """Where replies go."""

    def piece(self, place: int, text: str) -> None:
        """More text of the speaker at ``place``."""
        ...

    def notice(self, text: str) -> None:
        """A line about the conversation, not of it."""
        ...

    @contextmanager
    def reply(self) -> Iterator[None]:
        """Around all pieces of the replies to one message."""
        ...


class PlainDisplay:
    """Text of one speaker goes straight to ``out``; of several, one after another when all is there.

    Args:
        names: of the speakers.
        out: replies.
        err: notices.
    """

    def __init__(self, names: Sequence[str], out: IO[str], err: IO[str]) -> None:
        self._names, self._out = names, out
        self._err = Console(file=err, highlight=False, soft_wrap=True)
        self._texts = [""] * len(names)

    def piece(self, place: int, text: str) -> None:
        """Written at once, so that it is seen at once."""
        self._texts[place] += text
        if len(self._names) == 1:
            self._write(printable(text))

    def notice(self, text: str) -> None:
        """On ``err``, so that ``out`` holds replies alone."""
        self._err.print(Text(printable(text), style="dim"))

    @contextmanager
    def reply(self) -> Iterator[None]:
        """Ends with a line end, however the reply ends."""
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


class ColumnsDisplay:
    """Two speakers side by side on a terminal, both columns growing while they speak."""

    def __init__(self, names: Sequence[str], console: Console) -> None:
        self._names, self._console = names, console
        self._texts = [""] * len(names)
        self._refresh = lambda: None

    def piece(self, place: int, text: str) -> None:
        """Drawn with the next frame."""
        self._texts[place] += text
        self._refresh()

    def notice(self, text: str) -> None:
        """A dim line above the columns."""
        self._console.print(Text(printable(text), style="dim"))

    @contextmanager
    def reply(self) -> Iterator[None]:
        """Redraws while the replies come; what stays on the screen is complete, however long."""
        from rich.live import Live

        self._texts = [""] * len(self._names)
        try:
            with Live(self._columns(), console=self._console, transient=True, refresh_per_second=12) as live:
                self._refresh = lambda: live.update(self._columns())
                yield
        finally:
            self._refresh = lambda: None
            self._console.print(self._columns())

    def _columns(self) -> Table:
        from rich.panel import Panel
        from rich.table import Table

        table = Table.grid(expand=True, padding=0)
        for _ in self._names:
            table.add_column(ratio=1)
        table.add_row(
            *(
                Panel(Text(printable(text)), title=Text(printable(name)), title_align="left")
                for name, text in zip(self._names, self._texts, strict=True)
            )
        )
        return table


def new_display(names: Sequence[str]) -> PlainDisplay | ColumnsDisplay:
    """Columns for two speakers on a terminal, plain text otherwise."""
    if len(names) > 1 and sys.stdout.isatty():
        return ColumnsDisplay(names, Console(highlight=False))
    return PlainDisplay(names, sys.stdout, sys.stderr)


def short_names(names: Iterable[str]) -> list[str]:
    """Names without the folders that all of them share; equal ones are numbered."""
    parts = [name.rstrip("/").split("/") for name in names]
    shortest = min(map(len, parts))
    same = next((i for i in range(shortest - 1) if len({tuple(p[: i + 1]) for p in parts}) > 1), shortest - 1)
    short = ["/".join(part[same:]) for part in parts]
    if len(set(short)) < len(short):
        return [f"{name} ({number})" for number, name in enumerate(short, start=1)]
    return short
