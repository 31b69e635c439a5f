"""Checkpoints of a whole training state: ``iteration_NNNNNN/`` of PPO, ``step_NNNNNN/`` of other recipes.

======================================  ==========================================================
``policy/``, ``critic/``, ``reward/``   weights and heads of what is trained, ``rank_0/ rank_1/ ...`` in each,
                                        and the model's sizes as Hugging Face's ``config.json``
``policy_optimizer/``, ...              moments, and the step of the learning-rate schedule
``random/rank_i.json``                  Python's and NumPy's global generators of each rank
``state.json``                          step, layouts, what must not change, cursors, coefficients, moments
``config.json``                         the resolved configuration that made it, and what it learned from
``manifest.json``                       size and SHA-256 of all of these; written last
======================================  ==========================================================

Rollouts, permutations and data orders need no random state: their streams are keyed by the seed, the
iteration and the row (:mod:`mindrlhf.utils.seeds`), so cursor and step suffice. A shared critic
is in ``policy/``. The generating policy and the reference are not saved: the first equals the trained one
after its sync, the other comes from its own file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from mindrlhf.checkpoint.hf_config import CONFIG_NAME as HF_CONFIG
from mindrlhf.checkpoint.manifest import Digest, FileRecord, digest_file, write_manifest
from mindrlhf.checkpoint.shards import load_shard, rank_file_name, save_shard
from mindrlhf.configs.keys import WEIGHTS_KEYS, RunConfig
from mindrlhf.models.networks import SequenceModel
from mindrlhf.parallel.layout import Layout, Mesh
from mindrlhf.runtime.host_exchange import HostExchange, together
from mindrlhf.trainer.optimizer import AdamW
from mindrlhf.utils.errors import CheckpointError, MindRLHFError, bullet_list
from mindrlhf.utils.files import atomic_file, remove, swap_in, sync_to_disk
from mindrlhf.utils.logging import get_logger
from mindrlhf.utils.provenance import plain, provenance, write_provenance
from mindrlhf.utils.result_files import (
    CONFIG_FILE,
    STATE_FILE,
    checkpoint_directory,
    checkpoint_numbers,
    set_aside,
)
from mindrlhf.utils.seeds import generator_states, restore_generators

FORMAT = 2
"""Of the state file; checkpoints of another format are refused."""

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
    optimizer: AdamW


class Stateful(Protocol):
    """State that is neither weight nor moment and must be restored on resuming: a cursor, a controller."""

    def state_dict(self) -> Mapping[str, Any]:
        """What a checkpoint must keep, as plain numbers and texts."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        ...


def discard(path: Path) -> None:
    """Removes a file or directory; logs a warning if that fails, because cleaning up must not end a job.

    A link is removed, and what it names stays.
    """
    try:
        if not path.name.startswith("."):
            # Renamed first: a half-removed directory must not have a checkpoint's name.
            path = path.rename(path.with_name(f".{path.name}.tmp"))
        remove(path)
    except OSError as error:
        logger.warning("%s cannot be removed (%s); remove it yourself", path, error.strerror or error)


def read_state(directory: Path) -> dict[str, Any]:
    """The content of a checkpoint's ``state.json``.

    Raises:
        CheckpointError: it is missing, damaged or of another format.
    """
    path = directory / STATE_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        found = state.get("format")
        if found == FORMAT:
            int(state["step"]), dict(state["parts"]), dict(state["fixed"])
            _meshes(state)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged ({error!r}); resume from another checkpoint") from error
    if found != FORMAT:
        raise CheckpointError(
            f"{path}: format {found}, but this version of MindRLHF resumes format {FORMAT} only; start a "
            "new run from its weights"
        )
    return dict(state)


