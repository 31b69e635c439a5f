"""Checkpoints of a whole training state: ``iteration_NNNNNN/`` of PPO, with one file per rank and model.

======================================  ==========================================================
``policy/``, ``critic/``                weights and heads, ``rank_0/ rank_1/ ...`` in each
``policy_optimizer/``, ...              moments, and the step that the learning-rate schedule is at
``random/rank_i.json``                  Python's and NumPy's global generators of each rank
``state.json``                          iteration, data cursors, KL coefficient, reward statistics
``config.json``                         the resolved configuration that made it, with the layouts
``manifest.json``                       size and SHA-256 of all of these; written last
======================================  ==========================================================

Rollouts, permutations and data orders need no random state: their streams are keyed by the seed, the
iteration and the row (:mod:`mindrlhf.utils.seeds`), so cursor and iteration are all of it. A shared critic
is in ``policy/``. The generating policy and the reference are not kept: the first equals the trained one
after its sync, the other comes from its own file.

A stage before PPO has ``step_NNNNNN/`` with one model, ``policy/`` or ``reward/``; all else is the same.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from mindspore import Parameter, Tensor
from mindspore.nn import Optimizer

from mindrlhf.checkpoint.manifest import Digest, FileRecord, digest_file, write_manifest
from mindrlhf.checkpoint.shards import load_resharded, rank_file_name, save_shard
from mindrlhf.models.qwen2.networks import SequenceModel
from mindrlhf.parallel.layout import Layout
from mindrlhf.runtime.host_exchange import HostExchange
from mindrlhf.trainer.compatibility import PPO_JOB, Kind, check_compatible, stored_meshes
from mindrlhf.utils.errors import CheckpointError
from mindrlhf.utils.files import atomic_file, check_writable, sync_to_disk
from mindrlhf.utils.logging import get_logger
from mindrlhf.utils.provenance import CONFIG_FILE, provenance, write_provenance
from mindrlhf.utils.seeds import generator_states, restore_generators

STATE_FILE = "state.json"
LEFT_PREFIX = "left_"
"""Before the name of a checkpoint that is newer than the one a run went on from."""

_RANDOM = "random"
_SIZE_BYTES = 8

logger = get_logger(__name__)


class Trained(NamedTuple):
    """A model that training changes.

    Attributes:
        name: of its directory in a checkpoint.
        model: holds this rank's shards.
        optimizer: over them.
    """

    name: str
    model: SequenceModel
    optimizer: Optimizer


class Stateful(Protocol):
    """What is neither weight nor moment and must go on where it stood: a cursor, a controller."""

    def state_dict(self) -> Mapping[str, Any]:
        """What a checkpoint must keep, as plain numbers and texts."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from :meth:`state_dict`."""
        ...


def load_states(parts: Mapping[str, Stateful], state: Mapping[str, Any], directory: Path) -> None:
    """Gives each part its own of a checkpoint's ``state``; one that has none there starts anew."""
    for name, part in parts.items():
        if name in state:
            part.load_state_dict(state[name])
        else:
            logger.warning("%s has no state of %s, which starts anew", directory, name)


def checkpoint_numbers(directory: Path, kind: Kind = PPO_JOB) -> list[int]:
    """Iterations or steps of the checkpoints below ``directory``, whole or not, newest first."""
    name = re.compile(rf"{kind.unit}_(\d+)")
    found = (name.fullmatch(path.name) for path in directory.glob(f"{kind.unit}_*") if path.is_dir())
    return sorted((int(match.group(1)) for match in found if match), reverse=True)


def checkpoint_directory(directory: Path, number: int, kind: Kind = PPO_JOB) -> Path:
    """Where the checkpoint after an iteration or step lies below ``directory``."""
    return directory / f"{kind.unit}_{number:06d}"


