"""The pieces of the Qwen2 decoder, for training and for scoring whole sequences.

Grouped-query attention with rotary positions, RMSNorm and a SwiGLU feed-forward (Qwen2 technical report,
arXiv 2407.10671). A piece takes its weights as inputs, in the order of
:mod:`mindrlhf.models.qwen2.layouts`; :mod:`mindrlhf.models.passes` runs them. Generation has its own network
in :mod:`mindrlhf.models.qwen2.generator_network`.

The residual stream, written (N, H), has all B * T rows; with sequence parallelism (``groups.splits_rows``) it
has this rank's B * T / mp.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from mindrlhf.configs.keys import ModelConfig
from mindrlhf.models.dtypes import ms_dtype
from mindrlhf.models.qwen2.layers import (
    Reorder,
    RMSNorm,
    SharedInputs,
    masked_softmax,
    rotary,
    swiglu,
    transposed_rows,
)
from mindrlhf.parallel.collectives import CopyToGroup, before_columns
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from mindrlhf.utils.sizes import exact_div

__all__ = ["DecoderLayer", "DecoderLayerGradient", "RMSNorm", "SharedInputs"]


class NormedInput(nn.Cell):
    """Norm of the residual stream, for column-parallel projections."""

    def __init__(self, config: ModelConfig, groups: Groups) -> None:
        super().__init__()
        self.norm = RMSNorm(config)
        # A rank that norms its own rows has a part of the weight's gradient only.
        self.share_weight = CopyToGroup(groups.mp_group if groups.splits_rows else None)
        self.before_columns = before_columns(groups)

    def construct(self, x: Tensor, norm: Tensor) -> Tensor:
        """``x`` (N, H), ``norm`` (H,) -> (B * T, H)."""
        return self.before_columns(self.norm(x, self.share_weight(norm)))


class QueryKeyValue(nn.Cell):
    """Norm, projections and rotary positions; heads are split over the group."""

    def __init__(self, config: ModelConfig, groups: Groups) -> None:
        super().__init__()
        self.head_dim, self.has_bias = config.head_dim, config.qkv_has_bias
        self.compute_dtype = ms_dtype(config.compute_dtype)
        self.rotary_dtype = ms_dtype(config.rotary_dtype)
        self.normed = NormedInput(config, groups)
        self.project = ColumnParallelLinear(self.compute_dtype, config.matmul_dtype)
        self.rotary = rotary(self.rotary_dtype)

    def construct(
        self,
        x: Tensor,
        query_cos: Tensor,
        query_sin: Tensor,
        key_cos: Tensor,
        key_sin: Tensor,
        norm: Tensor,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``x`` (N, H), tables of :class:`SharedInputs` -> query, key, value (B * T, heads * D)."""
        x = self.normed(x, norm)
        query, key, value = self._projections(x, *weights)
        return self._rotated(query, query_cos, query_sin), self._rotated(key, key_cos, key_sin), value

    def _projections(self, x: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.has_bias:
            return (
                self.project(x, weights[0], weights[1]),
                self.project(x, weights[2], weights[3]),
                self.project(x, weights[4], weights[5]),
            )
        return self.project(x, weights[0]), self.project(x, weights[1]), self.project(x, weights[2])

    def _rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary positions of (B * T, heads * D), head by head."""
        rotated = self.rotary(ops.cast(x, self.rotary_dtype).reshape((-1, self.head_dim)), cos, sin)
        return ops.cast(rotated, self.compute_dtype).reshape(x.shape)


class Attention(nn.Cell):
    """Causal grouped-query attention.

    Query heads of one key/value head are laid out as extra rows of one batched product, so keys and
    values are never repeated in memory.
    """

    def __init__(self, config: ModelConfig, groups: Groups) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.kv_heads = exact_div(config.n_kv_heads, groups.mesh.mp, "key/value heads by mp")
        self.group_size = config.queries_per_kv_head
        self.heads = self.kv_heads * self.group_size
        self.compute_dtype = ms_dtype(config.compute_dtype)
        self.softmax_dtype = ms_dtype(config.softmax_compute_type)
        self.reorder = Reorder()
        self.softmax = masked_softmax(self.softmax_dtype)
        self.flash = config.use_flash_attention

    def construct(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor) -> Tensor:
        """(B * T, heads * D), twice (B * T, kv heads * D), the mask -> (B * T, heads * D)."""
        length = attention_mask.shape[-1]
        rows = query.shape
        query = self._transpose(query, length, self.heads)
        key = self._transpose(key, length, self.kv_heads)
        value = self._transpose(value, length, self.kv_heads)
        attend = self._flash if self.flash else self._plain
        return self._transpose(attend(query, key, value, attention_mask), self.heads, length).reshape(rows)

    def _transpose(self, x: Tensor, first: int, second: int) -> Tensor:
        """Vectors in the order (B, first, second), of any shape -> (B * second * first, D)."""
        rows = x.reshape((-1, self.head_dim))
        batch = rows.shape[0] // (first * second)
        return self.reorder(
            rows, transposed_rows(batch, first, second), transposed_rows(batch, second, first)
        )

    def _plain(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor) -> Tensor:
        """By plain operators: (B * heads * T, D), twice (B * kv heads * T, D) -> (B * kv heads, ..., D)."""
        length = attention_mask.shape[-1]
        grouped = (-1, self.group_size * length, self.head_dim)
        keys = (-1, length, self.head_dim)
        scores = ops.BatchMatMul(transpose_b=True)(query.reshape(grouped), key.reshape(keys))
        # Rows of one matrix: reductions on CPU are many times slower over more dimensions.
        rows = ops.cast(scores.reshape((-1, length)), self.softmax_dtype)
        attention_mask = attention_mask.reshape((-1, length, length))
        weights = ops.cast(self.softmax(rows, attention_mask), self.compute_dtype)
        return ops.BatchMatMul()(weights.reshape(scores.shape), value.reshape(keys))

    def _flash(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor) -> Tensor:
        """Attention by the Ascend kernel (FlashAttention, arXiv 2205.14135); there is none on CPU."""
        length = attention_mask.shape[-1]
        return ops.flash_attention_score(
            query.reshape((-1, self.heads, length, self.head_dim)),
            key.reshape((-1, self.kv_heads, length, self.head_dim)),
            value.reshape((-1, self.kv_heads, length, self.head_dim)),
            self.heads,
            attn_mask=ops.cast(attention_mask, ms.uint8),
            scalar_value=1.0,
            input_layout="BNSD",
        )


class AttentionOutput(nn.Cell):
    """The projection back to the hidden size, and the residual."""

    def __init__(self, config: ModelConfig, groups: Groups) -> None:
        super().__init__()
        self.project = RowParallelLinear(groups, ms_dtype(config.compute_dtype), config.matmul_dtype)

    def construct(self, mixed: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """(B * T, heads * D), (N, H) -> (N, H)."""
        return x + self.project(mixed, weight)


class GateUp(nn.Cell):
    """Norm and the two inner projections of the feed-forward, split over the group."""

    def __init__(self, config: ModelConfig, groups: Groups) -> None:
        super().__init__()
        self.normed = NormedInput(config, groups)
        self.project = ColumnParallelLinear(ms_dtype(config.compute_dtype), config.matmul_dtype)

    def construct(self, x: Tensor, norm: Tensor, w1: Tensor, w3: Tensor) -> tuple[Tensor, Tensor]:
        """(N, H) -> twice (B * T, I)."""
        x = self.normed(x, norm)
        return self.project(x, w1), self.project(x, w3)


class Down(nn.Cell):
    """SwiGLU, ``w2(silu(gate) * up)`` (Shazeer, arXiv 2002.05202), and the residual."""

    def __init__(self, config: ModelConfig, groups: Groups) -> None:
        super().__init__()
        self.swiglu = swiglu(ms_dtype(config.compute_dtype))
        self.project = RowParallelLinear(groups, ms_dtype(config.compute_dtype), config.matmul_dtype)

    def construct(self, gate: Tensor, up: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Twice (B * T, I), (N, H) -> (N, H)."""
        return x + self.project(self.swiglu(gate, up), weight)


class DecoderLayer(nn.Cell):
    """Pre-norm residual block: attention, then feed-forward.

    It is cut behind each product. A product's gradient does not need its result, so from the results between
    the parts everything is differentiated without computing a product twice but that of the attention scores
    (selective recomputation, arXiv 2205.05198, section 5).
    """

    def __init__(self, config: ModelConfig, groups: Groups) -> None:
        super().__init__()
        self.projections = 7 if config.qkv_has_bias else 4  # weights of the first part
        self.query_key_value = QueryKeyValue(config, groups)
        self.attention = Attention(config, groups)
        self.output = AttentionOutput(config, groups)
        self.gate_up = GateUp(config, groups)
        self.down = Down(config, groups)

    def construct(self, x: Tensor, attention_mask: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """Everything that a gradient may need.

        Args:
            x: (N, H).
            attention_mask: of :class:`SharedInputs`.
            rest: its four tables, and the weights of the layer.

        Returns:
            (N, H), then the results of the parts: query, key, value, mixed values, the residual stream
            between the halves, gate and up.
        """
        tables, weights = rest[:4], rest[4:]
        first = self.projections
        query, key, value = self.query_key_value(x, *tables, *weights[:first])
        mixed = self.attention(query, key, value, attention_mask)
        middle = self.output(mixed, x, weights[first])
        gate, up = self.gate_up(middle, *weights[first + 1 : first + 4])
        return self.down(gate, up, middle, weights[first + 4]), query, key, value, mixed, middle, gate, up


class DecoderLayerGradient(nn.Cell):
    """Gradients of a :class:`DecoderLayer` from the results of its parts."""

    def __init__(self, layer: DecoderLayer) -> None:
        super().__init__()
        self.layer = layer
        self.gradient = ops.GradOperation(get_all=True, sens_param=True)

    def construct(
        self, dout: Tensor, kept: tuple[Tensor, ...], x: Tensor, attention_mask: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        """Gradients of ``x`` and of each weight.

        Args:
            dout: of the first result, (N, H).
            kept: the other results of the layer.
            x, attention_mask, rest: its inputs.
        """
        query, key, value, mixed, middle, gate, up = kept
        tables, weights, layer, gradient = rest[:4], rest[4:], self.layer, self.gradient
        first = layer.projections
        d_gate, d_up, d_middle, d_down = gradient(layer.down)(gate, up, middle, weights[first + 4], dout)
        of_gate_up = gradient(layer.gate_up)(middle, *weights[first + 1 : first + 4], (d_gate, d_up))
        d_middle = d_middle + of_gate_up[0]
        d_mixed, d_x, d_output = gradient(layer.output)(mixed, x, weights[first], d_middle)
        d_query, d_key, d_value, _ = gradient(layer.attention)(query, key, value, attention_mask, d_mixed)
        of_projections = gradient(layer.query_key_value)(
            x, *tables, *weights[:first], (d_query, d_key, d_value)
        )
        return d_x + of_projections[0], *of_projections[5:], d_output, *of_gate_up[1:], d_down
