"""Faults that the user can mend; a script prints them as one message and exits with code 2."""

from __future__ import annotations

from collections.abc import Sequence


class MindRLHFError(Exception):
    """Any fault the user can mend; the message names where, what value, and the remedy."""


class ConfigError(MindRLHFError):
    """Everything that is wrong in the configuration, in one error.

    Args:
        faults: one sentence per fault, each naming file and key path.
    """

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults: tuple[str, ...] = tuple(faults)
        noun = "error" if len(self.faults) == 1 else "errors"
        super().__init__(
            f"{len(self.faults)} configuration {noun}:" + "".join(f"\n  - {fault}" for fault in self.faults)
        )

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[str, ...]]]:
        """Rebuilds from the faults; the default would feed the message back as faults."""
        return type(self), (self.faults,)


class DataError(MindRLHFError):
    """A data file cannot be read, or a row of it is not what it should be."""


class CheckpointError(MindRLHFError):
    """Weights are missing, left over, misshapen, or cannot be read or written."""
