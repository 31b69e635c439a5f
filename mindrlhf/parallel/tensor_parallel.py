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
from mindrlhf.kernels.log_probs import KernelLogitSums, logits_library
from mindrlhf.parallel.collectives import GroupMax, ReduceFromGroup, behind_rows
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

    Its input has passed :func:`before_columns`; one copy serves several projections of one input.

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
        self.reduce = behind_rows(groups)

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        """``x`` (n, in / mp), ``weight`` (out, in / mp) -> (n, out), or this rank's rows of it."""
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
        self.reduce = behind_rows(groups)

    def construct(self, ids: Tensor, weight: Tensor) -> Tensor:
        """``ids`` (B, T) int32 in [0, vocab), ``weight`` (V / mp, H) -> (B * T, H) in the compute type.

        Where rows are split, this rank's of them.
        """
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


class LogitSums(nn.Cell):
    """Sums over the columns of logits, each times ``scale``, without those behind the first ``columns``."""

    def __init__(self, scale: float, columns: int, size: int) -> None:
        super().__init__()
        self.scale, self.size, self.is_padded = scale, size, columns < size
        real = np.arange(size) < columns
        self.padding_bias = Tensor(np.where(real, 0.0, PADDED_LOGIT).astype(np.float32))
        self.largest = ops.ReduceMax()

    def construct(self, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``logits`` (n, k), column numbers ``tokens`` (n,) int32, for ``x`` the scaled logits.

        Returns:
            four (n,) float32: the largest ``x``, the sums of ``exp(x - largest)`` and of
            ``exp(x - largest) (x - largest)``, and the ``x`` of the token.
        """
        x = self._scaled(logits)
        # Spelled out: on CPU, broadcasting in an operation is many times slower.
        largest = self.largest(x, -1)
        shifted = x - ops.tile(largest.reshape((-1, 1)), (1, self.size))
        exp = ops.exp(shifted)
        chosen = ops.gather_elements(x, 1, tokens.reshape((-1, 1))).reshape((-1,))
        return largest, exp.sum(axis=-1), (exp * shifted).sum(axis=-1), chosen

    def gradient(
        self,
        logits: Tensor,
        tokens: Tensor,
        largest: Tensor,
        inverse_total: Tensor,
        constant: Tensor,
        slope: Tensor,
        of_token: Tensor,
    ) -> Tensor:
        """``scale (p (constant - slope (x - largest)) + of_token at the token)``, (n, k) in their type.

        ``p`` is ``exp(x - largest) inverse_total``; all but the first two are (n,).
        """
        shifted = self._scaled(logits) - self._tiled(largest)
        p = ops.exp(shifted) * self._tiled(inverse_total)
        gradient = p * (self._tiled(constant) - shifted * self._tiled(slope))
        tokens, of_token = tokens.reshape((-1, 1)), of_token.reshape((-1, 1))
        gradient = ops.tensor_scatter_elements(gradient, tokens, of_token, 1, "add")
        return ops.cast(gradient * self.scale, logits.dtype)

    def _scaled(self, logits: Tensor) -> Tensor:
        x = ops.cast(logits, ms.float32) * self.scale
        return x + self.padding_bias if self.is_padded else x

    def _tiled(self, of_row: Tensor) -> Tensor:
        return ops.tile(of_row.reshape((-1, 1)), (1, self.size))


class VocabParallelLogProbs(nn.Cell):
    """Log-probability of given tokens, and entropy, from logits whose vocabulary is split over the group.

    No rank sees another's logits: four sums per row are the only things exchanged. Computed in float32
    whatever the type of the logits.

    Args:
        vocab_size: full number of logits, padded rows included.
        groups: the rank's groups.
        valid_vocab_size: ids from this one on pad the vocabulary: they have probability 0.
        temperature: divides the logits.
        with_entropy: whether the entropy is wanted; zeros otherwise.
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
        columns = min(max(valid_vocab_size - self.first, 0), self.rows)
        library = logits_library()
        if library:
            self.sums = KernelLogitSums(library, 1.0 / temperature, columns)
        else:
            self.sums = LogitSums(1.0 / temperature, columns, self.rows)
        self.group_max = GroupMax(groups)
        self.reduce = ReduceFromGroup(groups.mp_group)

    def construct(self, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Raw local ``logits`` (n, V / mp), ``tokens`` (n,) int32 -> log-probs, entropy, (n,) float32."""
        _, total, weighted, chosen = self._of_group(logits, tokens)
        log_total = ops.log(total)
        entropy = log_total - weighted / total if self.with_entropy else ops.zeros_like(chosen)
        return chosen - log_total, entropy

    def gradient(self, logits: Tensor, tokens: Tensor, of_logprobs: Tensor, of_entropy: Tensor) -> Tensor:
        """The gradient of ``logits``, (n, V / mp), from those of the results, (n,) each.

        With ``p`` the softmax of ``x`` and ``H`` its entropy, ``d log p_t / dx = 1_t - p`` and
        ``dH / dx = -p (log p + H)``.
        """
        largest, total, weighted, _ = self._of_group(logits, tokens)
        constant, slope = -of_logprobs, ops.zeros_like(of_logprobs)
        if self.with_entropy:  # log p + H = x - largest - weighted / total
            constant, slope = constant + of_entropy * weighted / total, of_entropy
        local, held = local_ids(tokens, self.first, self.rows)
        of_token = of_logprobs * ops.cast(held, ms.float32)
        return self.sums.gradient(logits, local, largest, 1.0 / total, constant, slope, of_token)

    def _of_group(self, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The sums over the whole vocabulary, relative to its largest logit, as the chosen logit is, too."""
        local, held = local_ids(tokens, self.first, self.rows)
        own, total, weighted, chosen = self.sums(logits, local)
        largest = self.group_max(own)
        below = own - largest
        factor = ops.exp(below)
        weighted = self.reduce((weighted + total * below) * factor)
        chosen = self.reduce((chosen - largest) * ops.cast(held, ms.float32))
        return largest, self.reduce(total * factor), weighted, chosen


PADDED_LOGIT = -1.0e9
"""Added to the logits of ids that no tokenizer makes: their exponential is exactly 0 in float32, and 0 times
it stays 0 in the entropy, which minus infinity would not."""


def local_ids(ids: Tensor, first: int, rows: int) -> tuple[Tensor, Tensor]:
    """Ids as row numbers of the shard ``first .. first + rows - 1`` (clipped), and which of them it holds."""
    local = ids - first
    held = ops.logical_and(local >= 0, local < rows)
    return ops.clip_by_value(local, 0, rows - 1), held
