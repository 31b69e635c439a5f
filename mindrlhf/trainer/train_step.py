"""One optimizer step of any network: backward over micro-batches, sum over replicas, clip, update."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
from mindspore import Tensor, nn, ops

from mindrlhf.models.device_memory import DeviceMemory
from mindrlhf.models.networks import Network
from mindrlhf.models.pieces import Gradients
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layout import Layout
from mindrlhf.parallel.partition import sum_together
from mindrlhf.trainer.optimizer import AdamW

Statistics = dict[str, np.float32]
"""What a loss cell sums, by name."""


class MicroBatch(NamedTuple):
    """Some rows of a step: what the network takes, and what the loss takes besides the network's outputs."""

    inputs: tuple[np.ndarray, ...]
    targets: tuple[np.ndarray, ...]


class Objective:
    """A network under a loss.

    Args:
        network: any.
        loss: cell with ``construct(*outputs of the network, *targets) -> (scalar loss, statistics (k,))``,
            whose attribute ``statistics`` names them.
    """

    def __init__(self, network: Network, loss: nn.Cell) -> None:
        self.network, self.loss = network, loss
        self._gradient: _LossGradient | None = None

    def backward(self, batch: MicroBatch, gradients: Gradients) -> tuple[Tensor, Tensor]:
        """Adds the gradients for a micro-batch to their sums; returns the loss and its statistics."""
        outputs, tape = self.network.forward(*batch.inputs)
        if self._gradient is None:
            self._gradient = _LossGradient(self.loss, len(outputs))
        loss, statistics, *d_outputs = self._gradient(*outputs, *map(Tensor, batch.targets))
        self.network.backward(tape, d_outputs, gradients)
        return loss, statistics


class _LossGradient(nn.Cell):
    """A loss, its statistics, and its gradients with respect to the network's outputs."""

    def __init__(self, loss: nn.Cell, outputs: int) -> None:
        super().__init__()
        places = 0 if outputs == 1 else tuple(range(outputs))
        self.value_and_grad = ops.value_and_grad(loss, places, None, has_aux=True)
        self.is_one = outputs == 1

    def construct(self, *args: Tensor) -> tuple[Tensor, ...]:
        (loss, statistics), gradients = self.value_and_grad(*args)
        return (loss, statistics, gradients) if self.is_one else (loss, statistics, *gradients)


class TrainStep:
    """Runs optimizer steps; serves any network and loss.

    The loss must be scaled by GLOBAL counts, so that gradients of micro-batches and of data-parallel replicas
    simply add up, and results depend on neither.

    Args:
        objective: what is minimised.
        optimizer: over the network's parameters.
        layouts: canonical name -> layout of those parameters.
        groups: this rank's groups.
        max_grad_norm: bound on the global gradient norm; 0 turns clipping off.
        mixed_in: another objective over the same parameters, whose gradients :meth:`accumulate` can add to
            the same step.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: AdamW,
        layouts: Mapping[str, Layout],
        groups: Groups,
        max_grad_norm: float,
        mixed_in: Objective | None = None,
    ) -> None:
        self.optimizer = optimizer
        self._objective, self._mixed_in = objective, mixed_in
        self._layouts, self._groups, self._max_grad_norm = layouts, groups, max_grad_norm
        self._gradients = Gradients()
        self._losses: list[float] = []
        self._memory: DeviceMemory | None = None

    def accumulate(self, micro_batches: Iterable[MicroBatch], *, mixed_in: bool = False) -> Statistics:
        """Adds the gradients of some micro-batches to those that :meth:`update` will take.

        Args:
            micro_batches: of this rank.
            mixed_in: whether they are for the objective that is mixed in.

        Returns:
            statistics by name, summed over the micro-batches.
        """
        objective = self._mixed_in if mixed_in else self._objective
        assert objective is not None
        results = [objective.backward(batch, self._gradients) for batch in micro_batches]
        self._losses += [float(loss.asnumpy()) for loss, _ in results]
        sums = np.sum([part.asnumpy() for _, part in results], axis=0)
        return dict(zip(objective.loss.statistics, sums, strict=True))

    def update(self) -> tuple[float, float]:
        """Steps the optimizer with the gradients so far; returns their norm and the learning rate.

        The norm is taken first. When it is not finite, because a loss or a gradient of any rank is not, the
        step is skipped on every rank: weights, moments and schedule do not change, and the rate is 0.
        """
        if self._memory is not None:
            self._memory.measure()
        norm, rate = self._global_norm(), 0.0
        if math.isfinite(norm):
            # torch.nn.utils.clip_grad_norm_'s formula, so that updates can be compared to the last digits
            scale = min(self._max_grad_norm / (norm + 1.0e-6), 1.0) if self._max_grad_norm > 0 else 1.0
            rate = self.optimizer.step(self._gradients, scale)
        self.discard()
        return norm, rate

    def watch(self, memory: DeviceMemory) -> None:
        """Adds optimizer states and gradients to the device's account, which is then taken at each step."""
        memory.watch("moments", lambda: self.optimizer.state.device_bytes)
        memory.watch("gradients", lambda: self._gradients.nbytes)
        self._memory = memory

    @property
    def losses(self) -> list[float]:
        """This rank's loss of each micro-batch since the last :meth:`update` or :meth:`discard`."""
        return list(self._losses)

    def discard(self) -> None:
        """Forgets the gradients so far."""
        self._losses = []
        self._gradients.clear()

    def _global_norm(self) -> float:
        """Sums the gradients over the replicas, and takes the L2 norm over all shards.

        A split parameter's square sum is added up over the model-parallel group, a replicated one counts
        once. Not finite on every rank when a loss or a gradient of any rank is not.
        """
        mp_group, dp_group, partition = self._groups.mp_group, self._groups.dp_group, self.optimizer.partition
        if dp_group:
            all_reduce = ops.AllReduce(group=dp_group)
            reduce = partition.reduce_scatter if partition else partial(sum_together, all_reduce=all_reduce)
            self._gradients.transform(reduce)
        found = ops.stack([_square_sum(self._gradients[name]) for name in self._layouts]).asnumpy()
        is_split = np.array([layout.is_split for layout in self._layouts.values()])
        of_split, of_whole = found[is_split].sum(dtype=np.float64), found[~is_split].sum(dtype=np.float64)
        # A number that is not finite here reaches every rank.
        fault = 0.0 if np.isfinite([*self._losses, of_split, of_whole]).all() else np.nan
        sums = np.array([of_split, of_whole, fault], np.float32)
        if mp_group:  # whose ranks have equal gradients of what is not split
            sums[[0, 2]] = ops.AllReduce(group=mp_group)(Tensor(sums[[0, 2]])).asnumpy()
        if dp_group:  # whose ranks have equal gradients, or each its part
            summed = slice(0, 3) if partition else slice(2, 3)
            sums[summed] = ops.AllReduce(group=dp_group)(Tensor(sums[summed])).asnumpy()
        return math.sqrt(float(sums[0]) + float(sums[1])) if np.isfinite(sums).all() else math.nan


def _square_sum(gradient: Tensor) -> Tensor:
    """Sum of squares, () float32; by rows first: on CPU one sum over everything takes six times as long."""
    return ops.square(gradient.reshape((gradient.shape[0], -1))).sum(axis=1).sum()
