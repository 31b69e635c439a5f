"""Loads one rank's part of a model, whatever form the weights have."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from mindrlhf.checkpoint.checking import find_faults, full_shapes, local_shapes, raise_faults
from mindrlhf.checkpoint.dtypes import element_type, to_numpy
from mindrlhf.checkpoint.opening import open_weights
from mindrlhf.checkpoint.shards import RESHARD_REMEDY, find_rank_file, merge_parts, rank_directories
from mindrlhf.checkpoint.source import WeightSource
from mindrlhf.checkpoint.views import CastSource, LocalSource, SelectedSource
from mindrlhf.parallel.layout import Layout, Mesh


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
