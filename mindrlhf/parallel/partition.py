"""Parts of a tensor that replicas share out, for optimizer states (ZeRO stage 1, arXiv 1910.02054).

The elements of a tensor, in one row and padded with zeros to a multiple of dp, are cut into equal parts, one
per replica. Any shape can be shared out so, whatever dp.

Tensors travel many at a time, in buckets: a collective has its latency whatever its size, and most tensors
are small. CPU has neither ReduceScatter nor, but for the group of all workers, AllGather: there a sum over
the whole tensors does what they do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod

import mindspore as ms
from mindspore import Tensor, ops

from mindrlhf.parallel.groups import Groups

BUCKET_BYTES = 32 << 20
"""Of tensors that travel together; there are copies of it for as long."""


class Partition:
    """This replica's parts; collective methods are called by all replicas for the same tensors in one order.

    Args:
        groups: this rank's groups, of more than one replica.
    """

    def __init__(self, groups: Groups) -> None:
        self._replicas, self._index = groups.mesh.dp, groups.dp_index
        self._by_sum = ms.get_context("device_target") == "CPU"
        self._sum = ops.AllReduce(group=groups.dp_group)
        if not self._by_sum:
            self._reduce_scatter = ops.ReduceScatter(group=groups.dp_group)
            self._all_gather = ops.AllGather(group=groups.dp_group)

    def size(self, elements: int) -> int:
        """Elements of a part of a tensor with so many."""
        return -(-elements // self._replicas)

    def take(self, x: Tensor) -> Tensor:
        """This replica's part of ``x`` of any shape, in one row, in memory of its own.

        Not a view: what a kernel writes to one in place is lost (MindSpore 2.9.0 on CPU, AdamWeightDecay).
        """
        size = self.size(x.size)
        return self._padded(x)[self._index * size : (self._index + 1) * size].copy()

    def reduce_scatter(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """This replica's parts of the sums of tensors over the replicas, by one collective."""
        if self._by_sum:
            return [self.take(one) for one in sum_together(tensors, self._sum)]
        parts = [self._padded(one).reshape((self._replicas, -1)) for one in tensors]
        found = self._reduce_scatter(ops.concat(parts, 1).reshape((-1,)))
        return _cut(found, [part.shape[1:] for part in parts])

    def all_gather(self, parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """The tensors of those shapes whose parts these are, of one type, by one collective."""
        row, dtype = ops.concat(list(parts)), parts[0].dtype
        if self._by_sum:  # in float32, the type that CPU has all of this for
            before, after = self._index, self._replicas - 1 - self._index
            wide, size = ops.cast(row, ms.float32), row.size
            row = self._sum(ops.concat([ops.zeros(before * size), wide, ops.zeros(after * size)]))
        else:
            row = self._all_gather(row)
        of_replicas = row.reshape((self._replicas, -1))
        tensors, first = [], 0
        for part, shape in zip(parts, shapes, strict=True):
            whole = of_replicas[:, first : first + part.size].reshape((-1,))
            tensors.append(ops.cast(whole[: prod(shape)], dtype).reshape(shape).copy())
            first += part.size
        return tensors

    def _padded(self, x: Tensor) -> Tensor:
        row = x.reshape((-1,))
        missing = self.size(x.size) * self._replicas - x.size
        return ops.concat([row, ops.zeros(missing, x.dtype)]) if missing else row


def buckets(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names in their order, in groups of at most BUCKET_BYTES, or of one.

    Args:
        sizes: bytes by name.
    """
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if size > room:
            groups.append([])
            room = BUCKET_BYTES
        groups[-1].append(name)
        room -= size
    return groups


def sum_together(tensors: Sequence[Tensor], all_reduce: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Sums of tensors of one type over a group, by one collective."""
    row = all_reduce(ops.concat([one.reshape((-1,)) for one in tensors]))
    return _cut(row, [one.shape for one in tensors])


def _cut(row: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Tensors that lie one behind the other in a row."""
    tensors, first = [], 0
    for shape in shapes:
        size = prod(shape)
        tensors.append(row[first : first + size].reshape(shape))
        first += size
    return tensors
