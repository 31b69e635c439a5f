"""``--trackers``: whether they are installed, and one object per name.

A tracker is a module of this package, named as in :data:`mindrlhf.configs.options.TRACKERS`, whose
``TRACKER`` is the class.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib import import_module
from importlib.util import find_spec

from mindrlhf.configs.options import TRACKERS
from mindrlhf.trainer.trackers.tracker import Tracker
from mindrlhf.utils.errors import MindRLHFError


def check_trackers(names: Collection[str]) -> None:
    """Refuses trackers that are not installed.

    Raises:
        MindRLHFError: names them all and says how to install them.
    """
    missing = [TRACKERS[name] for name in names if find_spec(TRACKERS[name]) is None]
    if missing:
        raise MindRLHFError(
            f"--trackers: not installed: {', '.join(missing)}; pip install {' '.join(missing)}, or leave "
            f"{'it' if len(missing) == 1 else 'them'} out"
        )


def make_trackers(names: Collection[str]) -> list[Tracker]:
    """One tracker per name; nothing is opened before :meth:`Tracker.start`."""
    return [import_module(f"mindrlhf.trainer.trackers.{name}").TRACKER() for name in names]
