"""One optimizer step of any network: backward over micro-batches, sum over replicas, clip, update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore.nn import Optimizer

from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layout import Layout
from mindrlhf.trainer.gradients import GradientBuffers, clear
from mindrlhf.trainer.optimizer import FusedAdamW

Statistics = dict[str, np.float32]
"""What a loss cell sums, by name."""


class Backward(nn.Cell):
    """Adds the gradients of a loss cell, which returns ``(loss, statistics)``, to buffers.

    Args:
        loss: the cell.
        gradients: one buffer per trainable parameter, in order.
    """

    def __init__(self, loss: nn.Cell, gradients: ParameterTuple) -> None:
        super().__init__(auto_prefix=False)
        self.loss = loss  # otherwise this cell lists no parameters, and a cached graph would get other ones
        self.gradients = gradients
        self.value_and_grad = ops.value_and_grad(loss, None, loss.trainable_params(), has_aux=True)
        # From the last layer on: a gradient is added as soon as it is computed, which frees its memory.
        self.map = ops.HyperMap(reverse=True)

    def construct(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs of the loss -> the loss and its statistics."""
        (loss, statistics), gradients = self.value_and_grad(*inputs)
        added = self.map(_add, self.gradients, gradients)
        return ops.depend(loss, added), statistics


class GradientNorm(nn.Cell):
    """Sums gradients over replicas and takes the norm over all shards, before any weight is changed.

    ``HyperMap`` visits the gradients: a loop that appends to a tuple takes the compiler quadratic time
    (364 tensors: 10 s against 0.6 s).

    Args:
        gradients: buffers, one per parameter.
        split: whether each parameter is split over the model-parallel group; a split one's square sum
            is added up over the group, a replicated one counts once.
        groups: this rank's groups.
    """

    def __init__(self, gradients: ParameterTuple, split: Sequence[bool], groups: Groups) -> None:
        super().__init__(auto_prefix=False)
        self.gradients = gradients
        self.map = ops.HyperMap()
        self.split = tuple(split)
        self.replicated_over_dp = groups.dp_group is not None
        self.sharded_over_mp = groups.mp_group is not None
        if groups.dp_group is not None:
            self.dp_sum = ops.AllReduce(group=groups.dp_group)
        if groups.mp_group is not None:
            self.mp_sum = ops.AllReduce(group=groups.mp_group)

    def construct(self, fault: Tensor) -> Tensor:
        """Sums the buffers over the replicas, if any, in place, and takes the norm.

        Args:
            fault: (1,) float32, 0, or NaN when this rank's loss is not finite.

        Returns:
            the norm, (1,) float32, not finite on every rank when a loss or a gradient of any rank is not.
        """
        if self.replicated_over_dp:
            fault = self.dp_sum(fault)
        return self.global_norm(self.map(self.square_sum, self.gradients), fault)

    def square_sum(self, gradient: Parameter) -> Tensor:
        """Sum of squares, (1,) float32, after the sum over the replicas, if any."""
        if self.replicated_over_dp:
            gradient = ops.assign(gradient, self.dp_sum(gradient))
        # By rows first: on CPU one sum over everything takes six times as long.
        wide = ops.cast(gradient, ms.float32).reshape((gradient.shape[0], -1))
        return (wide * wide).sum(axis=1).sum().reshape((1,))

    def global_norm(self, squares: tuple[Tensor, ...], fault: Tensor) -> Tensor:
        """Square sums of this rank, (1,) each -> L2 norm of the whole model's gradient, (1,)."""
        split_sum = ops.zeros((1,), ms.float32)
        whole_sum = ops.zeros((1,), ms.float32)
        for index in range(len(self.split)):
            if self.split[index]:
                split_sum = split_sum + squares[index]
            else:
                whole_sum = whole_sum + squares[index]
        # Adds 0, or NaN when something is not finite here, so that all ranks see it. Not ``* 0.0``: the
        # compiler folds that to 0.
        split_sum = split_sum + fault * (whole_sum + 1.0)
        if self.sharded_over_mp:
            split_sum = self.mp_sum(split_sum)
        return ops.sqrt(split_sum + whole_sum)


