"""The Qwen2 decoder on tensor-parallel layers, for training and for scoring whole sequences.

Grouped-query attention with rotary positions, RMSNorm and a SwiGLU feed-forward (Qwen2 technical
report, arXiv 2407.10671). Cells are nested so that parameter names are the canonical ones of
:mod:`mindrlhf.models.qwen2.layouts`. Generation has its own network in
:mod:`mindrlhf.models.qwen2.generator_network`.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import Tensor, nn, ops

from mindrlhf.configs.keys import ModelConfig
from mindrlhf.models.dtypes import ms_dtype
from mindrlhf.models.qwen2.layers import (
    Columns,
    Reorder,
    RMSNorm,
    SharedInputs,
    masked_softmax,
    rotary,
    swiglu,
    take_columns,
    transposed_rows,
)
from mindrlhf.parallel.collectives import CopyToGroup
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from mindrlhf.utils.sizes import exact_div


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
        self.rotary = rotary(self.rotary_dtype)
        self.reorder = Reorder()
        self.softmax = masked_softmax(self.softmax_dtype)
        self.flash = config.use_flash_attention
        heads, hidden_size = config.num_heads, config.hidden_size

        def projection(heads_out: int) -> ColumnParallelLinear:
            return ColumnParallelLinear(
                hidden_size,
                heads_out * self.head_dim,
                groups,
                has_bias=config.qkv_has_bias,
                compute_dtype=self.compute_dtype,
                param_dtype=ms_dtype(config.param_init_type),
                matmul_dtype=config.matmul_dtype,
            )

        self.copy_to_group = CopyToGroup(groups.mp_group)
        self.wq = projection(heads)
        self.wk = projection(config.n_kv_heads)
        self.wv = projection(config.n_kv_heads)
        self.wo = RowParallelLinear(
            heads * self.head_dim,
            hidden_size,
            groups,
            compute_dtype=self.compute_dtype,
            param_dtype=ms_dtype(config.param_init_type),
            matmul_dtype=config.matmul_dtype,
        )

    def construct(
        self, x: Tensor, columns: Columns | None, attention_mask: Tensor, *tables: Tensor
    ) -> Tensor:
        """Attention of the queries of all columns, or of some.

        Args:
            x: (B * T, H).
            columns: of the queries, Q of them; ``None``: all T.
            attention_mask, tables: of :class:`SharedInputs`, those of the queries cut to their columns.

        Returns:
            (B * Q, H).
        """
        query_cos, query_sin, key_cos, key_sin = tables
        x = self.copy_to_group(x)
        length = attention_mask.shape[-1]
        query_rows = x if columns is None else take_columns(x, length, columns)
        query_length = length if columns is None else columns[1] - columns[0]
        query = self._apply_rotary(self.wq(query_rows), query_cos, query_sin)
        key = self._apply_rotary(self.wk(x), key_cos, key_sin)
        heads = self.kv_heads * self.group_size
        query = self._transpose(query, query_length, heads)
        key = self._transpose(key, length, self.kv_heads)
        value = self._transpose(self.wv(x), length, self.kv_heads)
        attend = self._flash if self.flash else self._plain
        mixed = self._transpose(attend(query, key, value, query_length, attention_mask), heads, query_length)
        return self.wo(mixed.reshape((query_rows.shape[0], -1)))

    def _apply_rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary positions of (B * T, heads * D), head by head."""
        rotated = self.rotary(ops.cast(x, self.rotary_dtype).reshape((-1, self.head_dim)), cos, sin)
        return ops.cast(rotated, self.compute_dtype).reshape(x.shape)

    def _transpose(self, x: Tensor, first: int, second: int) -> Tensor:
        """Vectors in the order (B, first, second), of any shape -> (B * second * first, D)."""
        rows = x.reshape((-1, self.head_dim))
        batch = rows.shape[0] // (first * second)
        return self.reorder(
            rows, transposed_rows(batch, first, second), transposed_rows(batch, second, first)
        )

    def _plain(
        self, query: Tensor, key: Tensor, value: Tensor, query_length: int, attention_mask: Tensor
    ) -> Tensor:
        """By plain operators: (B * heads * Q, D), twice (B * kv heads * T, D) -> (B * kv heads, ..., D)."""
        length = attention_mask.shape[-1]
        grouped = (-1, self.group_size * query_length, self.head_dim)
        keys = (-1, length, self.head_dim)
        scores = ops.BatchMatMul(transpose_b=True)(query.reshape(grouped), key.reshape(keys))
        # Rows of one matrix: reductions on CPU are many times slower over more dimensions.
        rows = ops.cast(scores.reshape((-1, length)), self.softmax_dtype)
        attention_mask = attention_mask.reshape((-1, query_length, length))
        weights = ops.cast(self.softmax(rows, attention_mask), self.compute_dtype)
        return ops.BatchMatMul()(weights.reshape(scores.shape), value.reshape(keys))

    def _flash(
        self, query: Tensor, key: Tensor, value: Tensor, query_length: int, attention_mask: Tensor
    ) -> Tensor:
        """Attention by the Ascend kernel (FlashAttention, arXiv 2205.14135); there is none on CPU."""
        heads, length = self.kv_heads * self.group_size, attention_mask.shape[-1]
        return ops.flash_attention_score(
            query.reshape((-1, heads, query_length, self.head_dim)),
            key.reshape((-1, self.kv_heads, length, self.head_dim)),
            value.reshape((-1, self.kv_heads, length, self.head_dim)),
            heads,
            attn_mask=ops.cast(attention_mask, ms.uint8),
            scalar_value=1.0,
            input_layout="BNSD",
        )


