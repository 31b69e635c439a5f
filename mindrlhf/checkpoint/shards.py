"""``rank_0/ rank_1/ ...`` directories: finding, merging, splitting, and changing the layout."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from mindrlhf.checkpoint.checking import (
    expected_layouts,
    find_faults,
    full_shapes,
    local_shapes,
    raise_faults,
)
from mindrlhf.checkpoint.opening import CKPT, only_weights_file, open_weights
from mindrlhf.checkpoint.source import WeightSource
from mindrlhf.checkpoint.views import LocalSource, MergedSource, SelectedSource
from mindrlhf.checkpoint.writing import check_output_directory, write_weights
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
