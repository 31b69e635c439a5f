"""Saves one rank's part of a model, and puts the parts together again."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from mindrlhf.checkpoint.convert import model_to_hf
from mindrlhf.checkpoint.dtypes import parse_dtype
from mindrlhf.checkpoint.hf_export import DEFAULT_MAX_SHARD_BYTES
from mindrlhf.checkpoint.manifest import Digest
from mindrlhf.checkpoint.opening import open_weights
from mindrlhf.checkpoint.shards import FILE_PREFIX, find_rank_file, merge_parts, rank_file_name
from mindrlhf.checkpoint.source import ArraySource
from mindrlhf.checkpoint.writing import write_weights
from mindrlhf.configs.schema import ModelConfig
from mindrlhf.parallel.layout import Layout, Mesh


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


def export_hf(
    weights_path: Path,
    output_dir: Path,
    model: ModelConfig,
    *,
    dtype: str | None = None,
    tokenizer_dir: Path | None = None,
    mesh: Mesh | None = None,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    overwrite: bool = True,
    leave_out: Collection[str] = (),
) -> None:
    """Writes a directory that transformers loads.

    Args:
        weights_path: a full file, or rank directories split over ``mesh``.
        output_dir: appears when whole; a former export there is replaced.
        model: sizes of the model.
        dtype: "fp32", "fp16", "bf16" or the long names; ``None`` keeps what is stored.
        tokenizer_dir: where tokenizer files are copied from; its ``config.json``, when of the same model,
            is the base of the written one.
        mesh: the layout of the rank directories.
        max_shard_bytes: larger models are written as several files with an index.
        overwrite: whether a former export may be replaced.
        leave_out: canonical names that are not exported, such as a policy's value head.

    Raises:
        CheckpointError: weights that do not fit ``model``, or an output that holds other files.
    """
    model_to_hf(
        Path(weights_path),
        Path(output_dir),
        model,
        dtype=None if dtype is None else parse_dtype(dtype),
        tokenizer_dir=tokenizer_dir,
        mesh=mesh,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        leave_out=leave_out,
    )