class FeedForward(nn.Cell):
    """SwiGLU: ``w2(silu(w1 x) * w3 x)`` (Shazeer, arXiv 2002.05202), inner features split over the group."""

    def __init__(self, config: ModelConfig, groups: Groups) -> None:
        super().__init__()
        dtypes: dict[str, Any] = {
            "compute_dtype": ms_dtype(config.compute_dtype),
            "param_dtype": ms_dtype(config.param_init_type),
            "matmul_dtype": config.matmul_dtype,
        }
        hidden_size, inner = config.hidden_size, config.intermediate_size
        self.copy_to_group = CopyToGroup(groups.mp_group)
        self.w1 = ColumnParallelLinear(hidden_size, inner, groups, has_bias=False, **dtypes)
        self.w3 = ColumnParallelLinear(hidden_size, inner, groups, has_bias=False, **dtypes)
        self.w2 = RowParallelLinear(inner, hidden_size, groups, **dtypes)
        self.swiglu = swiglu(dtypes["compute_dtype"])

    def construct(self, x: Tensor) -> Tensor:
        """``x`` (B * T, H) -> (B * T, H)."""
        x = self.copy_to_group(x)
        return self.w2(self.swiglu(self.w1(x), self.w3(x)))


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

    def construct(
        self, x: Tensor, columns: Columns | None, attention_mask: Tensor, *tables: Tensor
    ) -> Tensor:
        """``x`` (B * T, H), the rest as for :class:`Attention` -> (B * Q, H)."""
        mixed = self.attention(self.attention_norm(x), columns, attention_mask, *tables)
        x = mixed + (x if columns is None else take_columns(x, attention_mask.shape[-1], columns))
        return x + self.feed_forward(self.ffn_norm(x))


class Decoder(nn.Cell):
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
        self.shared_inputs = SharedInputs(config, groups)

    def construct(
        self, tokens: Tensor, valid: Tensor, position_ids: Tensor, columns: Columns | None = None
    ) -> Tensor:
        """Hidden states after the last norm.

        Args:
            tokens: (B, T) int32 ids.
            valid: (B, T) int32, 1 on real tokens, 0 on padding (from lengths, never from ids).
            position_ids: (B, T) int32, 0 at a row's first real token.
            columns: first and end of the Q columns to return; ``None``: all T. The last layer then computes
                keys and values of all columns, and everything else only for these.

        Returns:
            (B, Q, H) in the compute type; values at pads are finite and meaningless.
        """
        shared = self.shared_inputs(valid, position_ids)
        x = ops.cast(self.tok_embeddings(tokens.reshape((-1,))), self.compute_dtype)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            if index == last and columns is not None:
                x = layer(x, columns, *self.shared_inputs.of_queries(columns, *shared))
            else:
                x = layer(x, None, *shared)
        return self.norm_out(x).reshape((tokens.shape[0], -1, x.shape[-1]))
