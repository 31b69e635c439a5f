"""Choosing the next token from logits whose vocabulary is split over the model-parallel group.

No rank ever sees another's logits. What is exchanged per row is a handful of numbers: the normaliser of
each rank, and the chosen id with its log-probability. Random numbers come from outside (one uniform per
row and step) and are turned into a token by the inverse of the cumulative distribution in id order, so
the token does not depend on how the vocabulary is split, and all ranks of the group agree on it.
"""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mindrlhf.parallel.gather import GroupStack
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layers import PADDED_LOGIT
from mindrlhf.utils.sizes import exact_div

# Masses below the floor are passed over when an interval is looked up. The floors fall from ranks to
# blocks to single ids by more than the number of parts, so what is picked always has a part to pick.
_RANK_FLOOR = 1.0e-28
_BLOCK_FLOOR = 1.0e-33

# 28 halvings of [largest - 32, largest + 1]: to 1.2e-7, the relative precision of a float32 probability.
_BISECTIONS = 28
_LOWEST = -32.0
_HIGHEST = 1.0


class VocabParallelSampler(nn.Cell):
    """One token per row from vocabulary-parallel logits, and its log-probability.

    Temperature is applied first, then top-k, then top-p on what top-k left (the order of Hugging Face's
    logits processors). Ties are kept: top-k keeps every id whose logit equals the k-th largest; top-p
    (nucleus sampling, arXiv 1904.09751) keeps the smallest set of the form ``{p >= t}`` whose mass is at
    least ``top_p``, where logits closer than 1.2e-7 may count as equal. Greedy choice takes the smallest id
    among equals.

    Args:
        vocab_size: V, full number of logits, padded rows included.
        valid_vocab_size: ids from here on have probability 0.
        groups: the rank's groups.
        batch_size: B.
        do_sample: draw from the distribution; otherwise take the most likely id.
        temperature: divides the logits, for sampling and for the log-probability.
        top_k: ids to sample from; 0 for all.
        top_p: mass to sample from; 1 for all.

    Inputs:
        logits: (B, V / mp), this rank's.
        uniforms: (B,) float32 in [0, 1), equal on all ranks of the group; unused when greedy.

    Outputs:
        tokens (B,) int32 and their log-probs (B,) float32 under the temperature-scaled distribution over
        the valid ids, before top-k and top-p; equal on all ranks of the group.
    """

    def __init__(
        self,
        vocab_size: int,
        groups: Groups,
        *,
        batch_size: int,
        valid_vocab_size: int,
        do_sample: bool = True,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> None:
        super().__init__()
        self.rows = exact_div(vocab_size, groups.mesh.mp, "vocabulary by mp")
        self.first = groups.mp_index * self.rows
        self.mp = groups.mesh.mp
        self.rank = groups.mp_index
        self.do_sample = do_sample
        self.inverse_temperature = 1.0 / temperature
        self.top_k = top_k if do_sample and 0 < top_k < valid_vocab_size else 0
        self.top_p = top_p if do_sample and top_p < 1.0 else 1.0
        self.block = smallest_divisor_from(self.rows, math.isqrt(self.rows))
        ids = np.arange(self.first, self.first + self.rows)
        self.has_padding = self.first + self.rows > valid_vocab_size
        self.padding_bias = Tensor(np.where(ids < valid_vocab_size, 0.0, PADDED_LOGIT).astype(np.float32))
        self.row_numbers = row_numbers(batch_size)
        self.in_ranks = IntervalLookup(batch_size, self.mp, _RANK_FLOOR)
        self.in_blocks = IntervalLookup(batch_size, self.rows // self.block, _BLOCK_FLOOR)
        self.in_ids = IntervalLookup(batch_size, self.block, 0.0)
        self.stack_ranks = GroupStack(groups)
        if groups.mp_group is not None:
            self.all_reduce = ops.AllReduce(group=groups.mp_group)
        self.unstack_pair = ops.Unstack(axis=1)
        self.unstack = ops.Unstack(axis=2)
        self.softmax = ops.Softmax(-1)
        self.best = ops.ArgMaxWithValue(axis=1)
        self.largest = ops.TopK(sorted=True)
        self.row_sum = ops.ReduceSum()
        self.dot = ops.BatchMatMul()

    def construct(self, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """``logits`` (B, V / mp), ``uniforms`` (B,) -> tokens (B,) int32, log-probs (B,) float32."""
        scaled = ops.cast(logits, ms.float32)
        if self.inverse_temperature != 1.0:
            scaled = scaled * self.inverse_temperature
        if self.has_padding:
            scaled = scaled + self.padding_bias
        masses = self.softmax(scaled)
        largest, log_total, shares, best_ids = self._normalise(scaled, masses)
        if not self.do_sample:
            return best_ids, -log_total
        if self.top_k > 0:
            masses = masses * ops.cast(scaled >= widen(self._kth_largest(scaled), self.rows), ms.float32)
        if self.top_p < 1.0:
            threshold = self._nucleus_threshold(scaled, masses, shares, largest)
            masses = masses * above(scaled, threshold)
        tokens, chosen = self._inverse_cdf(scaled, masses, shares, uniforms)
        return tokens, (chosen - largest) - log_total

    def _normalise(self, scaled: Tensor, masses: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What all ranks know of each row, by one exchange of three numbers a row.

        Args:
            scaled: (B, V / mp) this rank's scaled logits.
            masses: (B, V / mp) their softmax.

        Returns:
            largest scaled logit (B,); log(sum(exp(scaled - largest))) (B,); share of the mass of each rank
            (B, mp); smallest id of the largest logit (B,) int32.
        """
        index, largest = self.best(scaled)
        # The softmax of the largest logit is 1 / sum(exp(scaled - largest)).
        log_sum = -ops.log(self._element(masses, index))
        ids = ops.cast(index + self.first, ms.float32)
        gathered = self._gather(ops.stack((largest, log_sum, ids), 1))
        largests, log_sums, best_ids = self.unstack(gathered)
        owner, largest = self.best(largests)
        log_masses = largests - ops.expand_dims(largest, 1) + log_sums
        log_total = ops.log(self.row_sum(ops.exp(log_masses), 1))
        shares = ops.exp(log_masses - ops.expand_dims(log_total, 1))
        best_ids = ops.cast(self._element(best_ids, owner), ms.int32)
        return largest, log_total, shares, best_ids

    def _inverse_cdf(
        self, scaled: Tensor, masses: Tensor, shares: Tensor, uniforms: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The id in whose interval of the cumulative mass ``u * total`` falls, and its scaled logit.

        The interval is looked up among the ranks, then among the blocks of the rank that has it, then
        among the ids of the block: short sums, which round less than one over the vocabulary.
        """
        count = masses.shape[0]
        blocks = ops.reshape(masses, (-1, self.block))
        block_masses = ops.reshape(self.row_sum(blocks, 1), (count, -1))
        rank_masses = shares
        if self.top_k > 0 or self.top_p < 1.0:
            rank_masses = rank_masses * self._rank_sums(block_masses)
        owner, target = self.in_ranks(rank_masses, uniforms * self.row_sum(rank_masses, 1))
        # From here on in units of this rank's own softmax; the owner's share is above the floor.
        share = ops.reshape(ops.slice(shares, (0, self.rank), (count, 1)), (-1,))
        target = target / ops.maximum(share, _RANK_FLOOR)
        block, target = self.in_blocks(block_masses, target)
        chosen_block = ops.gather(blocks, self.row_numbers * block_masses.shape[1] + block, 0)
        offset, _ = self.in_ids(chosen_block, target)
        index = block * self.block + offset
        chosen = self._element(scaled, index)
        if self.mp == 1:
            return index, chosen
        mine = ops.cast(ops.expand_dims(owner == self.rank, 1), ms.float32)
        # One addend is not zero, and ids below 2**24 are exact in float32. What the other ranks found is
        # finite, so times zero it is zero.
        ids = ops.cast(index + self.first, ms.float32)
        found = self.all_reduce(ops.stack((ids, chosen), 1) * mine)
        ids, chosen = self.unstack_pair(found)
        return ops.cast(ids, ms.int32), chosen

    def _kth_largest(self, scaled: Tensor) -> Tensor:
        """The k-th largest scaled logit over all ranks, (B, 1)."""
        values, _ = self.largest(scaled, min(self.top_k, self.rows))
        if self.mp > 1:
            gathered = ops.reshape(self._gather(values), (scaled.shape[0], -1))
            values, _ = self.largest(gathered, self.top_k)
        return ops.slice(values, (0, self.top_k - 1), (scaled.shape[0], 1))

    def _nucleus_threshold(self, scaled: Tensor, masses: Tensor, shares: Tensor, largest: Tensor) -> Tensor:
        """The largest t with mass of {scaled > t} at least ``top_p`` of all mass, by bisection, (B, 1)."""
        wanted = self._total(self.row_sum(masses, 1), shares) * self.top_p
        low = ops.expand_dims(largest, 1) + _LOWEST
        high = ops.expand_dims(largest, 1) + _HIGHEST
        rows = ops.expand_dims(masses, 1)
        for _ in range(_BISECTIONS):
            middle = (low + high) * 0.5
            kept = self.dot(rows, ops.expand_dims(above(scaled, middle), 2))
            enough = self._total(ops.reshape(kept, (-1,)), shares) >= wanted
            low = ops.select(enough, middle, low)
            high = ops.select(enough, high, middle)
        return low

    def _total(self, local: Tensor, shares: Tensor) -> Tensor:
        """Sum over the ranks of ``local`` (B,), in units of each rank's softmax -> (B, 1)."""
        sums = self._gather_one(local) * shares
        return ops.expand_dims(self.row_sum(sums, 1), 1)

    def _rank_sums(self, block_masses: Tensor) -> Tensor:
        """Sum of each rank's blocks (B, n) -> (B, mp); gathered, so equal bit for bit on all ranks."""
        return self._gather_one(self.row_sum(block_masses, 1))

    def _gather(self, x: Tensor) -> Tensor:
        """``x`` (B, n) of every rank, (B, mp, n)."""
        return ops.transpose(self.stack_ranks(x), (1, 0, 2))

    def _gather_one(self, x: Tensor) -> Tensor:
        """``x`` (B,) of every rank, (B, mp)."""
        return ops.transpose(self.stack_ranks(x), (1, 0))

    def _element(self, x: Tensor, index: Tensor) -> Tensor:
        """``x`` (B, n), ``index`` (B,) int32 -> ``x[b, index[b]]`` (B,)."""
        return row_element(x, index, self.row_numbers)


class IntervalLookup(nn.Cell):
    """Which of n intervals laid end to end holds a target, and where in it.

    The answer is the last interval that has mass and begins at or before the target. Rounding can put the
    target beyond the end or into an empty interval; the last one with mass before it is taken then, so
    nothing without mass is ever picked.

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

    def construct(self, masses: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """``masses`` (B, n), ``target`` (B,) -> index (B,) int32, what is left of the target (B,)."""
        begins = self.cumsum_before(masses, 1)
        possible = ops.logical_and(masses > self.floor, begins <= ops.expand_dims(target, 1))
        index = ops.cast(self.row_max(ops.cast(possible, ms.float32) * self.positions, 1), ms.int32)
        return index, target - row_element(begins, index, self.row_numbers)


def row_numbers(batch_size: int) -> Tensor:
    """0 .. B-1, int32; a constant, because making it inside the graph takes long to compile."""
    return Tensor(np.arange(batch_size, dtype=np.int32))


def row_element(x: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """``x`` (B, n), ``index`` (B,) int32, ``rows`` 0 .. B-1 -> ``x[b, index[b]]`` (B,)."""
    return ops.gather(ops.reshape(x, (-1,)), rows * x.shape[1] + index, 0)


def widen(column: Tensor, columns: int) -> Tensor:
    """``column`` (B, 1) -> (B, columns); on CPU cheaper by far than broadcasting in the operation."""
    return ops.tile(column, (1, columns))


def above(x: Tensor, threshold: Tensor) -> Tensor:
    """1 where ``x`` (B, n) exceeds ``threshold`` (B, 1), else 0, float32; without slow comparisons."""
    return ops.relu(ops.sign(x - widen(threshold, x.shape[1])))


def smallest_divisor_from(number: int, least: int) -> int:
    """The smallest divisor of ``number`` that is not below ``least``."""
    return next(size for size in range(max(least, 1), number + 1) if number % size == 0)
