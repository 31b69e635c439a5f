"""Collecting faults, so that one run reports all of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from mindrlhf.utils.errors import ConfigError

MAX_SHOWN = 60


class Faults:
    """Faults found so far, in order, each once."""

    def __init__(self) -> None:
        self._lines: dict[str, None] = {}

    def add(self, where: str, fault: str, remedy: str) -> None:
        """Adds ``where: fault - remedy``; ``where`` is ``file: key.path``."""
        self._lines[f"{where}: {fault} - {remedy}"] = None

    def include(self, others: Faults) -> None:
        """Adds the faults of ``others`` after those found so far."""
        self._lines |= others._lines

    def __len__(self) -> int:
        return len(self._lines)

    def raise_if_any(self) -> None:
        """Raises :class:`ConfigError` with every fault, if there is one."""
        if self._lines:
            raise ConfigError(tuple(self._lines))


@contextmanager
def collected() -> Iterator[Faults]:
    """A :class:`Faults` that raises :class:`ConfigError` at the end of the block when it is not empty."""
    faults = Faults()
    yield faults
    faults.raise_if_any()


def shown(value: object) -> str:
    """``value`` as messages show it: its repr, cut when long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, nesting of thousands of levels
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """The remedy for an unknown name: the closest known one, or ``otherwise``."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else otherwise