class TrainingCheckpoints:
    """Saves and loads the training state of one rank below a directory that all ranks share.

    A checkpoint is written under a temporary name, every file and directory of it is synced to disk, the
    manifest is written last, and then the directory is renamed: one with the final name is whole.

    Args:
        directory: where checkpoints go; made when missing.
        unit: what a step is called, ``iteration`` or ``step``; checkpoints are named after it.
        exchange: between the ranks.
        keep: how many checkpoints to keep; older ones are removed once a newer one is whole. 0 keeps all.
        configuration: the resolved configuration of the job, a dataclass or a mapping.
        fixed: the settings, by dotted name, with which a checkpoint can be resumed at all: with another
            value, the saved weights, moments or orders would mean something else.
        inputs: what the run learns from, see :func:`mindrlhf.utils.provenance.fingerprints`; ``None`` on
            other ranks than the main one.

    Attributes:
        last: the checkpoint that this run has saved or loaded last, ``None`` before.
        resumptions: each time that the run was resumed: from which checkpoint, and what had changed.
    """

    def __init__(
        self,
        directory: Path,
        unit: str,
        exchange: HostExchange,
        *,
        keep: int,
        configuration: Any,
        fixed: Mapping[str, Any],
        inputs: Mapping[str, Any] | None = None,
    ) -> None:
        self.directory, self.unit, self.exchange, self.keep = directory, unit, exchange, keep
        self.rank = exchange.runtime.rank
        self.configuration, self.inputs = configuration, inputs
        self.resumptions: list[dict[str, Any]] = []
        self.outputs: dict[str, str] = {}
        self.fixed: dict[str, Any] = json.loads(json.dumps(plain(fixed)))
        self.last: Path | None = None

    def save(self, step: int, trained: Sequence[Trained], stateful: Mapping[str, Stateful]) -> Path:
        """Writes this rank's part and makes the checkpoint appear; collective. Returns its directory.

        Args:
            step: iterations or steps that are done.
            trained: the models to save.
            stateful: everything else, by name.

        Raises:
            CheckpointError: on all ranks when one could not write its part; nothing is left behind.
        """
        final = self._directory(step)
        with appearing(final, self.exchange) as temporary:
            with together(self.exchange, f"write {temporary}"):
                mine = self._write_mine(temporary, trained)
            files = _gather_records(mine, self.exchange)
            with together(self.exchange, f"write {temporary}"):
                if self.rank == 0:
                    self._write_rest(temporary, trained, self._state(step, trained, stateful), files)
        if self.rank == 0 and self.keep:
            for number in checkpoint_numbers(self.directory, self.unit)[self.keep :]:
                discard(self._directory(number))
        self.last = final
        return final

    def load(self, directory: Path, trained: Sequence[Trained], stateful: Mapping[str, Stateful]) -> int:
        """Fills this rank's models, optimizers and other state from a checkpoint; returns its step.

        The checkpoint may be of another layout: this rank then reads its slices from the ranks that have
        them. The files are not checked against the manifest here, see
        :func:`mindrlhf.trainer.resume.find_faults`.

        Raises:
            CheckpointError: the directory is not a checkpoint, or is one of another model.
        """
        state = read_state(directory)
        check_fixed(directory, state["fixed"], self.fixed)
        meshes = _meshes(state)
        for name, model, optimizer in trained:
            model.load(load_shard(directory / name, model.layouts, self.rank))
            layouts = {key: _state_layout(key, shape, model) for key, shape in optimizer.shapes().items()}
            moments = directory / f"{name}_optimizer"
            arrays = load_shard(moments, layouts, self.rank, stored=meshes[name])
            optimizer.load(arrays)
        for name, part in stateful.items():
            if name in state["parts"]:
                part.load_state_dict(state["parts"][name])
            else:
                logger.warning("%s has no state of %s, which starts from the beginning", directory, name)
        _load_generators(directory, self.rank)
        self.last = directory
        return int(state["step"])

    def find(self, step: int) -> Path | None:
        """The last checkpoint when it is of this step and in this directory; ``None`` otherwise."""
        wanted = self._directory(step)
        return self.last if self.last is not None and self.last.resolve() == wanted.resolve() else None

    @property
    def has_own(self) -> bool:
        """Whether the last checkpoint that was saved or loaded is in this directory, perhaps as a link."""
        return self.last is not None and self.last.absolute().parent.resolve() == self.directory.resolve()

    def set_newer_aside(self, step: int) -> None:
        """Renames checkpoints that are newer than the one resumed from: they are not of this run.

        Raises:
            OSError: on the main rank, the only one that renames.
        """
        for newer in checkpoint_numbers(self.directory, self.unit):
            if newer > step and self.rank == 0:
                path = self._directory(newer)
                logger.warning(
                    "%s is newer than the checkpoint resumed from: it is now %s", path, set_aside(path).name
                )

    def provenance(self) -> dict[str, Any]:
        """The content of ``config.json``, here and in a checkpoint."""
        return provenance(self.configuration) | {
            "inputs": self.inputs or {},
            "outputs": self.outputs,
            "resumptions": self.resumptions,
        }

    def _directory(self, step: int) -> Path:
        return checkpoint_directory(self.directory, step, self.unit)

    def _state(
        self, step: int, trained: Sequence[Trained], stateful: Mapping[str, Stateful]
    ) -> dict[str, Any]:
        meshes = {name: model.groups.mesh for name, model, _ in trained}
        return {
            "format": FORMAT,
            "step": step,
            "layouts": {
                name: {"data_parallel": mesh.dp, "model_parallel": mesh.mp} for name, mesh in meshes.items()
            },
            "fixed": self.fixed,
            "parts": {name: dict(part.state_dict()) for name, part in stateful.items()},
        }

    def _write_mine(self, temporary: Path, trained: Sequence[Trained]) -> dict[str, FileRecord]:
        """Writes the files of this rank; returns their records by part."""
        records = {}
        for name, model, optimizer in trained:
            for part, arrays in (
                (name, dict(model.shards())),
                (f"{name}_optimizer", optimizer.arrays()),
            ):
                digest = Digest()
                save_shard(temporary / part, self.rank, arrays, digest=digest)
                records[part] = digest.record
        records[_RANDOM] = _write_json(temporary / _part_file(_RANDOM, self.rank), generator_states())
        return records

    def _write_rest(
        self,
        temporary: Path,
        trained: Sequence[Trained],
        state: Mapping[str, Any],
        files: dict[str, FileRecord],
    ) -> None:
        """What the main rank adds when all ranks have written; ``files`` are the records so far."""
        for name, model, _ in trained:
            files[f"{name}/{HF_CONFIG}"] = _write_json(temporary / name / HF_CONFIG, model.described())
        files[STATE_FILE] = _write_json(temporary / STATE_FILE, state)
        files[CONFIG_FILE] = digest_file(write_provenance(temporary, self.provenance()))
        write_manifest(temporary, files)