class TrainingCheckpoints:
    """Saves and loads the training state of one rank below a directory that all ranks share.

    A checkpoint is written under a temporary name, every file and directory of it is brought to the disk,
    the manifest comes last, and then it is renamed: a directory with the final name is whole.

    Args:
        directory: where checkpoints go; made when missing.
        rank: this worker.
        keep: how many checkpoints stay; older ones are removed after a newer one is whole. 0 keeps all.
        job: the configuration that makes them, a dataclass or a mapping.
        kind: of the job.

    Attributes:
        last: the checkpoint that this run has saved or loaded last, ``None`` before.

    Raises:
        CheckpointError: the directory cannot be written.
    """

    def __init__(self, directory: Path, rank: int, keep: int, job: Any, kind: Kind = PPO_JOB) -> None:
        self.directory = directory
        self.rank = rank
        self.keep = keep
        self.job = job
        self.kind = kind
        self.last: Path | None = None
        check_writable(directory, rank)

    def save(
        self,
        number: int,
        trained: Sequence[Trained],
        state: Mapping[str, Any],
        exchange: HostExchange,
    ) -> Path:
        """Writes this rank's part and makes the checkpoint appear; collective. Returns its directory.

        Args:
            number: iterations or steps that are done.
            trained: what to save.
            state: everything else, as JSON takes it.
            exchange: between the ranks.

        Raises:
            CheckpointError: a rank could not write its part; on all ranks, and nothing is left of it.
        """
        final = self._directory(number)
        temporary = _hidden(final)
        if self.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        exchange.barrier()
        mine: dict[str, FileRecord] = {}
        fault: Exception | None = None
        try:
            mine = self._write_mine(temporary, trained)
        except (CheckpointError, OSError) as error:
            fault = error
        _raise_together(fault, temporary, exchange)
        files = _gather_records(mine, exchange)
        try:
            if self.rank == 0:
                self._finish(temporary, final, state, files)
        except OSError as error:
            fault = error
        _raise_together(fault, temporary, exchange)
        self.last = final
        return final

    def load(self, directory: Path, trained: Sequence[Trained]) -> dict[str, Any]:
        """Fills this rank's models and optimizers from a checkpoint and returns its ``state``.

        The checkpoint may be of another layout: this rank then reads its slices from the ranks that have
        them. Its content is not checked here, see :func:`mindrlhf.trainer.resuming.find_faults`.

        Raises:
            CheckpointError: the directory is no checkpoint, or one of another model.
        """
        state_file = directory / STATE_FILE
        try:
            state: dict[str, Any] = json.loads(state_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{state_file}: damaged ({error}); resume from another one") from error
        check_compatible(directory, self.job, self.kind, quiet=True)
        meshes = stored_meshes(directory, self.kind)
        for name, model, optimizer in trained:
            stored = meshes[name]
            model.load(load_resharded(directory / name, model.layouts, self.rank, stored))
            states = _optimizer_states(optimizer, model)
            layouts = {key: _state_layout(key, parameter, model) for key, parameter in states.items()}
            arrays = load_resharded(directory / f"{name}_optimizer", layouts, self.rank, stored)
            for key, array in arrays.items():
                states[key].set_data(Tensor(array).astype(states[key].dtype))
        _load_generators(directory, self.rank)
        self.last = directory
        return state

    def find(self, number: int) -> Path | None:
        """This run's checkpoint after an iteration or step when it is the last one, in this directory."""
        wanted = self._directory(number)
        return self.last if self.last is not None and self.last.resolve() == wanted.resolve() else None

    def set_newer_aside(self, number: int) -> None:
        """Renames checkpoints after the one from which a run goes on: they are not of this run."""
        for newer in checkpoint_numbers(self.directory, self.kind):
            if newer > number and self.rank == 0:
                path = self._directory(newer)
                aside = path.with_name(LEFT_PREFIX + path.name)
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                logger.warning("%s is newer than what this run goes on from: it is now %s", path, aside.name)

    def _directory(self, number: int) -> Path:
        return checkpoint_directory(self.directory, number, self.kind)

    def _write_mine(self, temporary: Path, trained: Sequence[Trained]) -> dict[str, FileRecord]:
        """Writes the files of this rank; returns their records by part."""
        records = {}
        for name, model, optimizer in trained:
            for part, arrays in (
                (name, dict(model.shards())),
                (f"{name}_optimizer", _optimizer_arrays(optimizer, model)),
            ):
                digest = Digest()
                save_shard(temporary / part, self.rank, arrays, digest=digest)
                records[part] = digest.record
        records[_RANDOM] = _write_json(temporary / _part_file(_RANDOM, self.rank), generator_states())
        return records

    def _finish(
        self, temporary: Path, final: Path, state: Mapping[str, Any], files: dict[str, FileRecord]
    ) -> None:
        """What the main rank adds when all ranks have written; then the checkpoint appears."""
        files[STATE_FILE] = _write_json(temporary / STATE_FILE, state)
        files[CONFIG_FILE] = digest_file(write_provenance(temporary, provenance(self.job)))
        write_manifest(temporary, files)
        for directory in sorted({path.parent for path in temporary.rglob("*")}):
            sync_to_disk(directory)
        replaced = final.with_name(f".{final.name}.old")
        shutil.rmtree(replaced, ignore_errors=True)
        if final.exists():
            final.rename(replaced)
        temporary.rename(final)
        sync_to_disk(self.directory)
        shutil.rmtree(replaced, ignore_errors=True)
        for number in checkpoint_numbers(self.directory, self.kind)[self.keep :] if self.keep else []:
            old = self._directory(number)
            # Renamed first: one that is removed by half must not have a checkpoint's name.
            shutil.rmtree(old.rename(_hidden(old)))


def _hidden(checkpoint: Path) -> Path:
    """Its name while it is not whole, see :func:`mindrlhf.trainer.resuming.tidy`."""
    return checkpoint.with_name(f".{checkpoint.name}.tmp")


def _write_json(path: Path, content: Mapping[str, Any]) -> FileRecord:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(dict(content), indent=1), encoding="utf-8")
    return digest_file(path)


