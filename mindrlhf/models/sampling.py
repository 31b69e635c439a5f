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

from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layers import PADDED_LOGIT
from mindrlhf.utils.sizes import exact_div

# Masses below the floor are passed over when an interval is looked up. The floors fall from ranks to
# blocks to single ids by more than the number of parts, so what is picked always has a part to pick.
_RANK_FLOOR = 1.0e-28
_BLOCK_FLOOR = 1.0e-33

# 28 halvings of [-32, 1] in log-probability: to 1.2e-7, the relative precision of a float32 probability.
_BISECTIONS = 28
_LOWEST_LOGPROB = -32.0


class VocabParallelSampler(nn.Cell):
    """One token per row from vocabulary-parallel logits, and its log-probability.

    Temperature is applied first, then top-k, then top-p on what top-k left (the order of Hugging Face's
    logits processors). Ties are kept: top-k keeps every id whose logit equals the k-th largest; top-p
    (nucleus sampling, arXiv 1904.09751) keeps the smallest set of the form ``{p >= t}`` whose mass is at
    least ``top_p``, where log-probabilities closer than 1.2e-7 count as equal. Greedy choice takes the
    smallest id among equals.

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
        self.block_sum = Tensor(np.ones((self.block, 1), np.float32))
        group = groups.mp_group
        self.all_gather = ops.AllGather(group=group) if group is not None else None
        self.all_reduce = ops.AllReduce(group=group) if group is not None else None
        self.log_softmax = ops.LogSoftmax(-1)
        self.arg_max = ops.Argmax(-1)
        self.matmul = ops.MatMul()
        self.largest = ops.TopK(sorted=True)
        self.cumsum_before = ops.CumSum(exclusive=True)
        self.row_max = ops.ReduceMax()
        self.row_sum = ops.ReduceSum()

    def construct(self, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """``logits`` (B, V / mp), ``uniforms`` (B,) -> tokens (B,) int32, log-probs (B,) float32."""
        scaled = ops.cast(logits, ms.float32)
        if self.inverse_temperature != 1.0:
            scaled = scaled * self.inverse_temperature
        if self.has_padding:
            scaled = scaled + self.padding_bias
        logprobs = self.log_softmax(scaled)
        if not self.do_sample:
            return self._greedy(scaled, logprobs)
        rank_masses = ops.ones((scaled.shape[0], 1), ms.float32)
        if self.mp > 1:
            log_masses = self._log_rank_masses(self._local_normaliser(scaled, logprobs))
            rank_masses = ops.exp(log_masses)
            logprobs = logprobs + log_masses[:, self.rank : self.rank + 1]
        masses = ops.exp(logprobs)
        if self.top_k > 0:
            masses = masses * ops.cast(scaled >= self._kth_largest(scaled), ms.float32)
        if self.top_p < 1.0:
            masses = masses * ops.cast(logprobs >= self._nucleus_threshold(logprobs, masses), ms.float32)
        return self._inverse_cdf(logprobs, masses, rank_masses, uniforms)

    def _greedy(self, scaled: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """The id of the largest logit; among ranks with equal maxima the first."""
        index = self.arg_max(scaled)
        logprob = row_element(logprobs, index)
        if self.mp == 1:
            return index, logprob
        normaliser = self._local_normaliser(scaled, logprobs)
        best = row_element(scaled, index)
        ids = ops.cast(index + self.first, ms.float32)
        gathered = self._gather(ops.stack((normaliser, best, logprob, ids), 1))
        log_masses = log_shares(gathered[:, :, 0])
        owner = self.arg_max(gathered[:, :, 1])
        logprob = row_element(gathered[:, :, 2], owner) + row_element(log_masses, owner)
        return ops.cast(row_element(gathered[:, :, 3], owner), ms.int32), logprob

    def _inverse_cdf(
        self, logprobs: Tensor, masses: Tensor, rank_masses: Tensor, uniforms: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The id in whose interval of the cumulative mass ``u * total`` falls: rank, then block, then id."""
        count = masses.shape[0]
        blocks = ops.reshape(masses, (-1, self.block))
        block_masses = ops.reshape(self.matmul(blocks, self.block_sum), (count, -1))
        if self.top_k > 0 or self.top_p < 1.0:
            rank_masses = self._rank_sums(block_masses)
        target = uniforms * self.row_sum(rank_masses, 1)
        owner, target = self._locate(rank_masses, target, _RANK_FLOOR)
        block, target = self._locate(block_masses, target, _BLOCK_FLOOR)
        per_row = block_masses.shape[1]
        chosen = ops.gather(blocks, block + ms.numpy.arange(count) * per_row, 0)
        offset, _ = self._locate(chosen, target, 0.0)
        index = block * self.block + offset
        logprob = row_element(logprobs, index)
        if self.mp == 1:
            return index, logprob
        mine = ops.cast(ops.expand_dims(owner == self.rank, 1), ms.float32)
        # At most one addend is not zero, and ids below 2**24 are exact in float32. A rank that does not
        # own the row has finite numbers to multiply by zero: PADDED_LOGIT bounds its log-probs.
        ids = ops.cast(index + self.first, ms.float32)
        found = self.all_reduce(ops.stack((ids, logprob), 1) * mine)
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

    def _nucleus_threshold(self, logprobs: Tensor, masses: Tensor) -> Tensor:
        """The largest t with mass of {logprob >= t} at least ``top_p`` of all mass, by bisection, (B, 1)."""
        wanted = self._mass(masses) * self.top_p
        low = ops.full_like(wanted, _LOWEST_LOGPROB)
        high = ops.full_like(wanted, 1.0)
        for _ in range(_BISECTIONS):
            middle = (low + high) * 0.5
            kept = self._mass(masses * ops.cast(logprobs >= middle, ms.float32))
            enough = kept >= wanted
            low = ops.select(enough, middle, low)
            high = ops.select(enough, high, middle)
        return low

    def _mass(self, masses: Tensor) -> Tensor:
        """Sum of ``masses`` (B, V / mp) over the whole vocabulary, (B, 1)."""
        blocks = self.matmul(ops.reshape(masses, (-1, self.block)), self.block_sum)
        sums = self._rank_sums(ops.reshape(blocks, (masses.shape[0], -1)))
        return ops.expand_dims(self.row_sum(sums, 1), 1)

    def _rank_sums(self, block_masses: Tensor) -> Tensor:
        """Mass of each rank, (B, mp), from this rank's blocks (B, n); equal bit for bit on all ranks."""
        return self._gather(ops.expand_dims(self.row_sum(block_masses, 1), 1))[:, :, 0]

    def _local_normaliser(self, scaled: Tensor, logprobs: Tensor) -> Tensor:
        """log(sum(exp)) of this rank's logits, (B,), read off its first id."""
        return scaled[:, 0] - logprobs[:, 0]

    def _log_rank_masses(self, normaliser: Tensor) -> Tensor:
        """Log of each rank's share of the mass, (B, mp), from the local normalisers (B,)."""
        return log_shares(self._gather(ops.expand_dims(normaliser, 1))[:, :, 0])

    def _gather(self, x: Tensor) -> Tensor:
        """``x`` (B, n) of every rank, (B, mp, n)."""
        if self.mp == 1:
            return ops.expand_dims(x, 1)
        gathered = ops.reshape(self.all_gather(x), (self.mp, *x.shape))
        return ops.transpose(gathered, (1, 0, 2))


def row_element(x: Tensor, index: Tensor) -> Tensor:
    """``x`` (B, n), ``index`` (B,) int32 -> ``x[b, index[b]]`` (B,)."""
    rows, size = x.shape
    return ops.gather(ops.reshape(x, (-1,)), index + ms.numpy.arange(rows) * size, 0)


def log_shares(normalisers: Tensor) -> Tensor:
    """``normalisers`` (B, mp), log of each rank's mass -> log of its share of the sum, (B, mp)."""
    return ops.LogSoftmax(-1)(normalisers)


def smallest_divisor_from(number: int, least: int) -> int:
    """The smallest divisor of ``number`` that is not below ``least``."""
    return next(size for size in range(max(least, 1), number + 1) if number % size == 0)
