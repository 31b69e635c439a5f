"""``rank_0/ rank_1/ ...`` directories: finding, merging, splitting, and changing the layout."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from mindrlhf.checkpoint.element_types import element_type, to_numpy
from mindrlhf.checkpoint.fit import (
    expected_layouts,
    find_faults,
    full_shapes,
    local_shapes,
    raise_faults,
)
from mindrlhf.checkpoint.manifest import Digest
from mindrlhf.checkpoint.sources import (
    ArraySource,
    CastSource,
    LocalSource,
    MergedSource,
    SelectedSource,
    WeightSource,
)
from mindrlhf.checkpoint.weight_files import (
    CKPT,
    check_output_directory,
    only_weights_file,
    open_weights,
    write_weights,
)
from mindrlhf.configs.schema import ModelConfig
from mindrlhf.parallel.layout import Layout, Mesh
from mindrlhf.utils.errors import CheckpointError
from mindrlhf.utils.files import atomic_directory

FILE_PREFIX = "checkpoint_"
RESHARD_REMEDY = "check the YAML, or change the layout with scripts/transform_checkpoint.py"

_RANK_DIRECTORY = re.compile(r"rank_(\d+)")


def rank_directories(path: Path) -> dict[int, Path]:
    """Rank -> its directory, for every ``rank_i`` in directory ``path``, in rank order."""
    if not path.is_dir():
        return {}
    matches = ((_RANK_DIRECTORY.fullmatch(entry.name), entry) for entry in path.iterdir())
    found = {int(match.group(1)): entry for match, entry in matches if match and entry.is_dir()}
    return dict(sorted(found.items()))


def rank_file_name(rank: int, prefix: str = FILE_PREFIX, suffix: str = CKPT) -> str:
    """Where the weights of ``rank`` lie below the directory of all ranks."""
    return f"rank_{rank}/{prefix}{rank}{suffix}"


def find_rank_file(path: Path, mesh: Mesh, rank: int) -> Path:
    """The weights file of ``rank`` among the rank directories in ``path``.

    There may be one directory per rank, or one per model-parallel index, which all replicas then read.

    Raises:
        CheckpointError: the directories are not those of ``mesh``, or hold no or several files.
    """
    directories = rank_directories(path)
    found = list(directories)
    if found == list(range(mesh.size)):
        return only_weights_file(directories[rank])
    if found == list(range(mesh.mp)):
        return only_weights_file(directories[mesh.mp_index(rank)])
    names = ", ".join(f"rank_{number}" for number in found)
    wanted = f"{mesh.size} directories rank_0 .. rank_{mesh.size - 1}"
    if mesh.dp > 1:
        wanted += f" (or {mesh.mp}, one per slice)"
    raise CheckpointError(
        f"{path}: layout {mesh} needs {wanted}, found {len(found)}: {names}; {RESHARD_REMEDY}"
    )


def open_full(
    path: Path, model: ModelConfig, mesh: Mesh | None = None
) -> tuple[WeightSource, dict[str, Layout]]:
    """Opens a whole model, from one file or from its ranks, checked against its sizes.

    Args:
        path: whatever :func:`open_weights` takes, or a directory with ``rank_i`` directories.
        model: sizes.
        mesh: the layout of the rank directories.

    Returns:
        a source with exactly the model's canonical tensors, in model order, and their layouts over ``mesh``.

    Raises:
        CheckpointError: missing, extra or misshapen tensors, all of them; or ranks without ``mesh``.
    """
    if not rank_directories(path):
        return _open_whole(path, model)
    if mesh is None:
        raise CheckpointError(
            f"{path} holds rank directories: name the YAML whose parallel_config split them"
        )
    return _open_ranks(path, model, mesh)


def _open_whole(path: Path, model: ModelConfig) -> tuple[WeightSource, dict[str, Layout]]:
    with ExitStack() as on_error:
        source = on_error.enter_context(open_weights(path))
        layouts = expected_layouts(model, Mesh(), source.tensors)
        raise_faults(
            source.where, find_faults(source, full_shapes(layouts)), "check that the config is its own"
        )
        on_error.pop_all()
        return SelectedSource(source, layouts), layouts


def _open_ranks(path: Path, model: ModelConfig, mesh: Mesh) -> tuple[WeightSource, dict[str, Layout]]:
    with ExitStack() as on_error:
        files = [find_rank_file(path, mesh, rank) for rank in range(mesh.mp)]
        parts = [on_error.enter_context(open_weights(file)) for file in files]
        layouts = expected_layouts(model, mesh, parts[0].tensors)
        source = merge_parts(parts, layouts, str(path))
        on_error.pop_all()
        return source, layouts


def merge_parts(parts: list[WeightSource], layouts: Mapping[str, Layout], where: str) -> MergedSource:
    """One source of full tensors from one checked source per model-parallel index.

    Raises:
        CheckpointError: a part does not fit ``layouts``, or parts differ in element type.
    """
    shapes = local_shapes(layouts)
    faults = []
    for part in parts:
        faults += [f"{part.where}: {fault}" for fault in find_faults(part, shapes)]
        faults += [
            f"{part.where}: {name} is {info.dtype}, in {parts[0].where} it is {parts[0].tensors[name].dtype}"
            for name, info in part.tensors.items()
            if name in parts[0].tensors and info.dtype != parts[0].tensors[name].dtype
        ]
    raise_faults(where, faults, RESHARD_REMEDY)
    return MergedSource(parts, layouts, where)


def split_to_ranks(
    source: WeightSource,
    layouts: Mapping[str, Layout],
    output_dir: Path,
    *,
    prefix: str = FILE_PREFIX,
    suffix: str = CKPT,
    overwrite: bool = False,
    description: str | None = None,
) -> list[Path]:
    """Writes the part of every rank, data-parallel copies included, to ``output_dir/rank_i``.

    Args:
        source: full tensors, already checked.
        layouts: canonical name -> layout of the ranks.
        output_dir: appears when whole.
        prefix: of the file names.
        suffix: ``.ckpt`` or ``.safetensors``.
        overwrite: whether rank directories that are there may be replaced.
        description: what a progress bar should say; none is shown without.

    Returns:
        the files, in rank order.

    Raises:
        CheckpointError: the output exists or cannot be written.
    """
    check_output_directory(output_dir, _is_rank_directory, overwrite=overwrite)
    mesh = next(iter(layouts.values())).mesh
    names = [rank_file_name(rank, prefix, suffix) for rank in range(mesh.size)]
    try:
        with atomic_directory(output_dir) as temporary:
            for rank, name in enumerate(names):
                first = mesh.mp_index(rank)
                if rank == first:
                    shown = None if description is None else f"{description}, rank {rank}"
                    write_weights(temporary / name, LocalSource(source, layouts, rank), description=shown)
                else:
                    (temporary / name).parent.mkdir()
                    shutil.copyfile(temporary / names[first], temporary / name)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {output_dir}: {error.strerror or error}; free space, or write elsewhere"
        ) from error
    return [output_dir / name for name in names]


def _is_rank_directory(entry: Path) -> bool:
    return entry.is_dir() and _RANK_DIRECTORY.fullmatch(entry.name) is not None


def load_shard(
    path: Path,
    layouts: Mapping[str, Layout],
    rank: int,
    *,
    dtype: np.dtype[Any] | None = None,
    new: Collection[str] = (),
    ignore: Collection[str] = (),
) -> dict[str, np.ndarray]:
    """This rank's arrays by canonical name; nothing is loaded that does not fit exactly.

    Args:
        path: a full ``.ckpt`` or ``.safetensors`` file, a Hugging Face directory (its names are mapped), or
            a directory with ``rank_0/ rank_1/ ...``, one per rank or one per model-parallel index.
        layouts: canonical name -> layout of everything the model wants.
        rank: whose part.
        dtype: what to cast to; ``None`` keeps what is stored. bfloat16 is MindSpore's numpy type.
        new: names that the file may lack (fresh heads); they are then absent from the result.
        ignore: names that the file may have unused. A tied model's ``lm_head.weight`` that equals the
            embedding needs no mention.

    Raises:
        CheckpointError: everything else that is missing, extra or misshapen, in one error; damaged files;
            values that do not fit ``dtype``.
    """
    with _open_local(Path(path), layouts, rank, new, ignore) as local:
        wanted = CastSource(local, None if dtype is None else element_type(dtype))
        arrays = {name: to_numpy(wanted.read(name), info.dtype) for name, info in wanted.tensors.items()}
        wanted.check_overflow()
        return arrays


def load_resharded(
    path: Path, layouts: Mapping[str, Layout], rank: int, stored: Mesh
) -> dict[str, np.ndarray]:
    """This rank's arrays from rank directories that were split over another mesh.

    Of each tensor only the bytes of this rank's slice are read, from the files that have them.

    Args:
        path: holds ``rank_0/ rank_1/ ...``.
        layouts: canonical name -> layout of everything the model wants, over the present mesh.
        rank: whose part.
        stored: the mesh of the rank directories.

    Raises:
        CheckpointError: ranks are missing, or do not fit the layouts, all faults in one error.
    """
    if stored == next(iter(layouts.values())).mesh:
        return load_shard(path, layouts, rank)
    before = {name: layout.on(stored) for name, layout in layouts.items()}
    with ExitStack() as stack:
        files = [find_rank_file(path, stored, part) for part in range(stored.mp)]
        parts = [stack.enter_context(open_weights(file)) for file in files]
        local = LocalSource(merge_parts(parts, before, str(path)), layouts, rank)
        return {name: to_numpy(local.read(name), info.dtype) for name, info in local.tensors.items()}


def _open_local(
    path: Path, layouts: Mapping[str, Layout], rank: int, new: Collection[str], ignore: Collection[str]
) -> WeightSource:
    """A checked source of exactly this rank's local tensors."""
    is_split = bool(rank_directories(path))
    if is_split:
        mesh = next(iter(layouts.values())).mesh
        source = open_weights(find_rank_file(path, mesh, rank))
        shapes = local_shapes(layouts)
        remedy = RESHARD_REMEDY
    else:
        source = open_weights(path)
        shapes = full_shapes(layouts)
        remedy = "check the YAML's sizes against the file"
    try:
        raise_faults(source.where, find_faults(source, shapes, new=new, ignore=ignore), remedy)
    except BaseException:
        source.close()
        raise
    if is_split:
        return SelectedSource(source, [name for name in layouts if name in source.tensors])
    return LocalSource(source, layouts, rank)