def _load_generators(directory: Path, rank: int) -> None:
    """This rank's random generators; with more ranks than were saved, the others keep theirs."""
    path = directory / _part_file(_RANDOM, rank)
    if path.is_file():
        restore_generators(json.loads(path.read_text(encoding="utf-8")))


def _raise_together(fault: Exception | None, temporary: Path, exchange: HostExchange) -> None:
    """Raises on every rank when one of them has a fault, so that none waits for it; collective."""
    failed = np.flatnonzero(exchange.every_rank(np.array([fault is not None], np.int32)))
    if not len(failed):
        return
    if exchange.runtime.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
    exchange.barrier()
    if fault is None:
        raise CheckpointError(f"{temporary}: rank {failed[0]} could not write its part; its log says why")
    if isinstance(fault, OSError):
        raise CheckpointError(f"cannot write {temporary}: {fault.strerror or fault}") from fault
    raise fault


def _part_file(part: str, rank: int) -> str:
    """Where ``rank`` keeps a part of the state, below the checkpoint."""
    return f"{part}/rank_{rank}.json" if part == _RANDOM else f"{part}/{rank_file_name(rank)}"


def _gather_records(mine: Mapping[str, FileRecord], exchange: HostExchange) -> dict[str, FileRecord]:
    """The records of every rank's parts by file; collective."""
    rows = [
        record.size.to_bytes(_SIZE_BYTES, "little") + bytes.fromhex(record.sha256) for record in mine.values()
    ]
    everyone = exchange.every_rank(np.frombuffer(b"".join(rows), np.int32))
    files = {}
    for rank, packet in enumerate(everyone):
        for part, row in zip(mine, packet.reshape(len(rows), -1), strict=True):
            content = row.tobytes()
            size = int.from_bytes(content[:_SIZE_BYTES], "little")
            files[_part_file(part, rank)] = FileRecord(size, content[_SIZE_BYTES:].hex())
    return files


def _optimizer_states(optimizer: Optimizer, model: SequenceModel) -> dict[str, Parameter]:
    """Moments and step count by name; what the optimizer shares with the model is left out."""
    own = model.parameters_dict().keys()
    return {
        parameter.name: parameter for parameter in optimizer.get_parameters() if parameter.name not in own
    }


def _optimizer_arrays(optimizer: Optimizer, model: SequenceModel) -> dict[str, np.ndarray]:
    return {name: parameter.asnumpy() for name, parameter in _optimizer_states(optimizer, model).items()}


def _state_layout(name: str, parameter: Parameter, model: SequenceModel) -> Layout:
    """The layout of a moment is its parameter's; the step count is whole on every rank."""
    for own, layout in model.layouts.items():
        if name.endswith("." + own):
            return layout
    return Layout(model.groups.mesh, tuple(parameter.shape), (None,) * len(parameter.shape))
