"""Where weights come from: named tensors of which any slice is read on demand, and views on them.

Readers of file formats and views (renamed, cast, cut for a rank, merged from ranks) share one interface, so
that every conversion is a view and a writer, and only one block of one tensor is in memory at a time.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mindrlhf.checkpoint.element_types import DType, cast, from_mindspore
from mindrlhf.configs.faults import shown
from mindrlhf.parallel.layout import Layout
from mindrlhf.utils.errors import CheckpointError, bullet_list

BLOCK_BYTES = 32 << 20

# What NumPy can make an array of.
_MAX_DIMENSIONS = 32
_MAX_BYTES = 2**62

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class TensorInfo:
    """Shape and element type of a stored tensor."""

    shape: tuple[int, ...]
    dtype: DType

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
        """The part ``slices`` of a tensor; missing trailing slices mean everything."""

    def read(self, name: str) -> np.ndarray:
        """A whole tensor."""
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
        """The tensor's name in its file, for messages."""
        return name

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def close(self) -> None:  # noqa: B027  only sources that hold files have something to close
        """Closes open files."""

    def __enter__(self) -> WeightSource:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


@contextmanager
def closed_on_error(sources: Iterable[WeightSource]) -> Iterator[None]:
    """Closes ``sources`` when the block fails."""
    try:
        yield
    except BaseException:
        for source in sources:
            source.close()
        raise


class ArraySource(WeightSource):
    """Arrays in memory as a source; MindSpore's bfloat16 may be among them."""

    def __init__(self, arrays: Mapping[str, np.ndarray], where: str = "memory") -> None:
        self.where = where
        self._arrays = {name: from_mindspore(np.asarray(array)) for name, array in arrays.items()}
        self.tensors = {name: TensorInfo(array.shape, array.dtype) for name, array in self._arrays.items()}

    def read_slice(self, name: str, slices: Slices) -> np.ndarray:
        """A view of the array."""
        return self._arrays[name][bounded(self.tensors[name].shape, slices)]


class Extent(NamedTuple):
    """A run of bytes in a file."""

    offset: int
    length: int


class FileSource(WeightSource):
    """Tensors whose bytes are known runs of one file, read with positioned reads.

    ``pread`` and not ``mmap``: mapped pages count as resident memory, and a conversion would seem to hold
    the whole file.

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
        result = np.empty(shape, info.dtype)
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


class UnitedSource(WeightSource):
    """Several sources as one.

    Raises:
        CheckpointError: a tensor is in two of them.
    """

    def __init__(self, sources: Sequence[WeightSource], where: str) -> None:
        self.where = where
        self._sources = sources
        self._owner: dict[str, WeightSource] = {}
        twice = []
        for source in sources:
            for name in source.tensors:
                if name in self._owner:
                    twice.append(f"{name} in {self._owner[name].where} and in {source.where}")
                self._owner[name] = source
        if twice:
            raise CheckpointError(f"{where}: tensors are stored twice:" + bullet_list(twice))
        self.tensors = {name: source.tensors[name] for name, source in self._owner.items()}

    def read_slice(self, name: str, slices: Slices) -> np.ndarray:
        """Reads from the source that has the tensor."""
        return self._owner[name].read_slice(name, slices)

    def display(self, name: str) -> str:
        """The name that the tensor's own source shows."""
        return self._owner.get(name, self._sources[0]).display(name)

    def close(self) -> None:
        """Closes all of them."""
        for source in self._sources:
            source.close()


class _View(WeightSource):
    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self.where = source.where

    def display(self, name: str) -> str:
        """The name that the viewed source shows."""
        return self._source.display(name)

    def close(self) -> None:
        """Closes the viewed source."""
        self._source.close()


class RenamedSource(_View):
    """Some tensors of a source under new names, in the order of ``names``.

    Args:
        source: what is viewed.
        names: new name -> name in ``source``; entries that ``source`` lacks only serve messages.
    """

    def __init__(self, source: WeightSource, names: Mapping[str, str]) -> None:
        super().__init__(source)
        self._names = names
        self.tensors = {new: source.tensors[old] for new, old in names.items() if old in source.tensors}

    def read_slice(self, name: str, slices: Slices) -> np.ndarray:
        """Reads under the old name."""
        return self._source.read_slice(self._names[name], slices)

    def display(self, name: str) -> str:
        """The old name."""
        return self._source.display(self._names.get(name, name))


