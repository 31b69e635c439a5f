"""Which checkpoint a run is resumed from: the newest whole one, or the one that is named.

All of this happens before any model is built, and all ranks decide alike: each hashes its share of the
files, and they exchange what they find.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mindrlhf.checkpoint.manifest import FileRecord, find_damaged, find_size_faults, read_manifest
from mindrlhf.runtime.host_exchange import HostExchange, together
from mindrlhf.trainer.checkpoints import (
    TrainingCheckpoints,
    check_fixed,
    discard,
    read_state,
)
from mindrlhf.utils.errors import CheckpointError, bullet_list
from mindrlhf.utils.files import sync_to_disk
from mindrlhf.utils.logging import get_logger
from mindrlhf.utils.provenance import plain
from mindrlhf.utils.result_files import CONFIG_FILE, checkpoint_directory, checkpoint_numbers

logger = get_logger(__name__)

# Checkpoints, and a stage's last weights, whose temporary names have the same form.
_LEFTOVER = re.compile(r"\.(((iteration|step)_\d+|final)\.tmp|.+\.tmp-\d+)")
_REPLACED = re.compile(r"\.((?:iteration|step)_\d+|final)\.old")
_LAYOUT = re.compile(r"[\w.]+\.parallel\.\w+")
_INPUTS = "inputs."
# Paths may change, and flags that enter the plan of a stage are reported with the plan.
_UNIMPORTANT = re.compile(
    r"([\w.]+\.)?(path|ignored.*)"
    r"|inputs\..*\.bytes"  # their digest counts
    r"|options\.(\w+_(path|dir|checkpoint|ckpt)|resume_\w+|overwrite|trackers|watchdog_timeout|use_parallel"
    r"|device_target|cpu_matmul_dtype|epochs|batch_size|micro_batch_size|learning_rate)"
)


def choose_checkpoint(
    checkpoints: TrainingCheckpoints, resume_from: Path | None, *, resume_training: bool
) -> Path | None:
    """The whole checkpoint to resume from, checked against the job; ``None`` for a fresh start. Collective.

    Args:
        checkpoints: of the job.
        resume_from: ``--resume_from``: a checkpoint, or a folder of them, whose newest whole one is taken.
        resume_training: ``--resume_training``.

    Raises:
        CheckpointError: the named checkpoint, or every one in the directory, is damaged or is of another job.
    """
    save, unit, exchange = checkpoints.directory, checkpoints.unit, checkpoints.exchange
    if resume_training:
        tidy(save, exchange)
        chosen = newest_whole(save, exchange, unit)
        if chosen is None:
            logger.info("--resume_training: no checkpoint in %s yet, a fresh start", save)
            return None
    elif resume_from is not None:
        chosen = newest_whole(resume_from, exchange, unit)
        if chosen is None:  # not a folder of checkpoints, so it must be one
            chosen = resume_from
            require_whole(chosen, exchange)
    else:
        return None
    check_fixed(chosen, read_state(chosen)["fixed"], checkpoints.fixed)
    checkpoints.resumptions = report_changes(chosen, checkpoints.configuration, checkpoints.inputs)
    return chosen


def report_changes(
    directory: Path, configuration: Any, inputs: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Logs which other settings have changed since a checkpoint was written, and which inputs.

    Args:
        directory: the checkpoint.
        configuration: of this job, a dataclass or a mapping.
        inputs: of this job; ``None`` leaves them out, and so does a checkpoint without a record of them.

    Returns:
        how the run was resumed so far, this time included.

    Raises:
        CheckpointError: the checkpoint's configuration cannot be read.
    """
    path, now = directory / CONFIG_FILE, dict(_entries(json.loads(json.dumps(plain(configuration)))))
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        before = dict(_entries(record["configuration"]))
        resumptions = list(record.get("resumptions", []))
        if inputs is not None and "inputs" in record:
            before.update(_entries(record["inputs"], _INPUTS))
            now.update(_entries(inputs, _INPUTS))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}), so this is not a whole checkpoint; resume from another one"
        ) from error
    missing = "(not there)"
    changed = {
        key: f"{key}: {before.get(key, missing)} in the checkpoint, {now.get(key, missing)} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key, missing) != now.get(key, missing) and not _UNIMPORTANT.fullmatch(key)
    }
    if now.get("ppo.critic") in ("shared", "none"):  # its YAML and weights are not used
        unused = ("critic.", f"{_INPUTS}weights.critic.")
        changed = {key: line for key, line in changed.items() if not key.startswith(unused)}
    layout = [line for key, line in changed.items() if _LAYOUT.fullmatch(key)]
    learned = [line for key, line in changed.items() if key.startswith(_INPUTS)]
    if layout:
        logger.info("the layout has changed, the checkpoint is resharded: %s", "; ".join(layout))
    if others := [line for line in changed.values() if line not in layout + learned]:
        logger.info("the configuration has changed since the checkpoint: %s", "; ".join(others))
    for line in learned:
        logger.warning("what the run learns from has changed since the checkpoint: %s", line)
    return [*resumptions, {"from": str(directory), "changes": list(changed.values())}]


def _entries(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``{"a": {"b": 1}}`` as ``("a.b", 1)``."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _entries(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def newest_whole(save: Path, exchange: HostExchange, unit: str) -> Path | None:
    """The newest whole checkpoint, ``None`` when there is none at all; a warning names each damaged one.

    Raises:
        CheckpointError: there are checkpoints, but all are damaged.
    """
    damaged = []
    for number in _numbers_of_main(save, exchange, unit):
        directory = checkpoint_directory(save, number, unit)
        faults = find_faults(directory, exchange)
        if not faults:
            return directory
        damaged.append(f"{directory}: {_listed(faults)}")
        logger.warning("%s is damaged and skipped: %s", directory, _listed(faults))
    if damaged:
        raise CheckpointError(
            f"all {len(damaged)} checkpoint(s) of {save} are damaged; resume from another folder, or remove "
            "them to start over:" + bullet_list(damaged)
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
    """What is wrong with a checkpoint's files, empty for a whole one; collective, the same on every rank.

    Every rank checks all sizes and hashes its share of the files.
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
    """Removes what a killed run left half-written, and restores what it was replacing; collective.

    Raises:
        CheckpointError: on every rank, when a checkpoint that was being replaced cannot be restored.
    """
    with together(exchange, f"tidy {save}"):
        for path in sorted(save.iterdir()) if exchange.runtime.is_main and save.is_dir() else []:
            if match := _REPLACED.fullmatch(path.name):
                final = path.with_name(match.group(1))
                if final.exists():
                    discard(path)
                else:
                    path.rename(final)
                    sync_to_disk(save)
            elif _LEFTOVER.fullmatch(path.name):
                discard(path)


def _numbers_of_main(save: Path, exchange: HostExchange, unit: str) -> Sequence[int]:
    """The main rank's list of checkpoints, newest first, on every rank; collective."""
    mine = checkpoint_numbers(save, unit) if exchange.runtime.is_main else []
    count = int(exchange.every_rank(np.array([len(mine)], np.int32))[0, 0])
    if not count:
        return []
    numbers = np.zeros(count, np.int64)
    numbers[: len(mine)] = mine
    return [int(number) for number in exchange.every_rank(numbers.view(np.int32))[0].view(np.int64)]


def _listed(faults: Sequence[str], shown: int = 5) -> str:
    more = f"; and {len(faults) - shown} more" if len(faults) > shown else ""
    return "; ".join(faults[:shown]) + more
