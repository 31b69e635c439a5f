"""Gathering over a model-parallel group, on every device.

CPU has AllGather for the world group only ("AllGather only support mccl_world_group on CPU"), but
AllReduce (SUM) for any group; hence two ways around, each with its own use.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops
from mindspore.communication import GlobalComm

from mindrlhf.parallel.groups import Groups


class GroupAllGather(nn.Cell):
    """Joins the pieces of a model-parallel group along dimension 0, in slice order, bit for bit.

    For checksums. On CPU the whole world gathers and each rank keeps its group's rows: ALL ranks of the
    mesh must take part, not those of one group alone. Other devices gather in the group. CPU takes
    float32, float16 and int32. No gradient is meant.

    Args:
        groups: the rank's groups; alone in its group, it gives its input back.
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
    No gradient is meant.

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
