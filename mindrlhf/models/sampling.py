"""Choosing the next token from logits whose vocabulary is split over the model-parallel group.

No rank ever sees another's logits. What is exchanged per row is a handful of numbers: the normaliser of
each rank, and the chosen id with its log-probability. Random numbers come from outside (one uniform per
row and step) and are turned into a token by the inverse of the cumulative distribution in id order, so
the token does not depend on how the vocabulary is split, and all ranks of the group agree on it.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mindrlhf.kernels.decoding import KernelInverseCDF, kernel_inverse_cdf
from mindrlhf.models.inverse_cdf import IntervalLookup, PlainInverseCDF, row_element, row_numbers
from mindrlhf.parallel.collectives import GroupStack
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.tensor_parallel import SamplingLogits
from mindrlhf.utils.sizes import exact_div

# Ranks with less of the mass are skipped. The floor exceeds that of blocks by a factor above the number of
# parts, so a chosen rank always has a part to choose.
_RANK_FLOOR = 1.0e-28

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
        valid_vocab_size: ids from this one on have probability 0.
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
        self.top_k = top_k if do_sample and 0 < top_k < valid_vocab_size else 0
        self.top_p = top_p if do_sample and top_p < 1.0 else 1.0
        self.sampling_logits = SamplingLogits(
            vocab_size, groups, valid_vocab_size=valid_vocab_size, temperature=temperature
        )
        self.row_numbers = row_numbers(batch_size)
        self.in_ranks = IntervalLookup(batch_size, self.mp, _RANK_FLOOR)
        self.stack_ranks = GroupStack(groups)
        if groups.mp_group is not None:
            self.all_reduce = ops.AllReduce(group=groups.mp_group)
        self.whole = Tensor(np.ones((batch_size, 1), np.float32))
        self.none = Tensor(np.zeros(batch_size, np.int32))
        self.unstack_pair = ops.Unstack(axis=1)
        self.unstack = ops.Unstack(axis=2)
        self.inverse_cdf = _inverse_cdf_cell(batch_size, self.rows)
        self.best = ops.ArgMaxWithValue(axis=1)
        self.largest = ops.TopK(sorted=True)
        self.row_sum = ops.ReduceSum()
        self.dot = ops.BatchMatMul()

    def construct(self, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """``logits`` (B, V / mp), ``uniforms`` (B,) -> tokens (B,) int32, log-probs (B,) float32."""
        scaled = self.sampling_logits(logits)
        probabilities, best, largest, log_sum = self.inverse_cdf(scaled)
        largest, log_total, shares, best_ids = self._normalise(best, largest, log_sum)
        if not self.do_sample:
            return best_ids, -log_total
        if self.top_k > 0:
            kept = scaled >= widen(self._kth_largest(scaled), self.rows)
            probabilities = probabilities * ops.cast(kept, ms.float32)
        if self.top_p < 1.0:
            threshold = self._nucleus_threshold(scaled, probabilities, shares, largest)
            probabilities = probabilities * above(scaled, threshold)
        tokens, chosen = self._draw(scaled, probabilities, shares, uniforms)
        return tokens, (chosen - largest) - log_total

    def _normalise(
        self, index: Tensor, largest: Tensor, log_sum: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What all ranks need of each row, by one exchange of three numbers per row.

        Args:
            index, largest: (B,) place and number of this rank's largest scaled logit.
            log_sum: (B,) log(sum(exp(scaled - largest))) of this rank.

        Returns:
            largest scaled logit (B,); log(sum(exp(scaled - largest))) (B,); share of the mass of each rank
            (B, mp); smallest id of the largest logit (B,) int32.
        """
        if self.mp == 1:
            return largest, log_sum, self.whole, index
        ids = ops.cast(index + self.first, ms.float32)
        gathered = self._gather(ops.stack((largest, log_sum, ids), 1))
        largests, log_sums, best_ids = self.unstack(gathered)
        owner, largest = self.best(largests)
        log_rank_sums = largests - ops.expand_dims(largest, 1) + log_sums
        log_total = ops.log(self.row_sum(ops.exp(log_rank_sums), 1))
        shares = ops.exp(log_rank_sums - ops.expand_dims(log_total, 1))
        best_ids = ops.cast(self._element(best_ids, owner), ms.int32)
        return largest, log_total, shares, best_ids

    def _draw(
        self, scaled: Tensor, probabilities: Tensor, shares: Tensor, uniforms: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The id in whose interval of the cumulative mass ``u * total`` falls, and its scaled logit.

        The interval is looked up among the ranks, then among the ids of the rank that has it.
        """
        count = probabilities.shape[0]
        filtered = self.top_k > 0 or self.top_p < 1.0
        owner, target = self.none, uniforms
        if self.mp > 1:
            rank_probabilities = shares
            if filtered:
                totals = self._gather_one(self.inverse_cdf.totals(probabilities))
                rank_probabilities = rank_probabilities * totals
            owner, target = self.in_ranks(rank_probabilities, uniforms * self.row_sum(rank_probabilities, 1))
            # From now on in units of this rank's own softmax; the owner's share is above the floor.
            share = ops.reshape(ops.slice(shares, (0, self.rank), (count, 1)), (-1,))
            target = target / ops.maximum(share, _RANK_FLOOR)
        elif filtered:
            target = uniforms * self.inverse_cdf.totals(probabilities)
        index, chosen = self.inverse_cdf.look_up(probabilities, scaled, target)
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

    def _nucleus_threshold(
        self, scaled: Tensor, probabilities: Tensor, shares: Tensor, largest: Tensor
    ) -> Tensor:
        """The largest t with mass of {scaled > t} at least ``top_p`` of all mass, by bisection, (B, 1)."""
        wanted = self._total(self.row_sum(probabilities, 1), shares) * self.top_p
        low = ops.expand_dims(largest, 1) + _LOWEST
        high = ops.expand_dims(largest, 1) + _HIGHEST
        rows = ops.expand_dims(probabilities, 1)
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

    def _gather(self, x: Tensor) -> Tensor:
        """``x`` (B, n) of every rank, (B, mp, n)."""
        return ops.transpose(self.stack_ranks(x), (1, 0, 2))

    def _gather_one(self, x: Tensor) -> Tensor:
        """``x`` (B,) of every rank, (B, mp)."""
        return ops.transpose(self.stack_ranks(x), (1, 0))

    def _element(self, x: Tensor, index: Tensor) -> Tensor:
        """``x`` (B, n), ``index`` (B,) int32 -> ``x[b, index[b]]`` (B,)."""
        return row_element(x, index, self.row_numbers)


def widen(column: Tensor, columns: int) -> Tensor:
    """``column`` (B, 1) -> (B, columns); on CPU cheaper by far than broadcasting in the operation."""
    return ops.tile(column, (1, columns))


def above(x: Tensor, threshold: Tensor) -> Tensor:
    """1 where ``x`` (B, n) exceeds ``threshold`` (B, 1), else 0, float32; without slow comparisons."""
    return ops.relu(ops.sign(x - widen(threshold, x.shape[1])))


def _inverse_cdf_cell(batch_size: int, vocab: int) -> KernelInverseCDF | PlainInverseCDF:
    on_cpu = ms.get_context("device_target") == "CPU"
    return (kernel_inverse_cdf() if on_cpu else None) or PlainInverseCDF(batch_size, vocab)
