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
        self.stack_ranks = GroupStack(groups)
        if groups.mp_group is not None:
            self.all_reduce = ops.AllReduce(group=groups.mp_group)
        self.softmax = ops.Softmax(-1)
        self.best = ops.ArgMaxWithValue(axis=1)
        self.largest = ops.TopK(sorted=True)
        self.cumsum_before = ops.CumSum(exclusive=True)
        self.row_max = ops.ReduceMax()
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
        log_sum = -ops.log(row_element(masses, index))
        ids = ops.cast(index + self.first, ms.float32)
        gathered = self._gather(ops.stack((largest, log_sum, ids), 1))
        owner, largest = self.best(gathered[:, :, 0])
        log_masses = gathered[:, :, 0] - ops.expand_dims(largest, 1) + gathered[:, :, 1]
        log_total = ops.log(self.row_sum(ops.exp(log_masses), 1))
        shares = ops.exp(log_masses - ops.expand_dims(log_total, 1))
        best_ids = ops.cast(row_element(gathered[:, :, 2], owner), ms.int32)
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
        owner, target = self._locate(rank_masses, uniforms * self.row_sum(rank_masses, 1), _RANK_FLOOR)
        # From here on in units of this rank's own softmax; the owner's share is above the floor.
        target = target / ops.maximum(shares[:, self.rank], _RANK_FLOOR)
        block, target = self._locate(block_masses, target, _BLOCK_FLOOR)
        first_blocks = ms.numpy.arange(count) * block_masses.shape[1]
        offset, _ = self._locate(ops.gather(blocks, first_blocks + block, 0), target, 0.0)
        index = block * self.block + offset
        chosen = row_element(scaled, index)
        if self.mp == 1:
            return index, chosen
        mine = ops.cast(ops.expand_dims(owner == self.rank, 1), ms.float32)
        # One addend is not zero, and ids below 2**24 are exact in float32. What the other ranks found is
        # finite, so times zero it is zero.
        ids = ops.cast(index + self.first, ms.float32)
        found = self.all_reduce(ops.stack((ids, chosen), 1) * mine)
        return ops.cast(found[:, 0], ms.int32), found[:, 1]

    def _locate(self, masses: Tensor, target: Tensor, floor: float) -> tuple[Tensor, Tensor]:
        """Which of the intervals ``masses`` (B, n) laid end to end holds ``target`` (B,), and where in it.

        The last interval that has mass and begins at or before the target. Rounding can put the target
        beyond the end or into an empty interval; the last one with mass before it is taken then, so
        nothing without mass is ever picked.
        """
        begins = self.cumsum_before(masses, 1)
        target_column = ops.expand_dims(target, 1)
        possible = ops.logical_and(masses > floor, begins <= target_column)
        positions = ops.cast(possible, ms.float32) * ms.numpy.arange(masses.shape[1]).astype(ms.float32)
        index = ops.cast(self.row_max(positions, 1), ms.int32)
        return index, target - row_element(begins, index)

    def _kth_largest(self, scaled: Tensor) -> Tensor:
        """The k-th largest scaled logit over all ranks, (B, 1)."""
        values, _ = self.largest(scaled, min(self.top_k, self.rows))
        if self.mp > 1:
            gathered = ops.reshape(self._gather(values), (scaled.shape[0], -1))
            values, _ = self.largest(gathered, self.top_k)
        return values[:, self.top_k - 1 : self.top_k]

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
        sums = self._gather(ops.expand_dims(local, 1))[:, :, 0] * shares
        return ops.expand_dims(self.row_sum(sums, 1), 1)

    def _rank_sums(self, block_masses: Tensor) -> Tensor:
        """Sum of each rank's blocks (B, n) -> (B, mp); gathered, so equal bit for bit on all ranks."""
        return self._gather(ops.expand_dims(self.row_sum(block_masses, 1), 1))[:, :, 0]

    def _gather(self, x: Tensor) -> Tensor:
        """``x`` (B, n) of every rank, (B, mp, n)."""
        return ops.transpose(self.stack_ranks(x), (1, 0, 2))


def row_element(x: Tensor, index: Tensor) -> Tensor:
    """``x`` (B, n), ``index`` (B,) int32 -> ``x[b, index[b]]`` (B,)."""
    rows, size = x.shape
    return ops.gather(ops.reshape(x, (-1,)), index + ms.numpy.arange(rows) * size, 0)


def widen(column: Tensor, columns: int) -> Tensor:
    """``column`` (B, 1) -> (B, columns); on CPU cheaper by far than broadcasting in the operation."""
    return ops.tile(column, (1, columns))


def above(x: Tensor, threshold: Tensor) -> Tensor:
    """1 where ``x`` (B, n) exceeds ``threshold`` (B, 1), else 0, float32; without slow comparisons."""
    return ops.relu(ops.sign(x - widen(threshold, x.shape[1])))


def smallest_divisor_from(number: int, least: int) -> int:
    """The smallest divisor of ``number`` that is not below ``least``."""
    return next(size for size in range(max(least, 1), number + 1) if number % size == 0)
