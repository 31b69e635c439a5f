"""The Qwen2 decoder on tensor-parallel layers, for training and for scoring whole sequences.

Grouped-query attention with rotary positions, RMSNorm and a SwiGLU feed-forward (Qwen2 technical
report, arXiv 2407.10671). Cells are nested so that parameter names are the canonical ones of
:mod:`mindrlhf.parallel.parameters`. Generation has its own network, :mod:`mindrlhf.models.infer`.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mindrlhf.configs.schema import ModelConfig
from mindrlhf.models.dtypes import ms_dtype
from mindrlhf.parallel.collectives import CopyToGroup
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    empty_parameter,
)
from mindrlhf.utils.sizes import exact_div

MASKED_SCORE = -1.0e9
"""Added to the attention score of a key that must not be seen. Finite, so that a row whose keys are all
masked (a pad) gives a harmless average and not NaN; its exponential is exactly 0 beside any real score."""


class RMSNorm(nn.Cell):
    """``x / sqrt(mean(x^2) + eps) * weight`` in ``compute_dtype`` (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, hidden_size: int, eps: float, compute_dtype: ms.dtype, param_dtype: ms.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.compute_dtype = compute_dtype
        self.weight = empty_parameter((hidden_size,), param_dtype, "weight")

    def construct(self, x: Tensor) -> Tensor:
        """``x`` (..., H) -> the same shape and type."""
        wide = ops.cast(x, self.compute_dtype)
        wide = wide * ops.rsqrt(ops.square(wide).mean(axis=-1, keep_dims=True) + self.eps)
        return ops.cast(wide * ops.cast(self.weight, self.compute_dtype), x.dtype)


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
    """``x * cos + rotate_half(x) * sin`` for ``x`` (B, heads, T, D) and tables (B, 1, T, D)."""
    half = x.shape[-1] // 2
    rotated = ops.concat((-x[..., half:], x[..., :half]), axis=-1)
    return x * cos + rotated * sin


class Attention(nn.Cell):
    """Causal grouped-query attention; query and key/value heads are split over the group.

    Query heads of one key/value head are laid out as extra rows of one batched product, so keys and
    values are never repeated in memory.
    """

    def __init__(self, config: ModelConfig, groups: Groups) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.kv_heads = exact_div(config.n_kv_heads, groups.mesh.mp, "key/value heads by mp")
        self.group_size = config.queries_per_kv_head
        self.compute_dtype = ms_dtype(config.compute_dtype)
        self.softmax_dtype = ms_dtype(config.softmax_compute_type)
        self.rotary_dtype = ms_dtype(config.rotary_dtype)
        self.scale = self.head_dim**-0.5
        self.flash = config.use_flash_attention
        heads, hidden = config.num_heads, config.hidden_size

        def projection(heads_out: int) -> ColumnParallelLinear:
            return ColumnParallelLinear(
                hidden,
                heads_out * self.head_dim,
                groups,
                has_bias=config.qkv_has_bias,
                compute_dtype=self.compute_dtype,
                param_dtype=ms_dtype(config.param_init_type),
            )

        self.copy_to_group = CopyToGroup(groups.mp_group)
        self.wq = projection(heads)
        self.wk = projection(config.n_kv_heads)
        self.wv = projection(config.n_kv_heads)
        self.wo = RowParallelLinear(
            heads * self.head_dim,
            hidden,
            groups,
            compute_dtype=self.compute_dtype,
            param_dtype=ms_dtype(config.param_init_type),
        )

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor, masked: Tensor) -> Tensor:
        """``x`` (B, T, H), tables (B, 1, T, D), ``masked`` (B, 1, T, T), 1 at hidden keys -> (B, T, H)."""
        batch, length = x.shape[0], x.shape[1]
        x = self.copy_to_group(x)
        query = self._heads(self.wq(x), self.kv_heads * self.group_size)
        key = self._heads(self.wk(x), self.kv_heads)
        value = self._heads(self.wv(x), self.kv_heads)
        query = ops.cast(rotate(ops.cast(query, self.rotary_dtype), cos, sin), self.compute_dtype)
        key = ops.cast(rotate(ops.cast(key, self.rotary_dtype), cos, sin), self.compute_dtype)
        if self.flash:
            mixed = self._flash(query, key, value, masked)
        else:
            mixed = self._plain(query, key, value, masked)
        return self.wo(ops.transpose(mixed, (0, 2, 1, 3)).reshape((batch, length, -1)))

    def _heads(self, x: Tensor, heads: int) -> Tensor:
        """(B, T, heads * D) -> (B, heads, T, D)."""
        return ops.transpose(x.reshape((x.shape[0], x.shape[1], heads, self.head_dim)), (0, 2, 1, 3))

    def _plain(self, query: Tensor, key: Tensor, value: Tensor, masked: Tensor) -> Tensor:
        """Attention from plain operators: (B, heads, T, D) and (B, kv heads, T, D) -> (B, heads, T, D)."""
        batch, heads, length, dim = query.shape
        rows = (batch * self.kv_heads, self.group_size * length, dim)
        keys = (batch * self.kv_heads, length, dim)
        scores = ops.BatchMatMul(transpose_b=True)(query.reshape(rows), key.reshape(keys))
        scores = ops.cast(scores.reshape((batch, heads, length, length)), self.softmax_dtype)
        weights = ops.softmax(scores * self.scale + masked * MASKED_SCORE, axis=-1)
        weights = ops.cast(weights, self.compute_dtype).reshape((*rows[:2], length))
        return ops.BatchMatMul()(weights, value.reshape(keys)).reshape(query.shape)

    def _flash(self, query: Tensor, key: Tensor, value: Tensor, masked: Tensor) -> Tensor:
        """Attention by the Ascend kernel (FlashAttention, arXiv 2205.14135); there is none on CPU."""
        return ops.flash_attention_score(
            query,
            key,
            value,
            query.shape[1],
            attn_mask=ops.cast(masked, ms.uint8),
            scalar_value=self.scale,
            input_layout="BNSD",
        )


