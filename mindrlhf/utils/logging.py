"""Loggers that speak on rank 0 only, unless something is wrong."""

from __future__ import annotations

import logging
import os
import sys

from mindrlhf.utils.ranks import env_rank, env_world_size

_ROOT = "mindrlhf"


class _StderrHandler(logging.StreamHandler):
    """Writes to whatever ``sys.stderr`` is at the moment, so that redirection and capture work."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _level(rank: int) -> int:
    wanted = os.environ.get("MINDRLHF_LOG", "").strip().upper()
    named = logging.getLevelNamesMapping().get(wanted)
    if named is not None:
        return named
    return logging.INFO if rank == 0 else logging.WARNING


def get_logger(name: str) -> logging.Logger:
    """A logger under ``mindrlhf``: INFO on rank 0, WARNING on other ranks, to stderr.

    The environment variable ``MINDRLHF_LOG`` (DEBUG, INFO, WARNING, ...) overrides the level on every
    rank. Lines start with ``[rank r]`` when there is more than one worker.
    """
    root = logging.getLogger(_ROOT)
    if not any(isinstance(handler, _StderrHandler) for handler in root.handlers):
        rank = env_rank()
        prefix = f"[rank {rank}] " if env_world_size() > 1 else ""
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter(f"{prefix}%(levelname)s %(message)s"))
        root.addHandler(handler)
        root.setLevel(_level(rank))
        # MindFormers configures the root logger; passing records on would print each line twice.
        root.propagate = False
    inside = name == _ROOT or name.startswith(_ROOT + ".")
    return logging.getLogger(name if inside else f"{_ROOT}.{name}")
