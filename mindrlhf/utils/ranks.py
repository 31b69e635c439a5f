"""Which worker this process is, read from the environment that msrun gives it."""

from __future__ import annotations

import os

from mindrlhf.utils.errors import MindRLHFError


def under_msrun() -> bool:
    """Whether msrun has started this process."""
    return os.environ.get("MS_ROLE") in ("MS_WORKER", "MS_SCHED")


def is_scheduler() -> bool:
    """Whether this is msrun's scheduler, which runs the same script but only connects the workers."""
    return os.environ.get("MS_ROLE") == "MS_SCHED"


def env_int(name: str) -> int | None:
    """An integer of the environment, ``None`` when it is not set.

    Raises:
        MindRLHFError: it is not a number.
    """
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        raise MindRLHFError(
            f"environment variable {name}={text!r} is not a number; start the workers with msrun, or unset it"
        ) from None


def env_rank() -> int:
    """Rank of this worker, 0 when not under msrun.

    Raises:
        MindRLHFError: the environment holds something that is not a number.
    """
    if not under_msrun():
        return 0
    for name in ("RANK_ID", "MS_NODE_ID"):
        rank = env_int(name)
        if rank is not None and rank >= 0:
            return rank
    return 0


def env_world_size() -> int:
    """Number of workers, 1 when not under msrun; the scheduler knows it as well.

    Raises:
        MindRLHFError: the environment holds something that is not a number.
    """
    return max(env_int("MS_WORKER_NUM") or 1, 1) if under_msrun() else 1
