"""Loggers that write on rank 0 only, unless something is wrong."""

from __future__ import annotations

import logging
import os
import sys

from mindrlhf.utils.errors import MindRLHFError
from mindrlhf.utils.ranks import env_rank, env_world_size

_ROOT = "mindrlhf"
_VARIABLE = "MINDRLHF_LOG"
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


class _StderrHandler(logging.StreamHandler):
    """Writes to the present ``sys.stderr``, so that redirection and capture work."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _wanted_level() -> int | None:
    """The level of ``MINDRLHF_LOG``; ``None`` when it is not set or names no level."""
    return logging.getLevelNamesMapping().get(os.environ.get(_VARIABLE, "").strip().upper())


def _set_up(root: logging.Logger) -> None:
    try:
        rank = env_rank()
        prefix = f"[rank {rank}] " if env_world_size() > 1 else ""
    except MindRLHFError:
        # Loggers are made while modules are imported, where no script catches this; the job asks again.
        rank, prefix = 0, ""
    wanted = _wanted_level()
    level = (logging.INFO if rank == 0 else logging.WARNING) if wanted is None else wanted
    line = "%(levelname)s %(message)s"
    if level <= logging.DEBUG:
        line = "%(asctime)s.%(msecs)03d %(levelname)s %(name)s: %(message)s"
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter(prefix + line, datefmt="%H:%M:%S"))
    root.addHandler(handler)
    root.setLevel(level)
    # MindFormers configures the root logger; passing records on would print each line twice.
    root.propagate = False
    given = os.environ.get(_VARIABLE, "").strip()
    if given and wanted is None and rank == 0:
        known = ", ".join(name.lower() for name in LEVELS)
        root.warning("%s=%s is not a level, so it is ignored; use one of %s", _VARIABLE, given, known)


def get_logger(name: str) -> logging.Logger:
    """A logger under ``mindrlhf``: INFO on rank 0, WARNING on other ranks, to stderr.

    The environment variable ``MINDRLHF_LOG`` (debug, info, warning, error or critical, in any case)
    overrides the level on every rank; with debug, lines also name the time and the logger. Lines start
    with ``[rank r]`` when there is more than one worker.
    """
    root = logging.getLogger(_ROOT)
    if not any(isinstance(handler, _StderrHandler) for handler in root.handlers):
        _set_up(root)
    inside = name == _ROOT or name.startswith(_ROOT + ".")
    return logging.getLogger(name if inside else f"{_ROOT}.{name}")