class Update(nn.Cell):
    """Clips by the norm and steps the optimizer.

    Args:
        optimizer: over the parameters the gradients belong to, in order.
        gradients: their buffers.
        max_grad_norm: bound on the global norm; 0 turns clipping off.
    """

    def __init__(self, optimizer: Optimizer, gradients: ParameterTuple, max_grad_norm: float) -> None:
        super().__init__(auto_prefix=False)
        self.optimizer = optimizer
        self.gradients = gradients
        self.fused = FusedAdamW(optimizer) if FusedAdamW.fits(optimizer) else None
        self.map = ops.HyperMap()
        self.max_grad_norm = max_grad_norm

    def construct(self, norm: Tensor) -> Tensor:
        """Norm (1,) of the gradients of all replicas -> learning rate (1,) float32."""
        scale = ops.ones_like(norm)
        if self.max_grad_norm > 0:
            # torch.nn.utils.clip_grad_norm_'s formula, so that updates can be compared to the last digits
            scale = ops.minimum(self.max_grad_norm / (norm + 1.0e-6), scale)
        rate = self.optimizer.get_lr()
        if self.fused is not None:
            updated = self.fused(self.gradients, scale.reshape(()))
        else:
            updated = self.optimizer(self.map(ops.partial(_scaled, scale.reshape(())), self.gradients))
        return ops.depend(ops.cast(rate, ms.float32).reshape((1,)), updated)


def _add(total: Parameter, gradient: Tensor) -> Tensor:
    return ops.assign_add(total, gradient)


def _scaled(scale: Tensor, gradient: Tensor) -> Tensor:
    return gradient * ops.cast(scale, gradient.dtype)


class TrainStep:
    """Runs optimizer steps; serves any loss cell, whatever its inputs.

    The loss cell must scale its loss by GLOBAL counts, so that gradients of micro-batches and of
    data-parallel replicas simply add up, and results depend on neither.

    Args:
        loss: cell with ``construct(*inputs) -> (scalar loss, statistics (k,))``, whose attribute
            ``statistics`` names them.
        optimizer: over ``loss.trainable_params()``.
        layouts: canonical name -> layout of those parameters.
        groups: this rank's groups.
        max_grad_norm: bound on the global gradient norm.
        mixed_in: another loss cell over the same parameters, whose gradients :meth:`accumulate` can add to
            the same step; compiled when it is first used.
        buffers: where gradients accumulate; steps may share them if at most one holds gradients at a time.
    """

    def __init__(
        self,
        loss: nn.Cell,
        optimizer: Optimizer,
        layouts: Mapping[str, Layout],
        groups: Groups,
        max_grad_norm: float,
        mixed_in: nn.Cell | None = None,
        buffers: GradientBuffers | None = None,
    ) -> None:
        parameters = loss.trainable_params()
        self.optimizer = optimizer
        self._gradients = (buffers or GradientBuffers()).matching(parameters)
        self._backward = Backward(loss, self._gradients)
        self._mixed_in = None if mixed_in is None else Backward(mixed_in, self._gradients)
        self._losses: list[float] = []
        split = [layouts[parameter.name].is_split for parameter in parameters]
        self._norm = GradientNorm(self._gradients, split, groups)
        self._update = Update(optimizer, self._gradients, max_grad_norm)

    def accumulate(
        self, micro_batches: Sequence[tuple[np.ndarray, ...]], *, mixed_in: bool = False
    ) -> Statistics:
        """Adds the gradients of some micro-batches to those that :meth:`update` will take.

        Args:
            micro_batches: of this rank.
            mixed_in: whether they are for the loss that is mixed in.

        Returns:
            statistics by name, summed over the micro-batches.
        """
        backward = self._mixed_in if mixed_in else self._backward
        assert backward is not None
        losses, statistics = [], []
        if not self._losses:
            clear(self._gradients)
        for arrays in micro_batches:
            loss, part = backward(*(Tensor(array) for array in arrays))
            losses.append(loss)
            statistics.append(part)
        self._losses += [float(loss.asnumpy()) for loss in losses]
        sums = np.sum([part.asnumpy() for part in statistics], axis=0)
        return dict(zip(backward.loss.statistics, sums, strict=True))

    def update(self) -> tuple[float, float]:
        """Steps the optimizer with the gradients so far; returns their norm and the learning rate.

        The norm is taken first. When it is not finite, because a loss or a gradient of any rank is not, the
        step is skipped on every rank: weights, moments and schedule do not change, and the rate is 0.
        """
        fault = np.zeros(1, np.float32) if np.isfinite(self._losses).all() else np.full(1, np.nan, np.float32)
        norm = self._norm(Tensor(fault))
        found, rate = float(norm.asnumpy()[0]), 0.0
        if math.isfinite(found):
            rate = float(self._update(norm).asnumpy()[0])
        self.discard()
        return found, rate

    @property
    def losses(self) -> list[float]:
        """This rank's loss of each micro-batch since the last :meth:`update` or :meth:`discard`."""
        return list(self._losses)

    def discard(self) -> None:
        """Forgets the gradients so far."""
        self._losses = []