def select(source: WeightSource, names: Iterable[str]) -> RenamedSource:
    """Those of the tensors ``names`` that ``source`` has, in that order."""
    return RenamedSource(source, {name: name for name in names})


class CastSource(_View):
    """A source in another element type; ``None`` keeps each tensor's own.

    Attributes:
        overflowed: names of tensors read so far in which a finite value became infinite.
    """

    def __init__(self, source: WeightSource, dtype: DType | None) -> None:
        super().__init__(source)
        self.overflowed: dict[str, None] = {}
        self.tensors = {
            name: TensorInfo(info.shape, info.dtype if dtype is None else dtype)
            for name, info in source.tensors.items()
        }

    def read_slice(self, name: str, slices: Slices) -> np.ndarray:
        """Reads and casts."""
        result, overflowed = cast(self._source.read_slice(name, slices), self.tensors[name].dtype)
        if overflowed:
            self.overflowed[name] = None
        return result

    def check_overflow(self) -> None:
        """To be called when everything has been read.

        Raises:
            CheckpointError: values of some tensors do not fit the type.
        """
        if self.overflowed:
            faults = [
                f"{self.display(name)}: {self._source.tensors[name].dtype} -> {self.tensors[name].dtype}"
                for name in self.overflowed
            ]
            raise CheckpointError(
                f"{self.where}: finite values become infinite in {len(faults)} tensor(s); "
                "use bf16 or fp32:" + bullet_list(faults)
            )


class LocalSource(_View):
    """The part of full tensors that one rank holds."""

    def __init__(self, source: WeightSource, layouts: Mapping[str, Layout], rank: int) -> None:
        super().__init__(source)
        self._layouts = layouts
        self._rank = rank
        self.tensors = {
            name: TensorInfo(layout.local_shape, source.tensors[name].dtype)
            for name, layout in layouts.items()
            if name in source.tensors
        }

    def read_slice(self, name: str, slices: Slices) -> np.ndarray:
        """Reads this rank's part of the full tensor."""
        local = bounded(self.tensors[name].shape, slices)
        full = self._layouts[name].slices(self._rank)
        shifted = [
            slice(whole.start + part.start, whole.start + part.stop)
            for whole, part in zip(full, local, strict=True)
        ]
        return self._source.read_slice(name, tuple(shifted))


class MergedSource(WeightSource):
    """Full tensors assembled from one source per model-parallel index.

    The sources must already have been checked against ``layouts``.
    """

    def __init__(self, parts: Sequence[WeightSource], layouts: Mapping[str, Layout], where: str) -> None:
        self.where = where
        self._parts = parts
        self._layouts = layouts
        self.tensors = {
            name: TensorInfo(layout.shape, parts[0].tensors[name].dtype)
            for name, layout in layouts.items()
            if name in parts[0].tensors
        }

    def read_slice(self, name: str, slices: Slices) -> np.ndarray:
        """Reads the overlap with every rank's part and joins them."""
        layout = self._layouts[name]
        wanted = bounded(layout.shape, slices)
        dim = layout.split_dim
        if dim is None:
            return self._parts[0].read_slice(name, wanted)
        size = layout.local_shape[dim]
        pieces = []
        for index, part in enumerate(self._parts):
            start = max(wanted[dim].start - index * size, 0)
            stop = min(wanted[dim].stop - index * size, size)
            if start < stop:
                local = (*wanted[:dim], slice(start, stop), *wanted[dim + 1 :])
                pieces.append(part.read_slice(name, local))
        if not pieces:
            return self._parts[0].read_slice(name, (*wanted[:dim], slice(0, 0), *wanted[dim + 1 :]))
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=dim)

    def close(self) -> None:
        """Closes every part."""
        for part in self._parts:
            part.close()