@contextmanager
def appearing(final: Path, exchange: HostExchange) -> Iterator[Path]:
    """Yields a temporary directory that all ranks write in, and that then becomes ``final``; collective.

    Its names are synced to the disk; an older ``final`` is replaced. After an error, which must be one on
    every rank (see :func:`together`), nothing is left, and the older directory is as it was.

    Raises:
        CheckpointError: on every rank, when the main rank cannot rename it.
    """
    temporary, replaced = (final.with_name(f".{final.name}.{end}") for end in ("tmp", "old"))
    is_main = exchange.runtime.is_main
    if is_main:
        discard(temporary)
    exchange.barrier()
    try:
        yield temporary
        with together(exchange, f"write {final}"):
            if is_main:
                for directory in sorted({path.parent for path in temporary.rglob("*")}):
                    sync_to_disk(directory)
                swap_in((temporary, final, replaced))
    except MindRLHFError:
        if is_main:
            discard(temporary)
        raise
    if is_main:
        discard(replaced)


def model_identity(config: RunConfig) -> dict[str, Any]:
    """What of a YAML must not change on resuming: the model, and the meaning of its optimizer's state."""
    found = {f"model.{key}": getattr(config.model, key) for key in WEIGHTS_KEYS}
    return found | {"optimizer.type": config.optimizer.get("type")}


def check_fixed(directory: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses a checkpoint of a job that differs in what must not change.

    Args:
        directory: the checkpoint.
        before, now: the ``fixed`` settings of the checkpoint and of this job.

    Raises:
        CheckpointError: lists every setting that differs, with both values. Settings that only one side has
            follow from these, and are listed only when there are none.
    """
    changes = [
        f"{key}: {before[key]} in the checkpoint, {now[key]} now"
        for key in sorted(before.keys() & now.keys())
        if before[key] != now[key]
    ]
    # What only one of the jobs has follows from a setting that differs: another kind of critic, or recipe.
    if different := changes or [
        f"{key}: {'' if key in before else 'not '}in the checkpoint, {'' if key in now else 'not '}now"
        for key in sorted(before.keys() ^ now.keys())
    ]:
        raise CheckpointError(
            f"{directory} cannot be resumed by this job, {len(different)} difference(s); give the "
            f"configuration that made it ({CONFIG_FILE} in it), or start over in another --save_ckpt_dir:"
            + bullet_list(different, most=None)
        )


def _meshes(state: Mapping[str, Any]) -> dict[str, Mesh]:
    return {
        name: Mesh(int(layout["data_parallel"]), int(layout["model_parallel"]))
        for name, layout in state["layouts"].items()
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> FileRecord:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(dict(content), indent=1), encoding="utf-8")
    return digest_file(path)


def _load_generators(directory: Path, rank: int) -> None:
    """This rank's random generators; with more ranks than were saved, the others keep theirs."""
    path = directory / _part_file(_RANDOM, rank)
    if path.is_file():
        restore_generators(json.loads(path.read_text(encoding="utf-8")))


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


def _state_layout(name: str, shape: tuple[int, ...], model: SequenceModel) -> Layout:
    """The layout of a moment is its parameter's; the step count is whole on every rank."""
    for own, layout in model.layouts.items():
        if name.endswith("." + own):
            return layout
    return Layout(model.groups.mesh, shape, (None,) * len(shape))
