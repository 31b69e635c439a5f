"""Tensor-parallel layers: each works on its own shard and talks to its model-parallel group.

Split as in Megatron-LM (arXiv 1909.08053, section 3). Weights are stored ``(out, in)``. Cells hold none: they
take this rank's shards as inputs, so that one compiled graph serves all layers of a kind.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

from mindrlhf.kernels.bf16_products import bfloat16_rows_product
from mindrlhf.parallel.collectives import GroupMax, ReduceFromGroup
from mindrlhf.parallel.groups import Groups
from mindrlhf.utils.sizes import exact_div


def empty_parameter(
    shape: tuple[int, ...], dtype: ms.dtype, name: str, *, trainable: bool = True
) -> Parameter:
    """A parameter of zeros, to be overwritten by a checkpoint."""
    return Parameter(initializer("zeros", shape, dtype), name=name, requires_grad=trainable)


class RowsProduct(nn.Cell):
    """``x W^T`` as one two-dimensional product.

    Args:
        compute_dtype: type of the product.
        matmul_dtype: ``"bfloat16"``: operands are rounded to it on CPU while everything else is float32.
    """

    def __init__(self, compute_dtype: ms.dtype, matmul_dtype: str = "float32") -> None:
        super().__init__()
        self.compute_dtype = compute_dtype
        rounded = matmul_dtype == "bfloat16"
        self.product = bfloat16_rows_product() if rounded else ops.MatMul(transpose_b=True)

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        """``x`` (..., in), ``weight`` (out, in) -> (..., out)."""
        shape = x.shape
        flat = ops.cast(x.reshape((-1, shape[-1])), self.compute_dtype)
        product = self.product(flat, ops.cast(weight, self.compute_dtype))
        return product.reshape((*shape[:-1], weight.shape[0]))


class AddBias(nn.Cell):
    """A bias added to each row; its gradient is a sum, in a sixth of the time of BiasAddGrad on CPU.

    Not by broadcasting, which keeps 16 bytes per element on CPU as long as the graph lives.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bias_add = ops.BiasAdd()

    def construct(self, x: Tensor, bias: Tensor) -> Tensor:
        """``x`` (n, k), ``bias`` (k,) of the same type -> (n, k)."""
        return self.bias_add(x, bias)

    def bprop(self, x: Tensor, bias: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of ``x`` and ``bias``."""
        return dout, dout.sum(axis=0)


class ColumnParallelLinear(nn.Cell):
    """``y = x W^T + b`` with the rows of ``W`` (output features) split over the group.

    Its input has passed :class:`CopyToGroup`; one copy serves several projections of one input.

    Args:
        compute_dtype: type of the product.
        matmul_dtype: of the operands on CPU, see :class:`RowsProduct`.
    """

    def __init__(self, compute_dtype: ms.dtype, matmul_dtype: str = "float32") -> None:
        super().__init__()
        self.compute_dtype = compute_dtype
        self.product = RowsProduct(compute_dtype, matmul_dtype)
        self.add_bias = AddBias()

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x`` (n, in), ``weight`` (out / mp, in), ``bias`` (out / mp,) -> (n, out / mp)."""
        y = self.product(x, weight)
        if bias is not None:
            y = self.add_bias(y, ops.cast(bias, self.compute_dtype))
        return y


class RowParallelLinear(nn.Cell):
    """``y = x W^T`` with the columns of ``W`` (input features) split over the group."""

    def __init__(self, groups: Groups, compute_dtype: ms.dtype, matmul_dtype: str = "float32") -> None:
        super().__init__()
        self.product = RowsProduct(compute_dtype, matmul_dtype)
        self.reduce = ReduceFromGroup(groups.mp_group)

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        """``x`` (n, in / mp), ``weight`` (out, in / mp) -> (n, out), equal on all ranks of the group."""
        return self.reduce(self.product(x, weight))


class VocabParallelEmbedding(nn.Cell):
    """Embedding table with its rows (the vocabulary) split over the group.

    Each rank looks up the ids it holds and gives zeros for the others; the sum over the group is the
    embedding.
    """

    def __init__(self, vocab_size: int, groups: Groups, compute_dtype: ms.dtype) -> None:
        super().__init__()
        self.rows = exact_div(vocab_size, groups.mesh.mp, "vocabulary by mp")
        self.first = groups.mp_index * self.rows
        self.split = groups.mesh.mp > 1
        self.compute_dtype = compute_dtype
        self.reduce = ReduceFromGroup(groups.mp_group)

    def construct(self, ids: Tensor, weight: Tensor) -> Tensor:
        """``ids`` (B, T) int32 in [0, vocab), ``weight`` (V / mp, H) -> (B * T, H) in the compute type."""
        ids = ids.reshape((-1,))
        if not self.split:
            return ops.cast(ops.gather(weight, ids, 0), self.compute_dtype)
        local, held = local_ids(ids, self.first, self.rows)
        rows = ops.gather(weight, local, 0)
        found = self.reduce(rows * ops.expand_dims(ops.cast(held, rows.dtype), -1))
        return ops.cast(found, self.compute_dtype)


class SamplingLogits(nn.Cell):
    """Logits of the distribution that tokens are drawn from; the one place where temperature is applied.

    Args:
        vocab_size: full number of logits, padded rows included.
        groups: the rank's groups.
        valid_vocab_size: ids from this one on pad the vocabulary: they have probability 0.
        temperature: divides the logits.
    """

    def __init__(
        self, vocab_size: int, groups: Groups, *, valid_vocab_size: int, temperature: float = 1.0
    ) -> None:
        super().__init__()
        rows = exact_div(vocab_size, groups.mesh.mp, "vocabulary by mp")
        ids = np.arange(groups.mp_index * rows, (groups.mp_index + 1) * rows)
        self.inverse_temperature = 1.0 / temperature
        self.has_padding = bool(ids[-1] >= valid_vocab_size)
        self.padding_bias = Tensor(np.where(ids < valid_vocab_size, 0.0, PADDED_LOGIT).astype(np.float32))

    def construct(self, logits: Tensor) -> Tensor:
        """This rank's raw ``logits`` (n, V / mp) of any type -> (n, V / mp) float32."""
        logits = ops.cast(logits, ms.float32)
        if self.inverse_temperature != 1.0:
            logits = logits * self.inverse_temperature
        if self.has_padding:
            logits = logits + self.padding_bias
        return logits


class VocabParallelLogProbs(nn.Cell):
    """Log-probability of given tokens, and entropy, from logits whose vocabulary is split over the group.

    No rank sees another's logits: the maximum, the sum of exponentials and the chosen logit are the
    only things exchanged. Computed in float32 whatever the type of the logits. With ``z`` the logits of a
    row, ``p`` their softmax and ``H`` its entropy, ``d log p_t / dz = 1_t - p`` and
    ``dH / dz = -p (log p + H)``; nothing but the logits is kept for it.

    Args:
        vocab_size, groups, valid_vocab_size, temperature: see :class:`SamplingLogits`.
        with_entropy: whether to compute the entropy; zeros otherwise.
        entropy_gradient: whether the entropy has a gradient.
    """

    def __init__(
        self,
        vocab_size: int,
        groups: Groups,
        *,
        valid_vocab_size: int,
        temperature: float = 1.0,
        with_entropy: bool = True,
        entropy_gradient: bool = False,
    ) -> None:
        super().__init__()
        self.rows = exact_div(vocab_size, groups.mesh.mp, "vocabulary by mp")
        self.first = groups.mp_index * self.rows
        self.with_entropy, self.entropy_gradient = with_entropy, entropy_gradient
        self.sampling_logits = SamplingLogits(
            vocab_size, groups, valid_vocab_size=valid_vocab_size, temperature=temperature
        )
        self.largest = ops.ReduceMax()
        self.group_max = GroupMax(groups)
        self.reduce = ReduceFromGroup(groups.mp_group)

    def construct(self, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Raw local ``logits`` (n, V / mp), ``tokens`` (n,) int32 -> log-probs, entropy, (n,) float32."""
        shifted, exp, total = self._exponentials(logits)
        log_total = ops.log(total)
        local, held = local_ids(tokens.reshape((-1, 1)), self.first, self.rows)
        chosen = ops.gather_elements(shifted, 1, local) * ops.cast(held, ms.float32)
        logprobs = self.reduce(chosen.reshape((-1,))) - log_total
        if not self.with_entropy:
            return logprobs, ops.zeros_like(logprobs)
        return logprobs, log_total - self.reduce((exp * shifted).sum(axis=-1)) / total

    def gradient(self, logits: Tensor, tokens: Tensor, of_logprobs: Tensor, of_entropy: Tensor) -> Tensor:
        """The gradient of ``logits``, (n, V / mp), from those of the results, (n,) each."""
        shifted, exp, total = self._exponentials(logits)
        per_row = -of_logprobs
        if self.entropy_gradient:
            log_total = ops.log(total)
            entropy = log_total - self.reduce((exp * shifted).sum(axis=-1)) / total
            # p (-dH (H - log total)) - p dH shifted = -dH p (log p + H)
            per_row = per_row - of_entropy * (entropy - log_total)
            spread = ops.tile(of_entropy.reshape((-1, 1)), (1, self.rows))
            exp_share = exp * ops.tile((1.0 / total).reshape((-1, 1)), (1, self.rows))
            gradient = exp_share * (ops.tile(per_row.reshape((-1, 1)), (1, self.rows)) - shifted * spread)
        else:
            gradient = exp * ops.tile((per_row / total).reshape((-1, 1)), (1, self.rows))
        local, held = local_ids(tokens.reshape((-1, 1)), self.first, self.rows)
        chosen = of_logprobs.reshape((-1, 1)) * ops.cast(held, ms.float32)
        gradient = ops.tensor_scatter_elements(gradient, local, chosen, 1, "add")
        if self.sampling_logits.inverse_temperature != 1.0:
            gradient = gradient * self.sampling_logits.inverse_temperature
        return ops.cast(gradient, logits.dtype)

    def _exponentials(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits minus their row's maximum, their exponentials (n, V / mp), and the sums of these (n,)."""
        # The maximum is spelled out: on CPU, broadcasting in an operation is many times slower.
        logits = self.sampling_logits(logits)
        largest = self.group_max(self.largest(logits, -1)).reshape((-1, 1))
        shifted = logits - ops.tile(largest, (1, self.rows))
        exp = ops.exp(shifted)
        return shifted, exp, self.reduce(exp.sum(axis=-1))


PADDED_LOGIT = -1.0e9
"""Added to the logits of ids that no tokenizer makes: their exponential is exactly 0 in float32, and 0 times
it stays 0 in the entropy, which minus infinity would not."""


def local_ids(ids: Tensor, first: int, rows: int) -> tuple[Tensor, Tensor]:
    """Ids as row numbers of the shard ``first .. first + rows - 1`` (clipped), and which of them it holds."""
    local = ids - first
    held = ops.logical_and(local >= 0, local < rows)
    return ops.clip_by_value(local, 0, rows - 1), held
