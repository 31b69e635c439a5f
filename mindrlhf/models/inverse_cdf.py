"""Sampling by inverse CDF from the tokens of a rank: softmax, and the token at a value of its cumulative sum.

Two implementations: :class:`PlainInverseCDF` in MindSpore's operations, and
:class:`mindrlhf.kernels.decoding.KernelInverseCDF` for CPU.
"""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

# Blocks with less mass are skipped when an interval is looked up. The floor exceeds that of ids by a factor
# above the number of ids, so a chosen block always has an id to choose.
BLOCK_FLOOR = 1.0e-33


class PlainInverseCDF(nn.Cell):
    """Softmax and look-up for B rows of V logits, in any device's operations."""

    def __init__(self, batch_size: int, vocab: int) -> None:
        super().__init__()
        self.block = smallest_divisor_from(vocab, math.isqrt(vocab))
        self.row_numbers = row_numbers(batch_size)
        self.in_blocks = IntervalLookup(batch_size, vocab // self.block, BLOCK_FLOOR)
        self.in_ids = IntervalLookup(batch_size, self.block, 0.0)
        self.softmax = ops.Softmax(-1)
        self.best = ops.ArgMaxWithValue(axis=1)
        self.row_sum = ops.ReduceSum()

    def construct(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Softmax, and the logarithm of its normaliser.

        Args:
            logits: (B, V) float32.

        Returns:
            probabilities (B, V); first place of the largest logit (B,) int32; that logit (B,);
            log(sum(exp(logits - largest))) (B,).
        """
        probabilities = self.softmax(logits)
        index, largest = self.best(logits)
        # The softmax of the largest logit is 1 / sum(exp(logits - largest)).
        log_sum = -ops.log(row_element(probabilities, index, self.row_numbers))
        return probabilities, ops.cast(index, ms.int32), largest, log_sum

    def totals(self, probabilities: Tensor) -> Tensor:
        """``probabilities`` (B, V) -> their sums (B,)."""
        return self.row_sum(self._of_blocks(probabilities), 1)

    def look_up(self, probabilities: Tensor, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The id in whose interval of the cumulative sum ``target`` falls.

        It is looked up among blocks of ids, then among the ids of the block: short sums, which round less
        than one over the vocabulary.

        Args:
            probabilities, logits: (B, V).
            target: (B,), from 0 up to the sum of the probabilities.

        Returns:
            ids (B,) int32, and their logits (B,).
        """
        blocks = ops.reshape(probabilities, (-1, self.block))
        block_sums = self._of_blocks(probabilities)
        block, target = self.in_blocks(block_sums, target)
        chosen_block = ops.gather(blocks, self.row_numbers * block_sums.shape[1] + block, 0)
        offset, _ = self.in_ids(chosen_block, target)
        index = block * self.block + offset
        return index, row_element(logits, index, self.row_numbers)

    def _of_blocks(self, probabilities: Tensor) -> Tensor:
        blocks = ops.reshape(probabilities, (-1, self.block))
        return ops.reshape(self.row_sum(blocks, 1), (probabilities.shape[0], -1))


class IntervalLookup(nn.Cell):
    """Which of n intervals laid end to end holds a target, and where in it.

    The answer is the last interval that has mass and begins at or before the target. Rounding can put the
    target beyond the end or into an empty interval; the last one with mass before it is taken then, so
    nothing without mass is ever chosen.

    Args:
        batch_size: B.
        intervals: n.
        floor: intervals up to this mass count as empty.
    """

    def __init__(self, batch_size: int, intervals: int, floor: float) -> None:
        super().__init__()
        self.floor = floor
        self.row_numbers = row_numbers(batch_size)
        self.positions = Tensor(np.arange(intervals, dtype=np.float32))
        self.cumsum_before = ops.CumSum(exclusive=True)
        self.row_max = ops.ReduceMax()

    def construct(self, probabilities: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """``probabilities`` (B, n), ``target`` (B,) -> index (B,) int32, remainder of the target (B,)."""
        begins = self.cumsum_before(probabilities, 1)
        possible = ops.logical_and(probabilities > self.floor, begins <= ops.expand_dims(target, 1))
        index = ops.cast(self.row_max(ops.cast(possible, ms.float32) * self.positions, 1), ms.int32)
        return index, target - row_element(begins, index, self.row_numbers)


def row_numbers(batch_size: int) -> Tensor:
    """0 .. B-1, int32; a constant, because making it inside the graph takes long to compile."""
    return Tensor(np.arange(batch_size, dtype=np.int32))


def row_element(x: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """``x`` (B, n), ``index`` (B,) int32, ``rows`` 0 .. B-1 -> ``x[b, index[b]]`` (B,)."""
    return ops.gather(ops.reshape(x, (-1,)), rows * x.shape[1] + index, 0)


def smallest_divisor_from(number: int, least: int) -> int:
    """The smallest divisor of ``number`` that is not below ``least``."""
    return next(size for size in range(max(least, 1), number + 1) if number % size == 0)
