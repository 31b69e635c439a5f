"""Collectives in conjugate pairs: what one does forward, its partner does backward.

Megatron-LM, arXiv 1909.08053, section 3 (``f`` and ``g``). ``ops.AllReduce``'s own gradient is an
all-reduce, which counts every gradient ``mp`` times once the loss is replicated; hence the explicit
``bprop`` of each cell here. A group of ``None`` (a rank on its own) communicates nothing.
"""

from __future__ import annotations

from mindspore import Tensor, nn, ops

from mindrlhf.parallel.gather import GroupStack
from mindrlhf.parallel.groups import Groups


class CopyToGroup(nn.Cell):
    """Megatron's ``f``: identity forward, sum over the group backward.

    Stands before a column-parallel layer: every rank uses the same input, so the input's gradient is
    the sum of what the ranks send back.
    """

    def __init__(self, group: str | None) -> None:
        super().__init__()
        self.active = group is not None
        if group is not None:
            self.all_reduce = ops.AllReduce(group=group)

    def construct(self, x: Tensor) -> Tensor:
        """``x`` of any shape, unchanged."""
        return x

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        """Gradient of ``x``: the sum of ``dout`` over the group."""
        if self.active:
            return (self.all_reduce(dout),)
        return (dout,)


class ReduceFromGroup(nn.Cell):
    """Megatron's ``g``: sum over the group forward, identity backward.

    Stands after a row-parallel layer: the ranks' partial outputs are added, and each partial output
    has the gradient of the sum.
    """

    def __init__(self, group: str | None) -> None:
        super().__init__()
        self.active = group is not None
        if group is not None:
            self.all_reduce = ops.AllReduce(group=group)

    def construct(self, x: Tensor) -> Tensor:
        """The sum of ``x`` (any shape) over the group."""
        if self.active:
            return self.all_reduce(x)
        return x

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        """Gradient of ``x``: ``dout`` itself."""
        return (dout,)


class GroupMax(nn.Cell):
    """Element-wise maximum over the group, without a gradient.

    CPU has no ``AllReduce(MAX)``, so the (small) local maxima are stacked and reduced locally.
    """

    def __init__(self, groups: Groups) -> None:
        super().__init__()
        self.stack = GroupStack(groups)

    def construct(self, x: Tensor) -> Tensor:
        """``x`` of any shape; the result has the same shape and is equal on every rank."""
        return ops.stop_gradient(self.stack(ops.stop_gradient(x)).max(axis=0))
