"""``--trackers``: whether they are installed, and one of each that is wanted."""

from __future__ import annotations

from collections.abc import Callable, Collection
from importlib.util import find_spec

from mindrlhf.configs.options import TRACKERS
from mindrlhf.trainer.trackers.base import Tracker
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
