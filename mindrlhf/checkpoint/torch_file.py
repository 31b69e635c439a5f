"""``pytorch_model.bin`` files, where torch is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mindrlhf.checkpoint.element_types import BFLOAT16, BY_NAME
from mindrlhf.checkpoint.sources import Slices, TensorInfo, WeightSource, bounded
from mindrlhf.utils.errors import CheckpointError


class TorchSource(WeightSource):
    """Tensors of one or more files made by ``torch.save``; only one file is mapped at a time.

    Raises:
        CheckpointError: torch is missing, a file is damaged, holds something other than a mapping of
            names to tensors, or a tensor is in two files.
    """

    def __init__(self, paths: Sequence[Path], where: str) -> None:
        self.where = where
        self._file_of: dict[str, Path] = {}
        self._open_path: Path | None = None
        self._open_tensors: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for path in paths:
            for name, tensor in self._load(path).items():
                if name in self._file_of:
                    raise CheckpointError(f"{name} is both in {self._file_of[name]} and in {path}")
                self._file_of[name] = path
                self.tensors[name] = _info(name, tensor, path)

    def read_slice(self, name: str, slices: Slices) -> np.ndarray:
        """Reads the pages of the slice."""
        tensor = self._load(self._file_of[name])[name]
        part = tensor[bounded(self.tensors[name].shape, slices)].contiguous()
        if self.tensors[name].dtype == BFLOAT16:
            part = part.view(_torch().int16)
        return np.array(part.numpy()).view(self.tensors[name].dtype)

    def _load(self, path: Path) -> dict[str, Any]:
        if path != self._open_path:
            # Unmap the previous file first: its pages would still count as memory in use.
            self.close()
            self._open_tensors, self._open_path = _load_file(path), path
        return self._open_tensors

    def close(self) -> None:
        """Unmaps the file."""
        self._open_tensors, self._open_path = {}, None


def _load_file(path: Path) -> dict[str, Any]:
    torch = _torch()
    try:
        with path.open("rb") as file:
            is_zip = file.read(2) == b"PK"  # files older than torch 1.6 cannot be mapped
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # damaged bytes raise whatever the unpickler stumbles over
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} is damaged or not a torch weights file ({first_line})") from error
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise CheckpointError(f"{path} does not hold a mapping of names to tensors")
    return loaded


def _info(name: str, tensor: Any, path: Path) -> TensorInfo:
    type_name = str(tensor.dtype).removeprefix("torch.")
    if type_name not in BY_NAME:
        raise CheckpointError(f"{path}: {name} has the unsupported type {type_name}")
    return TensorInfo(tuple(tensor.shape), BY_NAME[type_name])


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            "reading pytorch_model.bin needs torch: pip install torch==2.13.0, or save it as safetensors"
        ) from error
    return torch
