"""Weights in a Hugging Face model directory: which files, in what order of preference."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

from mindrlhf.checkpoint.hf_config import read_json
from mindrlhf.checkpoint.safetensors_file import open_safetensors
from mindrlhf.checkpoint.source import WeightSource
from mindrlhf.checkpoint.torch_file import TorchSource
from mindrlhf.checkpoint.views import UnitedSource, bullet_list
from mindrlhf.configs.faults import shown
from mindrlhf.utils.errors import CheckpointError

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
