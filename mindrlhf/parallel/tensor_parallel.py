"""Tensor-parallel layers: each holds its own shard and talks to its model-parallel group.

Split as in Megatron-LM (arXiv 1909.08053, section 3). Weights are stored ``(out, in)`` under
MindFormers' names. A cell is built from full sizes; what it holds follows from ``groups.mesh``.
Parameters start at zero and are meant to be loaded; nothing allocates a full tensor.
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

    Args:
        in_features, out_features: full sizes; ``out_features`` must divide by mp.
        groups: the rank's groups.
        has_bias: whether there is a bias (split like the rows).
        compute_dtype: type of the product.
        param_dtype: type of the stored parameters.
        matmul_dtype: of the operands on CPU, see :class:`RowsProduct`.

    Inputs: ``(..., in_features)``, equal on all ranks of the group, already passed through
    :class:`CopyToGroup` (one copy serves several projections of one input).
    Outputs: ``(..., out_features / mp)``, this rank's features.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        groups: Groups,
        *,
        has_bias: bool,
        compute_dtype: ms.dtype,
        param_dtype: ms.dtype,
        matmul_dtype: str = "float32",
    ) -> None:
        super().__init__()
        local_out = exact_div(out_features, groups.mesh.mp, "output features by mp")
        self.has_bias = has_bias
        self.compute_dtype = compute_dtype
        self.product = RowsProduct(compute_dtype, matmul_dtype)
        self.weight = empty_parameter((local_out, in_features), param_dtype, "weight")
        if has_bias:
            self.bias = empty_parameter((local_out,), param_dtype, "bias")
            self.add_bias = AddBias()

    def construct(self, x: Tensor) -> Tensor:
        """``x`` (..., in_features) -> (..., out_features / mp)."""
        y = self.product(x, self.weight)
        if self.has_bias:
            rows = y.reshape((-1, y.shape[-1]))
            y = self.add_bias(rows, ops.cast(self.bias, self.compute_dtype)).reshape(y.shape)
        return y


class RowParallelLinear(nn.Cell):
    """``y = x W^T`` with the columns of ``W`` (input features) split over the group.

    Inputs: ``(..., in_features / mp)``, this rank's features.
    Outputs: ``(..., out_features)``, equal on all ranks.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        groups: Groups,
        *,
        compute_dtype: ms.dtype,
        param_dtype: ms.dtype,
        matmul_dtype: str = "float32",
    ) -> None:
        super().__init__()
        local_in = exact_div(in_features, groups.mesh.mp, "input features by mp")
        self.product = RowsProduct(compute_dtype, matmul_dtype)
        self.weight = empty_parameter((out_features, local_in), param_dtype, "weight")
        self.reduce = ReduceFromGroup(groups.mp_group)

    def construct(self, x: Tensor) -> Tensor:
        """``x`` (..., in_features / mp) -> (..., out_features)."""
        return self.reduce(self.product(x, self.weight))


class VocabParallelEmbedding(nn.Cell):
    """Embedding table with its rows (the vocabulary) split over the group.

    Each rank looks up the ids it holds and gives zeros for the others; the sum over the group is the
    embedding.
    """

    def __init__(self, vocab_size: int, hidden_size: int, groups: Groups, *, param_dtype: ms.dtype) -> None:
        super().__init__()
        self.rows = exact_div(vocab_size, groups.mesh.mp, "vocabulary by mp")
        self.first = groups.mp_index * self.rows
        self.split = groups.mesh.mp > 1
        self.embedding_weight = empty_parameter((self.rows, hidden_size), param_dtype, "embedding_weight")
        self.reduce = ReduceFromGroup(groups.mp_group)

    def construct(self, ids: Tensor) -> Tensor:
        """Token ``ids`` (B, T) int32 in [0, vocab) -> (B, T, H)."""
        if not self.split:
            return ops.gather(self.embedding_weight, ids, 0)
        local, held = local_ids(ids, self.first, self.rows)
        rows = ops.gather(self.embedding_weight, local, 0)
        return self.reduce(rows * ops.expand_dims(ops.cast(held, rows.dtype), -1))


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
    only things exchanged. Computed in float32 whatever the type of the logits.

    Args:
        vocab_size, groups, valid_vocab_size, temperature: see :class:`SamplingLogits`.
        with_entropy: whether to compute the entropy; zeros otherwise.
    """

    def __init__(
        self,
        vocab_size: int,
        groups: Groups,
        *,
        valid_vocab_size: int,
        temperature: float = 1.0,
        with_entropy: bool = True,
    ) -> None:
        super().__init__()
        self.rows = exact_div(vocab_size, groups.mesh.mp, "vocabulary by mp")
        self.first = groups.mp_index * self.rows
        self.with_entropy = with_entropy
        self.sampling_logits = SamplingLogits(
            vocab_size, groups, valid_vocab_size=valid_vocab_size, temperature=temperature
        )
        self.group_max = GroupMax(groups)
        self.reduce = ReduceFromGroup(groups.mp_group)

    def construct(self, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Raw local ``logits`` (B, R, V / mp), ``tokens`` (B, R) -> log-probs, entropy, (B, R) float32."""
        # Rows of one matrix, and the maximum spelled out: on CPU, reductions over more dimensions and
        # broadcasting in an operation are many times slower.
        shape = tokens.shape
        logits = self.sampling_logits(logits.reshape((-1, self.rows)))
        largest = self.group_max(logits.max(axis=-1)).reshape((-1, 1))
        shifted = logits - ops.tile(largest, (1, self.rows))
        exp = ops.exp(shifted)
        total = self.reduce(exp.sum(axis=-1))
        log_total = ops.log(total)
        local, held = local_ids(tokens.reshape((-1, 1)), self.first, self.rows)
        chosen = ops.gather_elements(shifted, 1, local) * ops.cast(held, ms.float32)
        logprobs = self.reduce(chosen.reshape((-1,))) - log_total
        if self.with_entropy:
            entropy = log_total - self.reduce((exp * shifted).sum(axis=-1)) / total
        else:
            entropy = ops.zeros_like(logprobs)
        return logprobs.reshape(shape), entropy.reshape(shape)


PADDED_LOGIT = -1.0e9
"""Added to the logits of ids that no tokenizer makes: their exponential is exactly 0 in float32, and 0 times
it stays 0 in the entropy, which minus infinity would not."""


def local_ids(ids: Tensor, first: int, rows: int) -> tuple[Tensor, Tensor]:
    """Ids as row numbers of the shard ``first .. first + rows - 1`` (clipped), and which of them it holds."""
    local = ids - first
    held = ops.logical_and(local >= 0, local < rows)
    return ops.clip_by_value(local, 0, rows - 1), held
