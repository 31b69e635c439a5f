"""Views on weight sources: united, renamed, cast, cut for a rank, merged from ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from mindrlhf.checkpoint.dtypes import ElementType, cast
from mindrlhf.checkpoint.source import Slices, TensorInfo, WeightSource, bounded
from mindrlhf.parallel.layout import Layout
from mindrlhf.utils.errors import CheckpointError


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
        """As the owner calls it."""
        return self._owner[name].display(name) if name in self._owner else self._sources[0].display(name)

    def close(self) -> None:
        """Closes all of them."""
        for source in self._sources:
            source.close()


class _View(WeightSource):
    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self.where = source.where

    def display(self, name: str) -> str:
        """As the viewed source calls it."""
        return self._source.display(name)

    def close(self) -> None:
        """Closes the viewed source."""
        self._source.close()


class RenamedSource(_View):
    """Some tensors of a source under new names, in the order of ``names``.

    Args:
        source: what is viewed.
        names: new name -> name in ``source``; tensors it does not mention keep their names and come
            last, entries that ``source`` lacks only serve messages.
        hidden: names in ``source`` to leave out.
    """

    def __init__(self, source: WeightSource, names: Mapping[str, str], hidden: Iterable[str] = ()) -> None:
        super().__init__(source)
        self._names = dict(names)
        known = set(self._names.values()) | set(hidden)
        self._names.update({name: name for name in source.tensors if name not in known})
        self.tensors = {new: source.tensors[old] for new, old in self._names.items() if old in source.tensors}

    def read_slice(self, name: str, slices: Slices) -> np.ndarray:
        """Reads under the old name."""
        return self._source.read_slice(self._names[name], slices)

    def display(self, name: str) -> str:
        """The old name."""
        return self._source.display(self._names.get(name, name))


class SelectedSource(_View):
    """The tensors ``names`` of a source, in that order."""

    def __init__(self, source: WeightSource, names: Iterable[str]) -> None:
        super().__init__(source)
        self.tensors = {name: source.tensors[name] for name in names}

    def read_slice(self, name: str, slices: Slices) -> np.ndarray:
        """Reads from the source."""
        return self._source.read_slice(name, slices)


class CastSource(_View):
    """A source in another element type; ``None`` keeps each tensor's own.

    Attributes:
        overflowed: names of tensors read so far in which a finite value became infinite.
    """

    def __init__(self, source: WeightSource, dtype: ElementType | None) -> None:
        super().__init__(source)
        self.overflowed: dict[str, None] = {}
        self.tensors = {
            name: TensorInfo(info.shape, dtype or info.dtype) for name, info in source.tensors.items()
        }

    def read_slice(self, name: str, slices: Slices) -> np.ndarray:
        """Reads and casts."""
        stored, wanted = self._source.tensors[name].dtype, self.tensors[name].dtype
        result, overflowed = cast(self._source.read_slice(name, slices), stored, wanted)
        if overflowed:
            self.overflowed[name] = None
        return result

    def check_overflow(self) -> None:
        """To be called when everything was read.

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
        offsets = [whole.start for whole in full]
        return self._source.read_slice(
            name,
            tuple(slice(o + part.start, o + part.stop) for o, part in zip(offsets, local, strict=True)),
        )


class MergedSource(WeightSource):
    """Full tensors put together from one source per model-parallel index.

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


def bullet_list(lines: Iterable[str]) -> str:
    """The lines below a message that lists faults."""
    return "".join(f"\n  - {line}" for line in lines)
