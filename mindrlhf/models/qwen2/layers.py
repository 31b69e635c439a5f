"""What the training decoder does between its products: norm, rotary positions, SwiGLU, masks.

All of them work on rows of one matrix and, where it saves operations or memory, have their gradient
written out. On CPU, reductions over a matrix are 5 to 20 times faster than over more dimensions, and
equal shapes two to three times faster than broadcast ones.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mindrlhf.configs.keys import ModelConfig
from mindrlhf.kernels.fused_layers import (
    KernelNormalise,
    KernelRotary,
    KernelSoftmax,
    KernelSwiGLU,
    layer_kernels,
)
from mindrlhf.models.dtypes import ms_dtype
from mindrlhf.parallel.groups import Groups
from mindrlhf.utils.sizes import exact_div

MASKED_SCORE = -1.0e9
"""Added to the attention score of a key that must not be seen. Finite, so that a row whose keys are all
masked (a pad) gives a harmless average, not NaN; its exponential is exactly 0 beside any real score."""


class RMSNorm(nn.Cell):
    """``x / sqrt(mean(x^2) + eps) * weight`` (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.compute_dtype = ms_dtype(config.layernorm_compute_type)
        library = layer_kernels(self.compute_dtype)
        eps = config.rms_norm_eps
        self.normalise = KernelNormalise(library, eps) if library else _Normalise(config.hidden_size, eps)

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        """``x`` (n, H), ``weight`` (H,) -> the shape and type of ``x``."""
        weight = ops.cast(weight, self.compute_dtype).reshape((1, -1))
        return ops.cast(self.normalise(ops.cast(x, self.compute_dtype), weight), x.dtype)


class _Normalise(nn.Cell):
    """RMSNorm of rows with its gradient written out, which takes a third of the operations.

    With ``r = 1 / sqrt(mean(x^2) + eps)`` per row: ``y = x r w`` and
    ``dx = dy r w - x r^3 sum(dy w x) / H``, ``dw = sum over rows (dy x r)``. Factors of a row or a column
    are spelled out by an outer product: on CPU that is far cheaper than broadcasting in the operation.
    """

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.inverse_size = 1.0 / hidden_size
        self.size = hidden_size
        self.mean = ops.ReduceMean(keep_dims=True)
        self.matmul = ops.MatMul()
        self.matmul_rows = ops.MatMul(transpose_b=True)
        self.matmul_columns = ops.MatMul(transpose_a=True)

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        """``x`` (n, H), ``weight`` (1, H) of the same type -> (n, H)."""
        scale = ops.rsqrt(self.mean(x * x, -1) + self.eps)
        return x * self.matmul(scale, weight)

    def bprop(self, x: Tensor, weight: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of ``x`` and ``weight``."""
        scale = ops.rsqrt(self.mean(x * x, -1) + self.eps)
        product = dout * x
        along = self.matmul_rows(product, weight) * (scale * scale * scale * self.inverse_size)
        d_x = dout * self.matmul(scale, weight) - x * ops.tile(along, (1, self.size))
        return d_x, self.matmul_columns(scale, product)


def rotary_tables(head_dim: int, length: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of the rotary angles (Su et al., arXiv 2104.09864), half-split as in Qwen2.

    Returns:
        two float32 arrays (length, head_dim); the halves of the last axis are equal.
    """
    frequencies = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    angles = np.outer(np.arange(length, dtype=np.float64), frequencies)
    angles = np.concatenate([angles, angles], axis=-1)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x * cos + rotate_half(x) * sin`` for ``x`` and tables (..., D) of equal shapes."""
    return x * cos + rotate_half(x) * sin


def rotate_half(x: Tensor) -> Tensor:
    """The halves (a, b) of the last axis -> (-b, a)."""
    half = x.shape[-1] // 2
    return ops.concat((-x[..., half:], x[..., :half]), axis=-1)


class Rotary(nn.Cell):
    """:func:`rotate` with its gradient written out: the rotation by the opposite angle."""

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``x`` and tables (n, D) -> (n, D)."""
        return rotate(x, cos, sin)

    def bprop(
        self, x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, dout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient of ``x``; the tables are constants."""
        return dout * cos - rotate_half(dout * sin), ops.zeros_like(cos), ops.zeros_like(sin)


class SwiGLU(nn.Cell):
    """``silu(gate) * up`` with its gradient written out; it keeps only the two inputs."""

    def construct(self, gate: Tensor, up: Tensor) -> Tensor:
        """``gate`` and ``up`` of equal shapes -> the same shape."""
        return gate * ops.sigmoid(gate) * up

    def bprop(self, gate: Tensor, up: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of ``gate`` and ``up``: ``up silu' = s up + (1 - s) out`` with ``s = sigmoid(gate)``."""
        sigmoid = ops.sigmoid(gate)
        return dout * (sigmoid * (up - out) + out), dout * (gate * sigmoid)


class MaskedSoftmax(nn.Cell):
    """Softmax of attention scores plus an additive attention mask."""

    def __init__(self) -> None:
        super().__init__()
        self.softmax = Softmax()

    def construct(self, scores: Tensor, attention_mask: Tensor) -> Tensor:
        """``scores`` (B * heads * Q, T), ``attention_mask`` (B * heads, Q, T) -> the shape of the scores."""
        return self.softmax(scores + attention_mask.reshape(scores.shape))


class Softmax(nn.Cell):
    """Softmax of rows with its gradient ``dx = y (dy - sum(dy y))`` written out.

    MindSpore's own broadcasts the sum, for which its CPU kernel keeps 16 bytes per element as long as the
    graph lives.
    """

    def construct(self, x: Tensor) -> Tensor:
        """``x`` (n, k) -> the same shape and type, each row with sum 1."""
        return ops.softmax(x, axis=-1)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        """Gradient of ``x``."""
        product = dout * out
        total = product.sum(axis=-1, keepdims=True)
        return (product - out * ops.tile(total, (1, x.shape[-1])),)


def masked_softmax(dtype: ms.dtype) -> nn.Cell:
    """The implementation for this device, with attention scores in ``dtype``."""
    library = layer_kernels(dtype)
    return KernelSoftmax(library) if library else MaskedSoftmax()


def rotary(dtype: ms.dtype) -> nn.Cell:
    """The implementation for this device, with rotary positions in ``dtype``."""
    library = layer_kernels(dtype)
    return KernelRotary(library) if library else Rotary()


def swiglu(dtype: ms.dtype) -> nn.Cell:
    """The implementation for this device, with the feed-forward's inner features in ``dtype``."""
    library = layer_kernels(dtype)
    return KernelSwiGLU(library) if library else SwiGLU()


class Reorder(nn.Cell):
    """Rows of a matrix in another order; its gradient puts them back.

    It swaps heads with columns: a row is copied whole, while CPU's transpose copies elements and keeps 8
    bytes for each as long as the graph lives.
    """

    def construct(self, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        """Row ``order[i]`` of ``x`` (n, k) as row ``i``; ``back`` is the inverse, both (n,) int32."""
        return ops.gather(x, order, 0)

    def bprop(
        self, x: Tensor, order: Tensor, back: Tensor, out: Tensor, dout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient of ``x``; the permutations are constants."""
        return ops.gather(dout, back, 0), ops.zeros_like(order), ops.zeros_like(back)


def transposed_rows(batch: int, first: int, second: int) -> Tensor:
    """Row numbers of (batch, first, second) in the order (batch, second, first), (n,) int32."""
    rows = ops.arange(batch * first * second).reshape((batch, first, second))
    return ops.cast(ops.transpose(rows, (0, 2, 1)).reshape((-1,)), ms.int32)


class SharedInputs(nn.Cell):
    """What all layers need of a batch: the attention mask, and cos and sin of the positions.

    Spelled out in full, once per pass: on CPU, adding and multiplying equal shapes is far cheaper than
    broadcasting, and every layer does it.
    """

    def __init__(self, config: ModelConfig, groups: Groups) -> None:
        super().__init__()
        cos, sin = rotary_tables(config.head_dim, config.seq_length, config.theta)
        dtype = ms_dtype(config.rotary_dtype)
        self.cos_table = Tensor(cos).astype(dtype)
        self.sin_table = Tensor(sin).astype(dtype)
        self.softmax_dtype = ms_dtype(config.softmax_compute_type)
        self.flash = config.use_flash_attention
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        self.kv_heads = exact_div(config.n_kv_heads, groups.mesh.mp, "key/value heads by mp")
        self.heads = self.kv_heads * config.queries_per_kv_head
        self.mask_heads = 1 if layer_kernels(self.softmax_dtype) else self.heads

    def construct(self, valid: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        """From (B, T) int32 each.

        Returns:
            what is added to the scores, (B * heads * T, T), or (B * T, T) where a kernel knows the heads, 0
            or ``MASKED_SCORE`` (with flash attention (B, 1, T, T), 1 at hidden keys); cos and sin of the
            queries (B * T * heads, D), which carry the scale 1 / sqrt(D) of the scores; cos and sin of the
            keys (B * T * kv heads, D).
        """
        attention_mask = causal_padding_mask(valid, self.softmax_dtype)
        if not self.flash:
            attention_mask = ops.tile(attention_mask * MASKED_SCORE, (1, self.mask_heads, 1, 1))
            attention_mask = attention_mask.reshape((-1, valid.shape[1]))
        flat = position_ids.reshape((-1,))
        cos, sin = ops.gather(self.cos_table, flat, 0), ops.gather(self.sin_table, flat, 0)
        return (
            attention_mask,
            self._for_heads(cos * self.scale, self.heads),
            self._for_heads(sin * self.scale, self.heads),
            self._for_heads(cos, self.kv_heads),
            self._for_heads(sin, self.kv_heads),
        )

    def _for_heads(self, table: Tensor, heads: int) -> Tensor:
        """(B * T, D) -> (B * T * heads, D)."""
        return ops.tile(table, (1, heads)).reshape((-1, self.head_dim))


def causal_padding_mask(valid: Tensor, dtype: ms.dtype) -> Tensor:
    """Which keys a query must not see: later ones and pads.

    Args:
        valid: (B, T) int32, 1 on real tokens.
        dtype: type of the result.

    Returns:
        (B, 1, T, T), 1 where key ``k`` is hidden from query ``q``, else 0.
    """
    columns = ops.arange(valid.shape[1])
    later = ops.expand_dims(columns, 0) > ops.expand_dims(columns, 1)
    padding = ops.expand_dims(valid == 0, 1)
    return ops.cast(ops.expand_dims(ops.logical_or(ops.expand_dims(later, 0), padding), 1), dtype)
