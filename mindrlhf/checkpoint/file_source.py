"""Tensors that lie in a file as plain bytes, read with positioned reads.

``pread`` instead of ``mmap``: mapped pages count as resident memory, and a conversion would seem to hold
the whole file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mindrlhf.checkpoint.source import Slices, TensorInfo, WeightSource, bounded
from mindrlhf.configs.faults import shown
from mindrlhf.utils.errors import CheckpointError

_MAX_DIMENSIONS = 32
_MAX_BYTES = 2**62


class Extent(NamedTuple):
    """A run of bytes in a file."""

    offset: int
    length: int


class FileSource(WeightSource):
    """Tensors whose bytes are known runs of one file.

    Args:
        path: the file.
        tensors: name -> shape and type.
        extents: name -> the runs that together hold the tensor's bytes in row-major order.

    Raises:
        CheckpointError: the file cannot be opened, or a tensor has a shape that no array can have.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, TensorInfo], extents: Mapping[str, Sequence[Extent]]
    ) -> None:
        self.where = str(path)
        for name, info in tensors.items():
            if not _is_possible(info):
                raise CheckpointError(
                    f"{path}: {shown(name)} has the impossible shape {shown(info.shape)}: copy it again"
                )
        self.tensors = tensors
        self._extents = extents
        self._descriptor = open_for_reading(path)

    def read_slice(self, name: str, slices: Slices) -> np.ndarray:
        """Reads only the bytes of the slice: one read per contiguous run."""
        info = self.tensors[name]
        bounds = bounded(info.shape, slices)
        shape = tuple(part.stop - part.start for part in bounds)
        result = np.empty(shape, info.dtype.storage)
        if result.size == 0:
            return result
        whole = [part == size for part, size in zip(shape, info.shape, strict=True)]
        cut = max((dim for dim, is_whole in enumerate(whole) if not is_whole), default=0)
        strides = _strides(info)
        start = sum(part.start * stride for part, stride in zip(bounds, strides, strict=True))
        buffer = result.reshape(-1).view(np.uint8).data
        run = len(buffer)
        for size in shape[:cut]:
            run //= size
        for number, index in enumerate(np.ndindex(*shape[:cut])):
            offset = start + sum(i * stride for i, stride in zip(index, strides, strict=False))
            self._read_bytes(name, offset, buffer[number * run : (number + 1) * run])
        return result

    def _read_bytes(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fills ``buffer`` with the tensor's bytes from ``offset`` on."""
        for extent in self._extents[name]:
            if offset >= extent.length:
                offset -= extent.length
                continue
            length = min(len(buffer), extent.length - offset)
            self._read_file(name, extent.offset + offset, buffer[:length])
            buffer, offset = buffer[length:], 0
            if not buffer:
                return

    def _read_file(self, name: str, position: int, buffer: memoryview) -> None:
        while buffer:
            count = os.preadv(self._descriptor, [buffer], position)
            if count == 0:
                raise CheckpointError(f"{self.where} ends at byte {position}, inside {name}: copy it again")
            buffer, position = buffer[count:], position + count

    def close(self) -> None:
        """Closes the file; may be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _is_possible(info: TensorInfo) -> bool:
    """Whether NumPy can make the array: dimensions of 0 do not excuse the others."""
    size = math.prod(max(part, 1) for part in info.shape) * info.dtype.itemsize
    return len(info.shape) <= _MAX_DIMENSIONS and size <= _MAX_BYTES


def _strides(info: TensorInfo) -> list[int]:
    """Bytes from one index to the next, per dimension."""
    strides = [info.dtype.itemsize] * len(info.shape)
    for dim in reversed(range(len(info.shape) - 1)):
        strides[dim] = strides[dim + 1] * info.shape[dim + 1]
    return strides


def open_for_reading(path: Path) -> int:
    """A descriptor of ``path``.

    Raises:
        CheckpointError: it cannot be opened.
    """
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror}; name a file that can be read"
        ) from error
