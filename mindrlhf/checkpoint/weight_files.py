"""Opens any weights a user may name, under canonical names, and writes weights files atomically.

What can be opened: a ``.ckpt``, ``.safetensors`` or ``.bin`` file, a Hugging Face directory, or a directory
with exactly one MindSpore weights file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np

from mindrlhf.checkpoint.ckpt_file import encode_ckpt, open_ckpt
from mindrlhf.checkpoint.hf_config import check_no_adapter
from mindrlhf.checkpoint.manifest import Digest
from mindrlhf.checkpoint.safetensors_file import encode_safetensors, open_safetensors
from mindrlhf.checkpoint.sources import (
    ArraySource,
    CastSource,
    RenamedSource,
    UnitedSource,
    WeightSource,
    closed_on_error,
)
from mindrlhf.checkpoint.torch_file import TorchSource
from mindrlhf.configs.faults import shown
from mindrlhf.models.families import Family, family_of_names, is_model
from mindrlhf.models.score_head import SCORE_HEAD
from mindrlhf.utils.errors import CheckpointError, bullet_list
from mindrlhf.utils.files import atomic_file, read_json_object
from mindrlhf.utils.outputs import Output, file_of
from mindrlhf.utils.progress import ProgressBar

CKPT, SAFETENSORS = ".ckpt", ".safetensors"
MINDSPORE_SUFFIXES = (CKPT, SAFETENSORS)

HF_SAFETENSORS = "model.safetensors"
HF_TORCH = "pytorch_model.bin"
INDEX_SUFFIX = ".index.json"

_HF_FILES = (HF_SAFETENSORS, HF_SAFETENSORS + INDEX_SUFFIX, HF_TORCH, HF_TORCH + INDEX_SUFFIX)
"""Where a Hugging Face directory has its weights, in order of preference."""

_MAX_NAME = 255
"""Longest file name of common file systems; looking up a longer one raises an error."""

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
        CheckpointError: nothing is found, several candidates, or damaged files.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: name a weights file, or a directory that holds one")
    check_no_adapter(path)
    if path.is_dir():
        source = open_hf_directory(path) if has_hf_weights(path) else _open_file(only_weights_file(path))
    else:
        source = _open_file(path)
    family = family_of_names(source.tensors)
    return _canonical(source, family) if family.weight_names.is_hf(source.tensors) else source


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


def _canonical(source: WeightSource, family: Family) -> WeightSource:
    """A Hugging Face source under canonical names; tensors that no model has keep theirs and come last."""
    weight_names = family.weight_names
    names = weight_names.canonical_to_hf(weight_names.count_layers(source.tensors))
    known = set(names.values())
    others = [name for name in source.tensors if name not in known and not weight_names.is_derived(name)]
    renamed = RenamedSource(source, names | {name: name for name in others})
    weight, bias = SCORE_HEAD
    if weight not in renamed.tensors or bias in renamed.tensors:
        return renamed
    # Hugging Face's score head has no bias, which is a bias of zero.
    zero = ArraySource({bias: np.zeros(1, renamed.tensors[weight].dtype)}, source.where)
    return UnitedSource([renamed, zero], source.where)


def has_hf_weights(directory: Path) -> bool:
    """Whether ``directory`` holds weights under Hugging Face's file names."""
    return any((directory / name).exists() for name in _HF_FILES)


def open_hf_directory(directory: Path) -> WeightSource:
    """A source on the weights of a Hugging Face directory under their names there, safetensors before torch.

    Raises:
        CheckpointError: no weights, a bad index, or missing or damaged files.
    """
    path = next((directory / name for name in _HF_FILES if (directory / name).exists()), None)
    if path is None:
        raise CheckpointError(f"{directory} has no weights: expected one of {', '.join(_HF_FILES)}")
    return _open_indexed(path) if path.name.endswith(INDEX_SUFFIX) else _open_file(path)


def _open_indexed(index: Path) -> WeightSource:
    weight_map = _weight_map(index)
    shards = [index.parent / name for name in dict.fromkeys(weight_map.values())]
    missing = [str(shard) for shard in shards if not shard.is_file()]
    if missing:
        raise CheckpointError(f"{index} names shards that are missing, copy them too:" + bullet_list(missing))
    source: WeightSource
    if index.name.startswith(HF_TORCH):
        source = TorchSource(shards, str(index))
    else:
        opened: list[WeightSource] = []
        with closed_on_error(opened):
            for shard in shards:
                opened.append(open_safetensors(shard))
            source = UnitedSource(opened, str(index))
    faults = [f"{name} is not in {weight_map[name]}" for name in weight_map if name not in source.tensors]
    faults += [f"{name} is stored but not in the index" for name in source.tensors if name not in weight_map]
    if faults:
        source.close()
        raise CheckpointError(
            f"{index} does not fit its shards, copy all of them again:" + bullet_list(faults)
        )
    return source


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard file name.

    A name that is more than a file name could point outside the directory, so none is accepted.
    """
    weight_map = read_json_object(index, CheckpointError).get("weight_map")
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
        description: text of the progress bar; no bar without it.
        digest: takes in what is written, so that a manifest needs no second reading.

    Raises:
        CheckpointError: another suffix, writing fails, or values do not fit a :class:`CastSource`'s type.
    """
    check_suffix(path)
    chunks = encode_ckpt(source) if path.suffix == CKPT else encode_safetensors(source, {"format": producer})
    try:
        with atomic_file(path) as temporary:
            with temporary.open("wb") as file:
                for chunk in chunks if description is None else _tracked(chunks, description, source.nbytes):
                    file.write(chunk)
                    if digest is not None:
                        digest.update(chunk)
            if isinstance(source, CastSource):
                source.check_overflow()
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}; free space, or write elsewhere"
        ) from error


def _tracked(chunks: Iterable[bytes], description: str, nbytes: int) -> Iterator[bytes]:
    """Yields ``chunks`` and shows how many megabytes have been written."""
    written = 0
    with ProgressBar(f"{description}, MB", nbytes // 10**6) as bar:
        for chunk in chunks:
            yield chunk
            written += len(chunk)
            bar.update(written // 10**6 - bar.done)


def check_suffix(path: Path, flag: str = "") -> None:
    """Raises :class:`CheckpointError` unless ``path`` is named like a MindSpore weights file."""
    if path.suffix not in MINDSPORE_SUFFIXES:
        raise CheckpointError(f"{flag}{path}: the output must end with {' or '.join(MINDSPORE_SUFFIXES)}")


def weights_output(flag: str, path: Path, *, overwrite: bool = False) -> Output:
    """A MindSpore weights file, for :func:`mindrlhf.utils.outputs.check_outputs`.

    Raises:
        CheckpointError: it is named otherwise.
    """
    check_suffix(path, f"{flag} ")
    return Output(flag, path, file_of("a file of model weights", _is_model), overwrite)


def _is_model(path: Path) -> bool:
    """Whether a file holds the weights of a model, and not an optimizer's moments, for example."""
    try:
        with _open_file(path) as source:
            return is_model(source.tensors)
    except CheckpointError:
        return False
