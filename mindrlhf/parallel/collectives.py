"""Collectives of a model-parallel group: sums and splits of rows in conjugate pairs, maximum, and gathers.

What one of a conjugate pair does forward, its partner does backward (Megatron-LM, arXiv 1909.08053, section
3, ``f`` and ``g``). ``ops.AllReduce``'s own gradient is an all-reduce, which counts every gradient ``mp``
times once the loss is replicated; hence the explicit ``bprop`` of each. A group of ``None`` (a rank on its
own) communicates nothing.

With sequence parallelism (Korthikanti et al., arXiv 2205.05198, section 4.2.2, ``g`` and ``g-bar``) a rank
holds its part of the rows between the products: they are gathered before a column-parallel product, and the
sum behind a row-parallel one is scattered. Both ways together move as much as an all-reduce does.

CPU has no ReduceScatter, and AllGather for the world group only ("AllGather only support mccl_world_group on
CPU"), but AllReduce (SUM) for any group; hence more than one way of gathering, each with its own use.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops
from mindspore.communication import GlobalComm

from mindrlhf.parallel.groups import Groups


class CopyToGroup(nn.Cell):
    """Megatron's ``f``: identity forward, sum over the group backward.

    Placed before a column-parallel layer: every rank uses the same input, so the input's gradient is
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

    Placed after a row-parallel layer: the ranks' partial outputs are added, and each partial output
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


class GatherRows(nn.Cell):
    """Joins the ranks' rows forward; backward sums over the group and keeps this rank's rows.

    Placed before a column-parallel layer, in place of :class:`CopyToGroup`.
    """

    def __init__(self, groups: Groups) -> None:
        super().__init__()
        self.all_gather, self.reduce_scatter = _AllGatherRows(groups), _ReduceScatterRows(groups)

    def construct(self, x: Tensor) -> Tensor:
        """``x`` (n / mp, k) of every rank -> (n, k)."""
        return self.all_gather(x)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        """Gradient of ``x``: this rank's rows of the sum of ``dout``."""
        return (self.reduce_scatter(dout),)


class ScatterRows(nn.Cell):
    """Sums over the group and keeps this rank's rows forward; joins the ranks' rows backward.

    Placed after a row-parallel layer, in place of :class:`ReduceFromGroup`.
    """

    def __init__(self, groups: Groups) -> None:
        super().__init__()
        self.all_gather, self.reduce_scatter = _AllGatherRows(groups), _ReduceScatterRows(groups)

    def construct(self, x: Tensor) -> Tensor:
        """Partial sums ``x`` (n, k) of every rank -> (n / mp, k)."""
        return self.reduce_scatter(x)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        """Gradient of ``x``: that of all rows."""
        return (self.all_gather(dout),)


class WholeRows(nn.Cell):
    """Joins the ranks' rows, if they are split, for what every rank computes alike.

    The ranks send back equal gradients, of which each keeps its rows.
    """

    def __init__(self, groups: Groups) -> None:
        super().__init__()
        self.active, self.index = groups.splits_rows, groups.mp_index
        if self.active:
            self.all_gather = _AllGatherRows(groups)

    def construct(self, x: Tensor) -> Tensor:
        """``x`` (n / mp, k) of every rank -> (n, k)."""
        if self.active:
            return self.all_gather(x)
        return x

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        """Gradient of ``x``: this rank's rows of ``dout``."""
        if self.active:
            return (dout[self.index * x.shape[0] : (self.index + 1) * x.shape[0]],)
        return (dout,)


def before_columns(groups: Groups) -> nn.Cell:
    """What stands before column-parallel layers: activations as they are kept -> (n, k)."""
    return GatherRows(groups) if groups.splits_rows else CopyToGroup(groups.mp_group)


def behind_rows(groups: Groups) -> nn.Cell:
    """What stands behind a row-parallel layer: partial sums (n, k) -> activations as they are kept."""
    return ScatterRows(groups) if groups.splits_rows else ReduceFromGroup(groups.mp_group)


