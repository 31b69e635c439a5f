"""Weights in a Hugging Face model directory: which files, in what order of preference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, cast

import numpy as np

from mindrlhf.checkpoint.ckpt_file import open_ckpt, write_ckpt
from mindrlhf.checkpoint.hf_config import read_json
from mindrlhf.checkpoint.manifest import Digest
from mindrlhf.checkpoint.safetensors_file import open_safetensors, write_safetensors
from mindrlhf.checkpoint.sources import (
    ArraySource,
    CastSource,
    RenamedSource,
    UnitedSource,
    WeightSource,
    bullet_list,
)
from mindrlhf.checkpoint.torch_file import TorchSource
from mindrlhf.configs.faults import shown
from mindrlhf.models.qwen2 import weight_names
from mindrlhf.models.qwen2.layouts import SCORE_HEAD_BIAS, SCORE_HEAD_WEIGHT
from mindrlhf.utils.errors import CheckpointError
from mindrlhf.utils.files import atomic_file, probe_directory

SAFETENSORS_NAME = "model.safetensors"
TORCH_NAME = "pytorch_model.bin"
INDEX_SUFFIX = ".index.json"

_MAX_NAME = 255
"""Longest file name of common file systems; asking for a longer one is an error of the system's."""

WEIGHT_FILES = (
    SAFETENSORS_NAME,
    SAFETENSORS_NAME + INDEX_SUFFIX,
    TORCH_NAME,
    TORCH_NAME + INDEX_SUFFIX,
)


def has_hf_weights(directory: Path) -> bool:
    """Whether ``directory`` holds weights under Hugging Face's file names."""
    return any((directory / name).exists() for name in WEIGHT_FILES)


def open_hf_directory(directory: Path) -> WeightSource:
    """A source on the weights of a Hugging Face directory, safetensors before torch, under their names there.

    Raises:
        CheckpointError: no weights, a bad index, or missing or damaged files.
    """
    for name in WEIGHT_FILES:
        path = directory / name
        if not path.exists():
            continue
        if name == SAFETENSORS_NAME:
            return open_safetensors(path)
        if name == TORCH_NAME:
            return TorchSource([path], str(path))
        return _open_indexed(path)
    raise CheckpointError(f"{directory} has no weights: expected one of {', '.join(WEIGHT_FILES)}")


def _open_indexed(index: Path) -> WeightSource:
    weight_map = _weight_map(index)
    shards = [index.parent / name for name in dict.fromkeys(weight_map.values())]
    missing = [str(shard) for shard in shards if not shard.is_file()]
    if missing:
        raise CheckpointError(
            f"{index} names shards that are not there, copy them too:" + bullet_list(missing)
        )
    source: WeightSource
    if index.name.startswith(TORCH_NAME):
        source = TorchSource(shards, str(index))
    else:
        source = _united([open_safetensors(shard) for shard in shards], index)
    faults = [f"{name} is not in {weight_map[name]}" for name in weight_map if name not in source.tensors]
    faults += [f"{name} is stored but not in the index" for name in source.tensors if name not in weight_map]
    if faults:
        source.close()
        raise CheckpointError(
            f"{index} does not fit its shards, copy all of them again:" + bullet_list(faults)
        )
    return source


def _united(shards: list[WeightSource], index: Path) -> WeightSource:
    try:
        return UnitedSource(shards, str(index))
    except CheckpointError:
        for shard in shards:
            shard.close()
        raise


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard file name.

    A name that is more than a file name could point outside the directory, so none is accepted.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is missing or empty: copy it again from the model")
    faults = [
        f"{shown(name)}: {shown(file)}"
        for name, file in weight_map.items()
        if not isinstance(file, str) or not _is_plain_name(file)
    ]
    if faults:
        raise CheckpointError(
            f"{index}: shards must be plain file names beside the index:" + bullet_list(faults)
        )
    return weight_map


def _is_plain_name(file: str) -> bool:
    if file in ("", ".", "..") or len(file) > _MAX_NAME:
        return False
    return PurePosixPath(file).name == file == PureWindowsPath(file).name


CKPT, SAFETENSORS = ".ckpt", ".safetensors"
MINDSPORE_SUFFIXES = (CKPT, SAFETENSORS)

_OPENERS: dict[str, Callable[[Path], WeightSource]] = {
    CKPT: open_ckpt,
    SAFETENSORS: open_safetensors,
    ".bin": lambda path: TorchSource([path], str(path)),
}


def open_weights(path: Path) -> WeightSource:
    """A source on a weights file or a directory with one model, under canonical names.

    Args:
        path: a ``.ckpt``, ``.safetensors`` or ``.bin`` file, a Hugging Face directory, or a directory
            with exactly one ``.ckpt`` or ``.safetensors`` file. Hugging Face names are mapped.

    Raises:
        CheckpointError: nothing there, several candidates, or damaged files.
    """
    source = _open_stored(path)
    if not weight_names.is_hf(source.tensors):
        return source
    return _canonical(source)


