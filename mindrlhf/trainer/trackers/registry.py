"""The table of trackers, which names what ``--trackers`` takes.

A tracker is a module of this package whose ``TRACKER`` is the class, and one entry here.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib import import_module
from importlib.util import find_spec

from mindrlhf.trainer.trackers.tracker import Tracker
from mindrlhf.utils.errors import MindRLHFError

TRACKERS = {"tensorboard": "tensorboardX", "wandb": "wandb", "swanlab": "swanlab"}
"""Module of each tracker -> the package that it needs."""


def check_trackers(names: Collection[str]) -> None:
    """Refuses trackers that are unknown or not installed.

    Raises:
        MindRLHFError: names them all, and what there is or how to install them.
    """
    unknown = [name for name in names if name not in TRACKERS]
    if unknown:
        known = ", ".join(TRACKERS)
        raise MindRLHFError(
            f"--trackers: no tracker {', '.join(map(repr, unknown))}; there are {known}, or none"
        )
    missing = [TRACKERS[name] for name in names if find_spec(TRACKERS[name]) is None]
    if missing:
        raise MindRLHFError(
            f"--trackers: not installed: {', '.join(missing)}; pip install {' '.join(missing)}, or leave "
            f"{'it' if len(missing) == 1 else 'them'} out"
        )


def make_trackers(names: Collection[str]) -> list[Tracker]:
    """One tracker per name; nothing is opened before :meth:`Tracker.start`."""
    return [import_module(f"mindrlhf.trainer.trackers.{name}").TRACKER() for name in names]
