"""``--trackers``: which there are, whether they are installed, and one of each that is wanted."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from importlib.util import find_spec

from mindrlhf.trainer.trackers.base import Tracker
from mindrlhf.utils.errors import MindRLHFError

DEFAULT_TRACKERS = ("tensorboard",)
NONE = "none"

TRACKERS_HELP = (
    "where metrics go beside metrics.jsonl, comma-separated: tensorboard (in tensorboard/ of the results), "
    "wandb, swanlab; none: nowhere (default: tensorboard)"
)

# Name -> the package it needs.
_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "swanlab": "swanlab"}


def tracker_names(text: str) -> tuple[str, ...]:
    """The argparse type of ``--trackers``.

    Raises:
        argparse.ArgumentTypeError: a name that there is not.
    """
    names = dict.fromkeys(name for part in text.split(",") if (name := part.strip().lower()))
    unknown = [name for name in names if name not in _PACKAGES and name != NONE]
    if unknown:
        known = ", ".join([*_PACKAGES, NONE])
        raise argparse.ArgumentTypeError(f"no tracker {', '.join(map(repr, unknown))}; there are {known}")
    if NONE in names and len(names) > 1:
        raise argparse.ArgumentTypeError(f"{NONE} stands alone, got {text!r}")
    return tuple(name for name in names if name != NONE)


def check_trackers(names: Collection[str]) -> None:
    """Refuses trackers that are not installed.

    Raises:
        MindRLHFError: names them all and says how to install them.
    """
    missing = [_PACKAGES[name] for name in names if find_spec(_PACKAGES[name]) is None]
    if missing:
        raise MindRLHFError(
            f"--trackers: not installed: {', '.join(missing)}; pip install {' '.join(missing)}, or leave "
            f"{'it' if len(missing) == 1 else 'them'} out"
        )


def make_trackers(names: Collection[str]) -> list[Tracker]:
    """One tracker of each name; nothing is opened before :meth:`Tracker.start`."""
    return [_MAKERS[name]() for name in names]


def _tensorboard() -> Tracker:
    from mindrlhf.trainer.trackers.tensorboard import TensorBoardTracker

    return TensorBoardTracker()


def _wandb() -> Tracker:
    from mindrlhf.trainer.trackers.weights_biases import WandbTracker

    return WandbTracker()


def _swanlab() -> Tracker:
    from mindrlhf.trainer.trackers.swan import SwanLabTracker

    return SwanLabTracker()


_MAKERS: dict[str, Callable[[], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "swanlab": _swanlab,
}
