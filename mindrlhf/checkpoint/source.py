"""Where weights come from: names, shapes, and any slice of a tensor on demand.

Readers of file formats and views on them (renamed, cast, cut, merged) share one interface, so that
every conversion is a view and a writer, and only one block of one tensor is in memory at a time.
Arrays are storage arrays (:mod:`mindrlhf.checkpoint.dtypes`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mindrlhf.checkpoint.dtypes import ElementType, element_type, to_storage

BLOCK_BYTES = 32 << 20

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class TensorInfo:
    """Shape and element type of a stored tensor."""

    shape: tuple[int, ...]
    dtype: ElementType

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.size * self.dtype.itemsize


def bounded(shape: Sequence[int], slices: Slices) -> Slices:
    """``slices`` with every bound spelt out, one per dimension of ``shape``; steps are not supported."""
    spelt = []
    for dim, size in enumerate(shape):
        start, stop, step = (slices[dim] if dim < len(slices) else slice(None)).indices(size)
        if step != 1:
            raise ValueError(f"slices with steps cannot be read, got {slices[dim]}")
        spelt.append(slice(start, max(start, stop)))
    return tuple(spelt)


class WeightSource(ABC):
    """Named tensors that are read slice by slice; a context manager that closes its files.

    Attributes:
        where: the file or directory, for messages.
        tensors: name -> shape and type, in the order in which they are best read.
    """

    where: str
    tensors: Mapping[str, TensorInfo]

    @abstractmethod
    def read_slice(self, name: str, slices: Slices) -> np.ndarray:
        """The part ``slices`` of a tensor, as a storage array; missing trailing slices mean everything."""

    def read(self, name: str) -> np.ndarray:
        """A whole tensor, as a storage array."""
        return self.read_slice(name, ())

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """A whole tensor in blocks of rows of at most about ``BLOCK_BYTES``."""
        info = self.tensors[name]
        if not info.shape or info.nbytes <= BLOCK_BYTES:
            yield self.read(name)
            return
        rows = max(1, BLOCK_BYTES * info.shape[0] // info.nbytes)
        for start in range(0, info.shape[0], rows):
            yield self.read_slice(name, (slice(start, start + rows),))

    def display(self, name: str) -> str:
        """How a message should call the tensor: as the file does."""
        return name

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def close(self) -> None:  # noqa: B027  only sources that hold files have something to close
        """Releases what is held open."""

    def __enter__(self) -> WeightSource:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class ArraySource(WeightSource):
    """Arrays in memory as a source."""

    def __init__(self, arrays: Mapping[str, np.ndarray], where: str = "memory") -> None:
        self.where = where
        self._arrays = {name: to_storage(np.asarray(array)) for name, array in arrays.items()}
        self.tensors = {
            name: TensorInfo(tuple(np.shape(array)), element_type(np.asarray(array).dtype))
            for name, array in arrays.items()
        }

    def read_slice(self, name: str, slices: Slices) -> np.ndarray:
        """A view of the array."""
        return self._arrays[name][bounded(self.tensors[name].shape, slices)]
