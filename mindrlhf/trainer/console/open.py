"""Which console a process gets: drawn on a terminal, plain lines elsewhere, none on ranks other than 0."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import IO

from rich.console import Console

from mindrlhf.trainer.console.live import LiveConsole
from mindrlhf.trainer.console.plain import PlainConsole
from mindrlhf.trainer.console.state import RunState
from mindrlhf.utils.logging import get_logger
from mindrlhf.utils.ranks import env_rank

logger = get_logger(__name__)

CONSOLE_VARIABLE = "MINDRLHF_CONSOLE"
"""Environment variable: ``plain`` for plain lines on a terminal, too; or a terminal's device file, as ``tty``
prints it, to draw on from a worker of msrun, whose own output goes to a file."""


@contextlib.contextmanager
def open_console(title: str, unit: str) -> Iterator[RunState]:
    """Shows a run while the block runs; what it yields listens to phases and metrics.

    Args:
        title: what runs.
        unit: what a step is.
    """
    if env_rank() != 0:
        yield RunState(title, unit)
        return
    with contextlib.ExitStack() as stack:
        terminal = _terminal(stack)
        console: LiveConsole | PlainConsole
        if terminal is None:
            console = PlainConsole(title, unit)
        else:
            console = LiveConsole(title, unit, console=terminal)
        console.open()
        try:
            yield console
        finally:
            console.shut()


def _terminal(stack: contextlib.ExitStack) -> Console | None:
    """The terminal to draw on: that of stderr, or the one that msrun's launcher names; ``None`` for none."""
    wanted = os.environ.get(CONSOLE_VARIABLE, "").strip()
    if wanted.startswith("/dev/"):
        file = _open_device(wanted)
        if file is None:
            return None
        console = Console(file=stack.enter_context(file), force_terminal=True)
    elif wanted != "plain" and sys.stderr.isatty():
        console = Console(stderr=True)
    else:
        return None
    return None if console.is_dumb_terminal else console


def _open_device(path: str) -> IO[str] | None:
    """A terminal for writing, which does not become this process's own: its Ctrl-C is the launcher's."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NOCTTY)
    except OSError as error:
        logger.warning("%s=%s: cannot be opened (%s)", CONSOLE_VARIABLE, path, error.strerror)
        return None
    if not os.isatty(descriptor):
        os.close(descriptor)
        logger.warning("%s=%s is not a terminal", CONSOLE_VARIABLE, path)
        return None
    return os.fdopen(descriptor, "w", encoding="utf-8")