class FeedForward(nn.Cell):
    """SwiGLU: ``w2(silu(w1 x) * w3 x)`` (Shazeer, arXiv 2002.05202), inner features split over the group."""

    def __init__(self, config: ModelConfig, groups: Groups) -> None:
        super().__init__()
        dtypes = {
            "compute_dtype": ms_dtype(config.compute_dtype),
            "param_dtype": ms_dtype(config.param_init_type),
        }
        hidden, inner = config.hidden_size, config.intermediate_size
        self.copy_to_group = CopyToGroup(groups.mp_group)
        self.w1 = ColumnParallelLinear(hidden, inner, groups, has_bias=False, **dtypes)
        self.w3 = ColumnParallelLinear(hidden, inner, groups, has_bias=False, **dtypes)
        self.w2 = RowParallelLinear(inner, hidden, groups, **dtypes)

    def construct(self, x: Tensor) -> Tensor:
        """``x`` (B, T, H) -> (B, T, H)."""
        x = self.copy_to_group(x)
        gate = self.w1(x)
        return self.w2(gate * ops.sigmoid(gate) * self.w3(x))


class DecoderLayer(nn.Cell):
    """Pre-norm residual block: attention, then feed-forward."""

    def __init__(self, config: ModelConfig, groups: Groups) -> None:
        super().__init__()
        norm = (
            config.hidden_size,
            config.rms_norm_eps,
            ms_dtype(config.layernorm_compute_type),
            ms_dtype(config.param_init_type),
        )
        self.attention_norm = RMSNorm(*norm)
        self.attention = Attention(config, groups)
        self.ffn_norm = RMSNorm(*norm)
        self.feed_forward = FeedForward(config, groups)

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor, masked: Tensor) -> Tensor:
        """``x`` (B, T, H) -> (B, T, H)."""
        x = x + self.attention(self.attention_norm(x), cos, sin, masked)
        return x + self.feed_forward(self.ffn_norm(x))


class Qwen2Decoder(nn.Cell):
    """Token ids to final hidden states.

    Args:
        config: model sizes and types; ``config.seq_length`` bounds the positions.
        groups: this rank's groups in the model's mesh.
    """

    def __init__(self, config: ModelConfig, groups: Groups) -> None:
        super().__init__()
        self.compute_dtype = ms_dtype(config.compute_dtype)
        self.tok_embeddings = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, groups, param_dtype=ms_dtype(config.param_init_type)
        )
        self.layers = nn.CellList([DecoderLayer(config, groups) for _ in range(config.num_layers)])
        self.norm_out = RMSNorm(
            config.hidden_size,
            config.rms_norm_eps,
            ms_dtype(config.layernorm_compute_type),
            ms_dtype(config.param_init_type),
        )
        cos, sin = rotary_tables(config.head_dim, config.seq_length, config.theta)
        rotary_dtype = ms_dtype(config.rotary_dtype)
        self.cos_table = Tensor(cos).astype(rotary_dtype)
        self.sin_table = Tensor(sin).astype(rotary_dtype)
        self.softmax_dtype = ms_dtype(config.softmax_compute_type)

    def construct(self, tokens: Tensor, valid: Tensor, position_ids: Tensor) -> Tensor:
        """Hidden states after the last norm.

        Args:
            tokens: (B, T) int32 ids.
            valid: (B, T) int32, 1 on real tokens, 0 on padding (from lengths, never from ids).
            position_ids: (B, T) int32, 0 at a row's first real token.

        Returns:
            (B, T, H) in the compute type; what stands at pads is finite and meaningless.
        """
        cos = ops.expand_dims(ops.gather(self.cos_table, position_ids, 0), 1)
        sin = ops.expand_dims(ops.gather(self.sin_table, position_ids, 0), 1)
        masked = hidden_keys(valid, self.softmax_dtype)
        x = ops.cast(self.tok_embeddings(tokens), self.compute_dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, masked)
        return self.norm_out(x)


def hidden_keys(valid: Tensor, dtype: ms.dtype) -> Tensor:
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