def _open_stored(path: Path) -> WeightSource:
    if path.is_dir():
        return open_hf_directory(path) if has_hf_weights(path) else _open_file(only_weights_file(path))
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: name a weights file, or a directory that holds one")
    return _open_file(path)


def _open_file(path: Path) -> WeightSource:
    opener = _OPENERS.get(path.suffix)
    if opener is None:
        raise CheckpointError(f"{path}: expected a name that ends with one of {', '.join(_OPENERS)}")
    return opener(path)


def only_weights_file(directory: Path) -> Path:
    """The one MindSpore weights file of ``directory``.

    Raises:
        CheckpointError: none or several.
    """
    files = sorted(file for suffix in MINDSPORE_SUFFIXES for file in directory.glob(f"*{suffix}"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise CheckpointError(
            f"{directory}: expected one .ckpt or .safetensors file, found {found}; name the file, or a "
            "directory with one"
        )
    return files[0]


def _canonical(source: WeightSource) -> WeightSource:
    """A Hugging Face source under canonical names."""
    layers = weight_names.count_layers(source.tensors)
    hidden = [name for name in source.tensors if weight_names.is_derived(name)]
    renamed = RenamedSource(source, weight_names.canonical_to_hf(layers), hidden)
    if SCORE_HEAD_WEIGHT not in renamed.tensors or SCORE_HEAD_BIAS in renamed.tensors:
        return renamed
    # Hugging Face's score head has no bias, which is a bias of zero.
    dtype = renamed.tensors[SCORE_HEAD_WEIGHT].dtype
    bias = ArraySource({SCORE_HEAD_BIAS: np.zeros(1, np.float32)}, source.where)
    return UnitedSource([renamed, CastSource(bias, dtype)], source.where)


class _Digested:
    """A file for writing whose bytes go through a digest, too."""

    def __init__(self, file: IO[bytes], digest: Digest) -> None:
        self._file = file
        self._digest = digest

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)


def write_weights(
    path: Path,
    source: WeightSource,
    *,
    producer: str = "ms",
    description: str | None = None,
    digest: Digest | None = None,
) -> None:
    """Writes every tensor of ``source`` to ``path``, as ``.ckpt`` or ``.safetensors`` by its suffix.

    Args:
        path: the file; an older one is replaced when the new one is whole.
        source: what to write, one block at a time.
        producer: the ``format`` in a safetensors header: "ms", or "pt" as transformers expects.
        description: what a progress bar should say; none is shown without.
        digest: takes in what is written, so that a manifest needs no second reading.

    Raises:
        CheckpointError: another suffix, the disk refuses, or values do not fit a :class:`CastSource`'s type.
    """
    check_suffix(path)
    try:
        with atomic_file(path) as temporary:
            with temporary.open("wb") as opened:
                file = opened if digest is None else cast(IO[bytes], _Digested(opened, digest))
                if path.suffix == CKPT:
                    write_ckpt(file, source, description)
                else:
                    write_safetensors(file, source, {"format": producer}, description)
            if isinstance(source, CastSource):
                source.check_overflow()
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}; free space, or write elsewhere"
        ) from error


def check_suffix(path: Path) -> None:
    """Raises :class:`CheckpointError` unless ``path`` is named like a MindSpore weights file."""
    if path.suffix not in MINDSPORE_SUFFIXES:
        raise CheckpointError(f"{path}: the output must end with {' or '.join(MINDSPORE_SUFFIXES)}")


def check_output_file(path: Path, *, overwrite: bool) -> None:
    """Raises :class:`CheckpointError` when ``path`` cannot or must not be written."""
    check_suffix(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a directory, the output must be a file: choose another name")
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path} exists: choose another name or give --overwrite")
    _check_place(path)


def _check_place(path: Path) -> None:
    """Finds out before any work whether ``path`` can be made."""
    try:
        probe_directory(path.absolute().parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}; write elsewhere") from error


def check_output_directory(path: Path, is_ours: Callable[[Path], bool], *, overwrite: bool) -> None:
    """Raises :class:`CheckpointError` when directory ``path`` cannot or must not be replaced.

    Args:
        path: the output directory.
        is_ours: whether an entry of it is one that a former output would have; anything else would be
            lost with the directory, so it must be moved away first.
        overwrite: whether a former output may be replaced.
    """
    _check_place(path)
    if not path.exists():
        return
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file, the output must be a directory: choose another name")
    entries = sorted(path.iterdir())
    if entries and not overwrite:
        raise CheckpointError(f"{path} exists and is not empty: choose another name or give --overwrite")
    foreign = [entry.name for entry in entries if not is_ours(entry)]
    if foreign:
        raise CheckpointError(
            f"{path} also holds {', '.join(foreign)}, which overwriting would delete: move it"
        )
