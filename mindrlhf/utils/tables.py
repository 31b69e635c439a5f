"""Tables of text for logs and Markdown."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

# Characters that are markup in Markdown or HTML.
_MARKUP = str.maketrans(
    {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "\\|", **{c: "\\" + c for c in "\\*_`[]~$"}}
)


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, width: int = 110) -> str:
    """A table for a log with columns of equal width and wrapped cells, without colours.

    Args:
        columns: titles.
        rows: one cell per column in each; cells are taken literally, line ends included.
        width: of the whole table, in terminal columns.
    """
    table = Table(box=box.SQUARE, show_lines=True, expand=True)
    for column in columns:
        table.add_column(column, ratio=1)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    output = io.StringIO()
    Console(file=output, width=width, color_system=None, legacy_windows=False).print(table)
    return output.getvalue().rstrip("\n")


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; what would be markup in a cell is shown literally."""
    lines = [list(columns), ["---"] * len(columns), *([_literal(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _literal(cell: str) -> str:
    return "<br>".join(cell.translate(_MARKUP).splitlines())
