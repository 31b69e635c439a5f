"""One optimizer step of any network: backward over micro-batches, sum over replicas, clip, update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.nn import Optimizer

from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layout import Layout
from mindrlhf.trainer.optimizer import FusedAdamW


class Backward(nn.Cell):
    """Gradients of a loss cell that returns ``(loss, statistics)``."""

    def __init__(self, loss: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.loss = loss  # else this cell lists no parameters, and a cached graph would get other ones
        self.value_and_grad = ops.value_and_grad(loss, None, loss.trainable_params(), has_aux=True)

    def construct(self, *inputs: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Inputs of the loss -> the loss, its statistics, and one gradient per parameter."""
        (loss, statistics), gradients = self.value_and_grad(*inputs)
        return loss, statistics, gradients


def add_gradients(totals: list[Tensor], gradients: tuple[Tensor, ...]) -> list[Tensor]:
    """Adds the gradients of a micro-batch to those of the ones before, one after the other.

    Each total that is replaced is freed at once: never are there three whole sets in memory, as a graph with
    totals and gradients as its inputs would hold.
    """
    for index, gradient in enumerate(gradients):
        totals[index] = totals[index] + gradient
    return totals


class GradientNorm(nn.Cell):
    """Sums gradients over replicas and takes the norm over all shards, before anything is changed.

    Gradients come as separate arguments: a tuple of tensors is a constant to the graph compiler, so each
    call would compile anew. ``HyperMap`` goes over them: a loop that appends to a tuple takes the compiler
    quadratic time (364 tensors: 10 s against 0.6 s).

    Args:
        split: whether each parameter is split over the model-parallel group; a split one's square sum
            is added up over the group, a replicated one counts once.
        groups: this rank's groups.
    """

    def __init__(self, split: Sequence[bool], groups: Groups) -> None:
        super().__init__(auto_prefix=False)
        self.map = ops.HyperMap()
        self.split = tuple(split)
        self.replicated_over_dp = groups.dp_group is not None
        self.sharded_over_mp = groups.mp_group is not None
        if groups.dp_group is not None:
            self.dp_sum = ops.AllReduce(group=groups.dp_group)
        if groups.mp_group is not None:
            self.mp_sum = ops.AllReduce(group=groups.mp_group)

    def construct(self, fault: Tensor, *gradients: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Gradients of this rank's shards -> their norm, and their sums where there are replicas.

        Args:
            fault: (1,) float32, 0, or NaN when this rank's loss is not finite.
            gradients: one a parameter.

        Returns:
            (1,) float32, not finite on every rank when a loss or a gradient of any rank is not; the summed
            gradients, empty without replicas.
        """
        summed = gradients
        if self.replicated_over_dp:
            fault = self.dp_sum(fault)
            summed = self.map(self.dp_sum, gradients)
        norm = self.global_norm(summed, fault)
        if self.replicated_over_dp:
            return norm, summed
        return norm, ()

    def global_norm(self, gradients: tuple[Tensor, ...], fault: Tensor) -> Tensor:
        """L2 norm of the whole model's gradient, (1,) float32, equal on every rank."""
        split_sum = ops.zeros((1,), ms.float32)
        whole_sum = ops.zeros((1,), ms.float32)
        squares = self.map(_square_sum, gradients)
        for index in range(len(self.split)):
            if self.split[index]:
                split_sum = split_sum + squares[index]
            else:
                whole_sum = whole_sum + squares[index]
        # Adds 0, or NaN when something is not finite here, so that all ranks see it. Not ``* 0.0``: the
        # compiler takes that for 0.
        split_sum = split_sum + fault * (whole_sum + 1.0)
        if self.sharded_over_mp:
            split_sum = self.mp_sum(split_sum)
        return ops.sqrt(split_sum + whole_sum)


class Update(nn.Cell):
    """Clips by the norm and steps the optimizer.

    Args:
        optimizer: over the parameters the gradients belong to, in order.
        max_grad_norm: bound of the global norm; 0 turns clipping off.
    """

    def __init__(self, optimizer: Optimizer, max_grad_norm: float) -> None:
        super().__init__(auto_prefix=False)
        self.optimizer = optimizer
        self.fused = FusedAdamW(optimizer) if FusedAdamW.fits(optimizer) else None
        self.map = ops.HyperMap()
        self.max_grad_norm = max_grad_norm

    def construct(self, norm: Tensor, *gradients: Tensor) -> Tensor:
        """Norm (1,) and gradients of all replicas -> learning rate (1,) float32."""
        scale = ops.ones_like(norm)
        if self.max_grad_norm > 0:
            # torch.nn.utils.clip_grad_norm_'s formula, so that updates can be compared to the last digits
            scale = ops.minimum(self.max_grad_norm / (norm + 1.0e-6), scale)
        rate = self.optimizer.get_lr()
        if self.fused is not None:
            updated = self.fused(gradients, scale.reshape(()))
        else:
            updated = self.optimizer(self.map(ops.partial(_scaled, scale.reshape(())), gradients))
        return ops.depend(ops.cast(rate, ms.float32).reshape((1,)), updated)


def _square_sum(gradient: Tensor) -> Tensor:
    """Sum of squares, (1,) float32; by rows first: on CPU one sum over everything takes six times as long."""
    wide = ops.cast(gradient, ms.float32).reshape((gradient.shape[0], -1))
    return (wide * wide).sum(axis=1).sum().reshape((1,))


def _scaled(scale: Tensor, gradient: Tensor) -> Tensor:
    return gradient * ops.cast(scale, gradient.dtype)


class TrainStep:
    """Runs optimizer steps; serves any loss cell, whatever its inputs.

    The loss cell must scale its loss by GLOBAL counts, so that gradients of micro-batches and of
    data-parallel replicas simply add up, and results depend on neither.

    Args:
        loss: cell with ``construct(*inputs) -> (scalar loss, statistics (k,))``.
        optimizer: over ``loss.trainable_params()``.
        layouts: canonical name -> layout of those parameters.
        groups: this rank's groups.
        max_grad_norm: bound of the global gradient norm.
        mixed_in: another loss cell over the same parameters, whose gradients :meth:`accumulate` can add to
            the same step; compiled when it is first used.
    """

    def __init__(
        self,
        loss: nn.Cell,
        optimizer: Optimizer,
        layouts: Mapping[str, Layout],
        groups: Groups,
        max_grad_norm: float,
        mixed_in: nn.Cell | None = None,
    ) -> None:
        names = [parameter.name for parameter in loss.trainable_params()]
        self.optimizer = optimizer
        self._backward = Backward(loss)
        self._mixed_in = None if mixed_in is None else Backward(mixed_in)
        self._total: list[Tensor] = []
        self._losses: list[float] = []
        self._norm = GradientNorm([layouts[name].is_split for name in names], groups)
        self._update = Update(optimizer, max_grad_norm)

    def step(self, micro_batches: Sequence[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, float, float]:
        """One optimizer step over the micro-batches of this rank; skipped as :meth:`update` says.

        Returns:
            statistics summed over the micro-batches (k,), gradient norm before clipping, learning rate.
        """
        statistics = self.accumulate(micro_batches)
        return statistics, *self.update()

    def accumulate(
        self, micro_batches: Sequence[tuple[np.ndarray, ...]], *, mixed_in: bool = False
    ) -> np.ndarray:
        """Adds the gradients of some micro-batches to those that :meth:`update` will take.

        Args:
            micro_batches: of this rank.
            mixed_in: whether they are for the loss that is mixed in.

        Returns:
            statistics summed over the micro-batches (k,).
        """
        backward = self._mixed_in if mixed_in else self._backward
        assert backward is not None
        losses, statistics = [], []
        for arrays in micro_batches:
            loss, part, gradients = backward(*(Tensor(array) for array in arrays))
            losses.append(loss)
            statistics.append(part)
            self._total = add_gradients(self._total, gradients) if self._total else list(gradients)
            del gradients  # else this set stays in memory while the next backward makes another
        self._losses += [float(loss.asnumpy()) for loss in losses]
        return np.sum([part.asnumpy() for part in statistics], axis=0)

    def update(self) -> tuple[float, float]:
        """Steps the optimizer with the gradients so far; returns their norm and the learning rate.

        The norm is taken first. When it is not finite, because a loss or a gradient of any rank is not, the
        step is skipped on every rank: weights, moments and schedule stay as they are, and the rate is 0.
        """
        fault = np.zeros(1, np.float32) if np.isfinite(self._losses).all() else np.full(1, np.nan, np.float32)
        norm, summed = self._norm(Tensor(fault), *self._total)
        if summed:
            self._total = list(summed)
        del summed
        found, rate = float(norm.asnumpy()[0]), 0.0
        if math.isfinite(found):
            rate = float(self._update(norm, *self._total).asnumpy()[0])
        self.discard()
        return found, rate

    @property
    def losses(self) -> list[float]:
        """This rank's loss of each micro-batch since the last :meth:`update` or :meth:`discard`."""
        return list(self._losses)

    def discard(self) -> None:
        """Forgets the gradients so far."""
        self._total, self._losses = [], []
