"""Which checkpoint a run goes on from: the newest whole one, or the one that is named.

Everything here comes before any model is built, and all ranks decide alike: each hashes its share of the
files, and what one finds all know.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mindrlhf.checkpoint.manifest import (
    FileRecord,
    find_damaged,
    find_size_faults,
    read_manifest,
)
from mindrlhf.runtime.host_exchange import HostExchange
from mindrlhf.trainer.checkpointing import checkpoint_directory, checkpoint_numbers
from mindrlhf.trainer.compatibility import PPO_JOB, Kind, check_compatible
from mindrlhf.utils.errors import CheckpointError
from mindrlhf.utils.files import sync_to_disk
from mindrlhf.utils.logging import get_logger

logger = get_logger(__name__)

# Checkpoints, and a stage's last weights, which are written under such names, too.
_LEFTOVER = re.compile(r"\.(((iteration|step)_\d+|final)\.tmp|.+\.tmp-\d+)")
_REPLACED = re.compile(r"\.((?:iteration|step)_\d+|final)\.old")


def choose_checkpoint(
    save: Path,
    resume_from: Path | None,
    *,
    resume_training: bool,
    job: Any,
    exchange: HostExchange,
    kind: Kind = PPO_JOB,
) -> Path | None:
    """The whole checkpoint to go on from, checked against the job; ``None`` for a fresh start. Collective.

    Args:
        save: ``--save_ckpt_dir``.
        resume_from: ``--resume_from``: a checkpoint, or a folder of them, whose newest whole one is taken.
        resume_training: ``--resume_training``.
        job: the present configuration.
        exchange: between the ranks.
        kind: of the job.

    Raises:
        CheckpointError: the named checkpoint, or every one of ``save``, is damaged; or of another job.
    """
    if resume_training:
        tidy(save, exchange)
        chosen = newest_whole(save, exchange, kind)
        if chosen is None:
            logger.info("--resume_training: no checkpoint in %s yet, a fresh start", save)
            return None
    elif resume_from is not None:
        chosen = newest_whole(resume_from, exchange, kind)
        if chosen is None:  # no folder of checkpoints, so it must be one
            chosen = resume_from
            require_whole(chosen, exchange)
    else:
        return None
    check_compatible(chosen, job, kind)
    return chosen


def newest_whole(save: Path, exchange: HostExchange, kind: Kind = PPO_JOB) -> Path | None:
    """The newest whole checkpoint, ``None`` when there is none at all; a warning names each damaged one.

    Raises:
        CheckpointError: there are checkpoints, but all are damaged.
    """
    damaged = []
    for number in _numbers_of_main(save, exchange, kind):
        directory = checkpoint_directory(save, number, kind)
        faults = find_faults(directory, exchange)
        if not faults:
            return directory
        damaged.append(f"{directory}: {_listed(faults)}")
        logger.warning("%s is damaged and passed over: %s", directory, _listed(faults))
    if damaged:
        raise CheckpointError(
            f"all {len(damaged)} checkpoint(s) of {save} are damaged; resume from another folder, or remove "
            "them to start anew:" + "".join(f"\n  - {line}" for line in damaged)
        )
    return None


def require_whole(directory: Path, exchange: HostExchange) -> None:
    """Refuses a checkpoint that is half-written or damaged; collective.

    Raises:
        CheckpointError: names each file that is not what the manifest says.
    """
    faults = find_faults(directory, exchange)
    if faults:
        raise CheckpointError(
            f"{directory} cannot be resumed from, name another checkpoint: {_listed(faults)}"
        )


def find_faults(directory: Path, exchange: HostExchange) -> list[str]:
    """What is wrong with a checkpoint's files, nothing for a whole one; collective, the same on every rank.

    Every rank looks at all sizes and hashes its share of the files.
    """
    files: dict[str, FileRecord] = {}
    faults: list[str] = []
    try:
        files = read_manifest(directory)
        faults = find_size_faults(directory, files)
    except CheckpointError as error:
        faults = [str(error)]
    seen = exchange.every_rank(np.array([len(files), len(faults)], np.int32))
    if seen[:, 1].any() or (seen != seen[0]).any():
        return faults or [f"rank {int(seen[:, 1].argmax())} cannot see all of its files; its log names them"]
    names = sorted(files)
    runtime = exchange.runtime
    mine = find_damaged(directory, files, names[runtime.rank :: runtime.world_size])
    flags = np.array([name in mine for name in names], np.int32)
    damaged = exchange.every_rank(flags).any(axis=0)
    return [
        f"{name} is damaged (its SHA-256 is not the manifest's)"
        for name, is_damaged in zip(names, damaged, strict=True)
        if is_damaged
    ]


def tidy(save: Path, exchange: HostExchange) -> None:
    """Removes what a killed run has left half-written, and brings back what it was replacing; collective."""
    if exchange.runtime.is_main:
        for path in sorted(save.iterdir()) if save.is_dir() else []:
            if match := _REPLACED.fullmatch(path.name):
                final = path.with_name(match.group(1))
                if final.exists():
                    shutil.rmtree(path)
                else:
                    path.rename(final)
                    sync_to_disk(save)
            elif _LEFTOVER.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    exchange.barrier()


def _numbers_of_main(save: Path, exchange: HostExchange, kind: Kind) -> Sequence[int]:
    """The main rank's list of checkpoints, newest first, on every rank; collective."""
    mine = checkpoint_numbers(save, kind) if exchange.runtime.is_main else []
    count = int(exchange.every_rank(np.array([len(mine)], np.int32))[0, 0])
    if not count:
        return []
    numbers = np.zeros(count, np.int32)
    numbers[: len(mine)] = mine
    return [int(number) for number in exchange.every_rank(numbers)[0]]


def _listed(faults: Sequence[str], shown: int = 5) -> str:
    more = f"; and {len(faults) - shown} more" if len(faults) > shown else ""
    return "; ".join(faults[:shown]) + more
