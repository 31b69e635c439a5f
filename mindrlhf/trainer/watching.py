"""Who follows a job on its main rank: the console and the trackers, from its start to its end."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from mindrlhf.trainer.console.open import PPO_COLUMNS, PPO_STATUS, open_console
from mindrlhf.trainer.console.state import RunState
from mindrlhf.trainer.trackers.choice import make_trackers
from mindrlhf.trainer.trackers.group import Trackers


class Watchers(NamedTuple):
    """The console hears of phases, and is one of the trackers."""

    console: RunState
    trackers: Trackers


@contextmanager
def watch_ppo(iterations: int, trackers: Collection[str]) -> Iterator[Watchers]:
    """Shows a PPO job, and gives its metrics to the trackers of these names, while the block runs."""
    with open_console("PPO", iterations, "iteration", columns=PPO_COLUMNS, status=PPO_STATUS) as console:
        yield from _watch(console, trackers)


@contextmanager
def watch_stage(title: str, trackers: Collection[str]) -> Iterator[Watchers]:
    """The same for a stage before PPO, whose optimizer steps are counted in its training phase."""
    with open_console(title, 0, "step") as console:
        yield from _watch(console, trackers)


def _watch(console: RunState, names: Collection[str]) -> Iterator[Watchers]:
    trackers = Trackers([console, *make_trackers(names)])
    try:
        yield Watchers(console, trackers)
    finally:
        trackers.close()
