"""One model in ``rank_0/ rank_1/ ...``: a rank's part saved and loaded, merged, split, resharded."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mindrlhf.checkpoint.element_types import element_type, to_mindspore
from mindrlhf.checkpoint.manifest import Digest
from mindrlhf.checkpoint.sources import (
    ArraySource,
    CastSource,
    LocalSource,
    MergedSource,
    WeightSource,
    closed_on_error,
    select,
)
from mindrlhf.checkpoint.weight_checks import (
    expected_layouts,
    find_faults,
    full_shapes,
    local_shapes,
    raise_faults,
)
from mindrlhf.checkpoint.weight_files import (
    CKPT,
    MINDSPORE_SUFFIXES,
    only_weights_file,
    open_weights,
    write_weights,
)
from mindrlhf.configs.schema import ModelConfig
from mindrlhf.parallel.layout import Layout, Mesh
from mindrlhf.utils.errors import CheckpointError
from mindrlhf.utils.files import atomic_directory
from mindrlhf.utils.outputs import Output, check_outputs, directory_of

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
    """Path of the weights of ``rank`` below the directory of all ranks."""
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


def save_shard(
    directory: Path,
    rank: int,
    params: Mapping[str, np.ndarray],
    *,
    prefix: str = FILE_PREFIX,
    digest: Digest | None = None,
) -> Path:
    """Writes ``directory/rank_{rank}/{prefix}{rank}.ckpt``, which appears when complete.

    Args:
        directory: of all ranks.
        rank: whose part.
        params: canonical name -> local array, MindSpore's bfloat16 included.
        prefix: of the file name.
        digest: takes in the file's bytes.

    Returns:
        the file.

    Raises:
        CheckpointError: an array's type cannot be stored, or writing fails.
    """
    path = Path(directory) / rank_file_name(rank, prefix)
    write_weights(path, ArraySource(params), digest=digest)
    return path


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
        layouts: canonical name -> layout of everything the model has.
        rank: whose part.
        dtype: what to cast to; ``None`` keeps what is stored. bfloat16 is MindSpore's numpy type.
        new: names that the file may lack (fresh heads); they are then absent from the result.
        ignore: names that the file may have and that are not used. A tied model's ``lm_head.weight`` that
            equals the embedding need not be listed.

    Raises:
        CheckpointError: everything else that is missing, extra or misshapen, in one error; damaged files;
            values that do not fit ``dtype``.
    """
    path = Path(path)
    is_split = bool(rank_directories(path))
    if is_split:
        source = open_weights(find_rank_file(path, _mesh_of(layouts), rank))
        shapes, remedy = local_shapes(layouts), RESHARD_REMEDY
    else:
        source = open_weights(path)
        shapes, remedy = full_shapes(layouts), "check the YAML's sizes against the file"
    with source:
        raise_faults(source.where, find_faults(source, shapes, new=new, ignore=ignore), remedy)
        local = select(source, layouts) if is_split else LocalSource(source, layouts, rank)
        wanted = CastSource(local, None if dtype is None else element_type(dtype))
        arrays = {name: to_mindspore(wanted.read(name)) for name in wanted.tensors}
        wanted.check_overflow()
        return arrays


def load_resharded(
    path: Path, layouts: Mapping[str, Layout], rank: int, stored: Mesh
) -> dict[str, np.ndarray]:
    """This rank's arrays from rank directories that were split over another mesh.

    Of each tensor only the bytes of this rank's slice are read, from the files that have them.

    Args:
        path: holds ``rank_0/ rank_1/ ...``.
        layouts: canonical name -> layout of everything the model has, over the current mesh.
        rank: whose part.
        stored: the mesh of the rank directories.

    Raises:
        CheckpointError: ranks are missing, or do not fit the layouts, all faults in one error.
    """
    if stored == _mesh_of(layouts):
        return load_shard(path, layouts, rank)
    with _open_ranks(path, {name: layout.on(stored) for name, layout in layouts.items()}) as merged:
        local = LocalSource(merged, layouts, rank)
        return {name: to_mindspore(local.read(name)) for name in local.tensors}


def merge_shards(directory: Path, layouts: Mapping[str, Layout], output_file: Path) -> None:
    """Writes the full model of the rank directories in ``directory`` to one file, block by block.

    Args:
        directory: holds ``rank_0/ rank_1/ ...``.
        layouts: canonical name -> layout of the ranks.
        output_file: ``.ckpt`` or ``.safetensors``; an older one is replaced.

    Raises:
        CheckpointError: ranks are missing, or do not fit ``layouts``, all faults in one error.
    """
    with _open_ranks(Path(directory), layouts) as merged:
        write_weights(Path(output_file), merged)


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
        source = open_weights(path)
        with closed_on_error([source]):
            layouts = expected_layouts(model, Mesh(), source.tensors)
            faults = find_faults(source, full_shapes(layouts))
            raise_faults(source.where, faults, "check that the config belongs to the weights")
        return select(source, layouts), layouts
    if mesh is None:
        raise CheckpointError(
            f"{path} holds rank directories: name the YAML whose parallel_config split them"
        )
    parts = _open_parts(path, mesh)
    with closed_on_error(parts):
        layouts = expected_layouts(model, mesh, parts[0].tensors)
    return _merged(parts, layouts, str(path)), layouts


def _mesh_of(layouts: Mapping[str, Layout]) -> Mesh:
    return next(iter(layouts.values())).mesh


def _open_ranks(path: Path, layouts: Mapping[str, Layout]) -> MergedSource:
    """The full tensors of the rank directories in ``path``, which are split as ``layouts`` say."""
    return _merged(_open_parts(path, _mesh_of(layouts)), layouts, str(path))


def _open_parts(path: Path, mesh: Mesh) -> list[WeightSource]:
    """One source per model-parallel index."""
    parts: list[WeightSource] = []
    with closed_on_error(parts):
        for index in range(mesh.mp):
            parts.append(open_weights(find_rank_file(path, mesh, index)))
    return parts


def _merged(parts: Sequence[WeightSource], layouts: Mapping[str, Layout], where: str) -> MergedSource:
    """Full tensors from one source per model-parallel index.

    Raises:
        CheckpointError: a part does not fit ``layouts``, or parts differ in element type.
    """
    shapes = local_shapes(layouts)
    first = parts[0]
    faults = []
    with closed_on_error(parts):
        for part in parts:
            faults += [f"{part.where}: {fault}" for fault in find_faults(part, shapes)]
            faults += [
                f"{part.where}: {name} is {info.dtype}, in {first.where} it is {first.tensors[name].dtype}"
                for name, info in part.tensors.items()
                if name in first.tensors and info.dtype != first.tensors[name].dtype
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
        overwrite: whether existing rank directories may be replaced.
        description: text of the progress bar; no bar without it.

    Returns:
        the files, in rank order.

    Raises:
        MindRLHFError: the output exists or cannot be written.
    """
    check_outputs([ranks_output("output", output_dir, overwrite=overwrite)], [])
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


def ranks_output(flag: str, path: Path, *, overwrite: bool = False) -> Output:
    """A directory of rank directories, for :func:`mindrlhf.utils.outputs.check_outputs`."""
    return Output(flag, path, directory_of("a directory of ranks", _is_rank_directory), overwrite)


def _is_rank_directory(entry: Path) -> bool:
    is_rank = entry.is_dir() and _RANK_DIRECTORY.fullmatch(entry.name) is not None
    return is_rank and all(file.suffix in MINDSPORE_SUFFIXES for file in entry.iterdir())
