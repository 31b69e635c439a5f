"""Parts of a tensor that replicas share out, for optimizer states (ZeRO stage 1, arXiv 1910.02054).

The elements of a tensor, in one row and padded with zeros to a multiple of dp, are cut into equal parts, one
per replica. Any shape can be shared out so, whatever dp.

CPU has neither ReduceScatter nor, but for the group of all workers, AllGather: there a sum over the whole
tensor does what they do.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, ops

from mindrlhf.parallel.groups import Groups


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

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """This replica's part of the sum of ``x`` over the replicas; collective."""
        if self._by_sum:
            return self.take(self._sum(x))
        return self._reduce_scatter(self._padded(x))

    def all_gather(self, part: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The tensor of that shape whose parts these are; collective."""
        if self._by_sum:  # in float32, the type that CPU has all of this for
            before, after = self._index, self._replicas - 1 - self._index
            wide, size = ops.cast(part, ms.float32), part.size
            row = ops.concat([ops.zeros(before * size), wide, ops.zeros(after * size)])
            row = ops.cast(self._sum(row), part.dtype)
        else:
            row = self._all_gather(part)
        elements = 1
        for size in shape:
            elements *= size
        return row[:elements].reshape(shape).copy()

    def _padded(self, x: Tensor) -> Tensor:
        row = x.reshape((-1,))
        missing = self.size(x.size) * self._replicas - x.size
        return ops.concat([row, ops.zeros(missing, x.dtype)]) if missing else row
