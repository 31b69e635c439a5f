"""Errors that the user can fix; a script writes each as one message and exits with code 2."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

MOST_BULLETS = 10


class MindRLHFError(Exception):
    """Any error the user can fix; the message names the place, the value and the remedy."""


class ConfigError(MindRLHFError):
    """All faults of a configuration in one error.

    Args:
        faults: one sentence per fault, each naming file and key path.
    """

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults: tuple[str, ...] = tuple(faults)
        noun = "error" if len(self.faults) == 1 else "errors"
        # None is left out: each is a key of its own to be fixed.
        super().__init__(f"{len(self.faults)} configuration {noun}:" + bullet_list(self.faults, most=None))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[str, ...]]]:
        """Pickles the faults; the default would pass the message as the faults."""
        return type(self), (self.faults,)


class DataError(MindRLHFError):
    """A data file cannot be read, or one of its rows is invalid."""


class CheckpointError(MindRLHFError):
    """Weights are missing, left over, of the wrong shape, or cannot be read or written."""


class RewardError(MindRLHFError):
    """A reward function has failed: on every rank, and before anything was trained on its scores."""


def bullet_list(lines: Iterable[str], most: int | None = MOST_BULLETS, total: int | None = None) -> str:
    """The lines below a message that lists faults.

    Args:
        lines: one per fault.
        most: how many are shown, and then how many more there are; ``None``: all of them.
        total: number of faults, where ``lines`` are only the first ones.
    """
    return "".join(f"\n  - {line}" for line in _capped(lines, most, total))


def inline_list(items: Iterable[object], most: int = 5, separator: str = ", ") -> str:
    """The first ``most`` items within a message, and how many more there are."""
    return separator.join(_capped(items, most))


def _capped(items: Iterable[object], most: int | None, total: int | None = None) -> list[str]:
    every = [str(item) for item in items]
    more = (total or len(every)) - len(every[:most])
    return [*every[:most], *([f"and {more} more"] if more else [])]