class _AllGatherRows(nn.Cell):
    """The rows (n / mp, k) of every rank -> (n, k); on CPU each adds its rows to zeros."""

    def __init__(self, groups: Groups) -> None:
        super().__init__()
        self.ranks, self.index = groups.mesh.mp, groups.mp_index
        self.by_sum = ms.get_context("device_target") == "CPU"
        collective = ops.AllReduce if self.by_sum else ops.AllGather
        self.collective = collective(group=groups.mp_group)

    def construct(self, x: Tensor) -> Tensor:
        if not self.by_sum:
            return self.collective(x)
        zeros = ops.zeros_like(x)
        parts = [x if rank == self.index else zeros for rank in range(self.ranks)]
        return self.collective(ops.concat(parts, 0))


class _ReduceScatterRows(nn.Cell):
    """This rank's rows (n / mp, k) of the sum of (n, k); on CPU out of the whole sum."""

    def __init__(self, groups: Groups) -> None:
        super().__init__()
        self.ranks, self.index = groups.mesh.mp, groups.mp_index
        self.by_sum = ms.get_context("device_target") == "CPU"
        collective = ops.AllReduce if self.by_sum else ops.ReduceScatter
        self.collective = collective(group=groups.mp_group)

    def construct(self, x: Tensor) -> Tensor:
        found = self.collective(x)
        if not self.by_sum:
            return found
        rows = x.shape[0] // self.ranks
        return found[self.index * rows : (self.index + 1) * rows]


class GroupAllGather(nn.Cell):
    """Joins the pieces of a model-parallel group along dimension 0, in slice order, bit for bit.

    For checksums. On CPU the whole world gathers and each rank keeps its group's rows: ALL ranks of the
    mesh must take part, not those of one group alone. Other devices gather in the group. CPU takes
    float32, float16 and int32. Not meant to be differentiated.

    Args:
        groups: the rank's groups; a rank alone in its group gets its input back.
    """

    def __init__(self, groups: Groups) -> None:
        super().__init__()
        self.active = groups.mp_group is not None
        self.first = groups.dp_index * groups.mesh.mp
        self.pieces = groups.mesh.mp
        self.through_world = groups.mesh.dp > 1 and ms.get_context("device_target") == "CPU"
        if self.active:
            self.gather = ops.AllGather(
                group=GlobalComm.WORLD_COMM_GROUP if self.through_world else groups.mp_group
            )

    def construct(self, x: Tensor) -> Tensor:
        """``x`` (n, ...) of every rank of the group -> (mp * n, ...)."""
        if not self.active:
            return x
        gathered = self.gather(x)
        if self.through_world:
            rows = x.shape[0]
            gathered = gathered[self.first * rows : (self.first + self.pieces) * rows]
        return gathered


class GroupStack(nn.Cell):
    """Stacks small float32 tensors of a model-parallel group, in slice order; only the group takes part.

    For activations, where groups may run different numbers of steps. On CPU each rank adds its row to
    rows of zeros, which keeps every value but the sign of zero and subnormal numbers (flushed to zero).
    Not meant to be differentiated.

    Args:
        groups: the rank's groups.
    """

    def __init__(self, groups: Groups) -> None:
        super().__init__()
        self.ranks = groups.mesh.mp
        self.index = groups.mp_index
        self.active = groups.mp_group is not None
        self.by_sum = groups.mesh.dp > 1 and ms.get_context("device_target") == "CPU"
        if self.active:
            collective = ops.AllReduce if self.by_sum else ops.AllGather
            self.collective = collective(group=groups.mp_group)

    def construct(self, x: Tensor) -> Tensor:
        """``x`` (...) float32 of every rank of the group -> (mp, ...)."""
        own = ops.expand_dims(x, 0)
        if not self.active:
            return own
        if not self.by_sum:
            return self.collective(own)
        zeros = ops.zeros_like(own)
        rows = [own if rank == self.index else zeros for rank in range(self.ranks)]
        return self.collective(ops.concat(rows, 0))


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