def save_shard(
    directory: Path,
    rank: int,
    params: Mapping[str, np.ndarray],
    *,
    prefix: str = FILE_PREFIX,
    digest: Digest | None = None,
) -> Path:
    """Writes ``directory/rank_{rank}/{prefix}{rank}.ckpt``, which appears when whole.

    Args:
        directory: of all ranks.
        rank: whose part.
        params: canonical name -> local array, MindSpore's bfloat16 included.
        prefix: of the file name.
        digest: takes in the file's bytes.

    Returns:
        the file.

    Raises:
        CheckpointError: an array's type cannot be stored, or the disk refuses.
    """
    path = Path(directory) / rank_file_name(rank, prefix)
    write_weights(path, ArraySource(params), digest=digest)
    return path


def merge_shards(directory: Path, layouts: Mapping[str, Layout], output_file: Path) -> None:
    """Writes the full model of the rank directories in ``directory`` to one file, block by block.

    Args:
        directory: holds ``rank_0/ rank_1/ ...``.
        layouts: canonical name -> layout of the ranks.
        output_file: ``.ckpt`` or ``.safetensors``; an older one is replaced.

    Raises:
        CheckpointError: ranks are missing, or do not fit ``layouts``, all faults in one error.
    """
    directory = Path(directory)
    mesh = next(iter(layouts.values())).mesh
    with ExitStack() as stack:
        files = [find_rank_file(directory, mesh, rank) for rank in range(mesh.mp)]
        parts = [stack.enter_context(open_weights(file)) for file in files]
        write_weights(Path(output_file), merge_parts(parts, layouts, str(directory)))
