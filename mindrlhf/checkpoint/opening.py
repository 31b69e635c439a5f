"""Opens any weights a user may name, under canonical names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from mindrlhf.checkpoint.ckpt_file import open_ckpt
from mindrlhf.checkpoint.hf_directory import has_hf_weights, open_hf_directory
from mindrlhf.checkpoint.safetensors_file import open_safetensors
from mindrlhf.checkpoint.source import ArraySource, WeightSource
from mindrlhf.checkpoint.torch_file import TorchSource
from mindrlhf.checkpoint.views import CastSource, RenamedSource, UnitedSource
from mindrlhf.models.qwen2 import weight_names
from mindrlhf.models.qwen2.layouts import SCORE_HEAD_BIAS, SCORE_HEAD_WEIGHT
from mindrlhf.utils.errors import CheckpointError

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
