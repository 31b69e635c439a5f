"""The Qwen2 decoder for generation: fused weights, KV cache, a few large operations.

It computes what the training network computes, with other storage: the rows of query, key and value
that belong to one key/value head are adjacent, ``[q .. q | k | v]`` (called slots: G + 2 of them for G
queries per key/value head), so that one product and one rotation serve all three; gate and up
projection are one product. :mod:`mindrlhf.models.qwen2.generator_weights` maps the canonical
parameters to this storage and back.

Letters: B rows, P prompt columns, S cache columns, H hidden, D head size, N key/value heads of this
rank, G queries per key/value head, I intermediate size of this rank.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mindrlhf.configs.keys import ModelConfig
from mindrlhf.kernels.decoding import DecodeSteps, decode_steps
from mindrlhf.models.decode_schedule import QUERY_BLOCK
from mindrlhf.models.qwen2.generator_layers import (
    ColumnsProduct,
    Embedding,
    KVCache,
    Linear,
    LocalSizes,
    RMSNorm,
    Rotary,
    SwapOrder,
    local_sizes,
)
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.tensor_parallel import empty_parameter

# Finite, so that a row whose keys are all masked (a pad position as query) gets a mean, not a NaN.
_MASKED_SCORE = -1.0e30


class FusedLayer(nn.Cell):
    """One decoder layer with its cache, for a whole prompt (``prefill``) or one column (``decode``)."""

    def __init__(
        self,
        config: ModelConfig,
        sizes: LocalSizes,
        groups: Groups,
        rotary: Rotary,
        attend: PrefillAttention,
        name: str,
    ) -> None:
        super().__init__()
        self.sizes = sizes
        self.attention_norm = RMSNorm(sizes, f"{name}.attention_norm")
        self.qkv = Linear(sizes.hidden, sizes.qkv, sizes, f"{name}.qkv", has_bias=config.qkv_has_bias)
        self.no_bias = Tensor(np.zeros(sizes.qkv, np.float32))
        self.out = Linear(sizes.attention, sizes.hidden, sizes, f"{name}.out")
        self.ffn_norm = RMSNorm(sizes, f"{name}.ffn_norm")
        self.gate_up = Linear(sizes.hidden, 2 * sizes.intermediate, sizes, f"{name}.gate_up")
        self.down = Linear(sizes.intermediate, sizes.hidden, sizes, f"{name}.down")
        self.rotary = rotary
        self.cache = KVCache(
            sizes.rows, sizes.kv_heads, sizes.columns, sizes.head_dim, sizes.compute_dtype, f"{name}.cache"
        )
        self.attend = attend
        self.split_rows = ops.Split(axis=0, output_num=2)
        self.split_columns = ops.Split(axis=1, output_num=2)
        self.scores = ops.BatchMatMul(transpose_b=True)
        self.mix = ops.BatchMatMul()
        self.softmax = ops.Softmax(-1)
        self.split = groups.mp_group is not None
        if self.split:
            self.all_reduce = ops.AllReduce(group=groups.mp_group)

    def step(
        self,
        x: Tensor,
        place: tuple[Tensor, Tensor, Tensor],
        steps: DecodeSteps,
        rotary: tuple[Tensor, Tensor],
    ) -> Tensor:
        """One column of each sequence by the operators of :class:`DecodeSteps`, which defines the letters.

        Args:
            x: (B, H).
            place: ended, starts, column.
            steps: the operators.
            rotary: tables of cos and sin.

        Returns:
            (B, H).
        """
        bias = self.qkv.bias if self.qkv.has_bias else self.no_bias
        projections = (self.qkv.weight, bias, self.out.weight)
        cache = (self.cache.keys, self.cache.values)
        norm = self.attention_norm.weight
        x = self._sum(steps.attention(x, place, norm, projections, rotary, cache))
        weights = (self.ffn_norm.weight, self.gate_up.weight, self.down.weight)
        return self._sum(steps.feed_forward(x, place[0], *weights))

    def decode(self, x: Tensor, cos: Tensor, sin: Tensor, entries: Tensor, mask: Tensor) -> Tensor:
        """One column of each sequence.

        Args:
            x: (H, B), one sequence per column, the fast form of :class:`Linear` for few of them.
            cos, sin: (B, qkv).
            entries: of the column in the cache, (B * N, 2).
            mask: 0 where a key may be seen, else a large negative number, (B * N, G, S).

        Returns:
            (H, B).
        """
        sizes = self.sizes
        fused = self.rotary(self.qkv.columns_to_rows(self.attention_norm.columns(x)), cos, sin)
        fused = ops.reshape(fused, (-1, sizes.slots, sizes.head_dim))
        heads = sizes.rows * sizes.kv_heads
        queries = ops.slice(fused, (0, 0, 0), (heads, sizes.queries, sizes.head_dim))
        new_key = ops.slice(fused, (0, sizes.queries, 0), (heads, 1, sizes.head_dim))
        new_value = ops.slice(fused, (0, sizes.queries + 1, 0), (heads, 1, sizes.head_dim))
        keys, values = self.cache.write(
            entries, ops.reshape(new_key, (heads, -1)), ops.reshape(new_value, (heads, -1))
        )
        scores = ops.cast(self.scores(queries, keys), sizes.softmax_dtype) + mask
        weights = ops.cast(self.softmax(scores), sizes.compute_dtype)
        mixed = ops.reshape(self.mix(weights, values), (-1, sizes.attention))
        x = x + self._sum(self.out.rows_to_columns(mixed))
        gate, up = self.split_rows(self.gate_up.columns(self.ffn_norm.columns(x)))
        return x + self._sum(self.down.columns(swiglu(gate, up)))

    def prefill(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> Tensor:
        """All prompt columns, which also become the cache.

        Args:
            x: (B * P, H).
            cos, sin: (B * P, qkv).
            visible: (B, 1, P, P) bool, whether the query column may see the key column.
        """
        sizes = self.sizes
        fused = self.rotary(self.qkv(self.attention_norm(x)), cos, sin)
        heads, columns, size = sizes.rows * sizes.kv_heads, sizes.prompt_columns, sizes.head_dim
        fused = self.attend.by_head(ops.reshape(fused, (-1, size)))
        fused = ops.reshape(fused, (heads, sizes.slots, columns, size))
        queries = ops.slice(fused, (0, 0, 0, 0), (heads, sizes.queries, columns, size))
        keys = ops.slice(fused, (0, sizes.queries, 0, 0), (heads, 1, columns, size))
        values = ops.slice(fused, (0, sizes.queries + 1, 0, 0), (heads, 1, columns, size))
        keys = ops.reshape(keys, (heads, columns, size))
        values = ops.reshape(values, (heads, columns, size))
        self.cache.fill(keys, values)
        x = x + self._sum(self.out(self.attend(queries, keys, values, visible)))
        gate, up = self.split_columns(self.gate_up(self.ffn_norm(x)))
        return x + self._sum(self.down(swiglu(gate, up)))

    def _sum(self, x: Tensor) -> Tensor:
        """Adds the partial products of the ranks."""
        if self.split:
            return self.all_reduce(x)
        return x


class PrefillAttention(nn.Cell):
    """Causal attention over left-padded prompts."""

    def __init__(self, sizes: LocalSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.blocks = tuple(
            (first, min(first + QUERY_BLOCK, sizes.prompt_columns))
            for first in range(0, sizes.prompt_columns, QUERY_BLOCK)
        )
        prompt = sizes.prompt_columns
        self.by_head = SwapOrder(sizes.rows, prompt, sizes.kv_heads * sizes.slots)
        self.by_column = SwapOrder(sizes.rows, sizes.kv_heads * sizes.queries, prompt)
        columns = np.arange(sizes.prompt_columns)
        self.causal = Tensor((columns[None, :] <= columns[:, None])[None, None])
        self.scores = ops.BatchMatMul(transpose_b=True)
        self.mix = ops.BatchMatMul()
        self.softmax = ops.Softmax(-1)

    def visible(self, real: Tensor) -> Tensor:
        """``real`` (B, P) bool, False at padding -> (B, 1, P, P), True for real keys up to the query."""
        return ops.logical_and(self.causal, ops.reshape(real, (self.sizes.rows, 1, 1, -1)))

    def construct(self, queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
        """Attention.

        Args:
            queries: scaled, (B * N, G, P, D).
            keys, values: (B * N, P, D).
            visible: (B, 1, P, P) bool from :meth:`visible`.

        Returns:
            (B * P, N * G * D).
        """
        sizes = self.sizes
        if sizes.flash_attention:
            mixed = self._flash(queries, keys, values, visible)
        elif len(self.blocks) == 1:
            mixed = self._block(queries, keys, values, visible, 0, sizes.prompt_columns)
        else:
            parts = []
            for first, last in self.blocks:
                parts.append(self._block(queries, keys, values, visible, first, last))
            mixed = ops.concat(parts, 2)
        mixed = self.by_column(ops.reshape(mixed, (-1, sizes.head_dim)))
        return ops.reshape(mixed, (-1, sizes.attention))

    def _block(
        self, queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor, first: int, last: int
    ) -> Tensor:
        """Queries of columns ``first`` .. ``last - 1``, keys up to them -> (B * N, G, last - first, D)."""
        sizes = self.sizes
        size, head_dim = last - first, sizes.head_dim
        heads = sizes.rows * sizes.kv_heads
        queries = ops.slice(queries, (0, 0, first, 0), (heads, sizes.queries, size, head_dim))
        keys = ops.slice(keys, (0, 0, 0), (heads, last, head_dim))
        values = ops.slice(values, (0, 0, 0), (heads, last, head_dim))
        visible = ops.slice(visible, (0, 0, first, 0), (sizes.rows, 1, size, last))
        bias = ops.cast(ops.logical_not(visible), sizes.softmax_dtype) * _MASKED_SCORE
        bias = ops.tile(bias, (1, sizes.kv_heads * sizes.queries, 1, 1))  # see RMSNorm on broadcasting
        scores = self.scores(ops.reshape(queries, (heads, -1, head_dim)), keys)
        scores = ops.reshape(ops.cast(scores, sizes.softmax_dtype), (sizes.rows, -1, size, last)) + bias
        weights = ops.cast(self.softmax(scores), sizes.compute_dtype)
        mixed = self.mix(ops.reshape(weights, (heads, -1, last)), values)
        return ops.reshape(mixed, (heads, sizes.queries, size, head_dim))

    def _flash(self, queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
        """The same by Ascend's fused kernel, whose mask is True where a key must NOT be seen."""
        sizes = self.sizes
        heads = sizes.kv_heads * sizes.queries
        by_head = (sizes.rows, sizes.kv_heads, sizes.prompt_columns, sizes.head_dim)
        mixed = ops.flash_attention_score(
            ops.reshape(queries, (sizes.rows, heads, sizes.prompt_columns, sizes.head_dim)),
            ops.reshape(keys, by_head),
            ops.reshape(values, by_head),
            head_num=heads,
            attn_mask=ops.logical_not(visible),
            scalar_value=1.0,
            input_layout="BNSD",
        )
        return ops.reshape(mixed, queries.shape)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, any equal shapes (arXiv 2002.05202)."""
    return gate * ops.sigmoid(gate) * up


class FusedDecoder(nn.Cell):
    """All parameters and caches, and the two passes over them; both return the last column's logits.

    Args:
        config: model sizes and types.
        groups: this rank's groups in the mesh of the generating model.
        batch_size: rows of one pass.
        prompt_length: columns of a prompt.
        columns: of the cache: the prompt and all tokens that are drawn.
    """

    def __init__(
        self, config: ModelConfig, groups: Groups, *, batch_size: int, prompt_length: int, columns: int
    ) -> None:
        super().__init__()
        self.sizes = sizes = local_sizes(config, groups, batch_size, prompt_length, columns)
        self.tied = config.tie_word_embeddings
        self.embedding = Embedding(sizes, groups, "infer.embedding")
        self.rotary = Rotary(sizes, config.theta)
        self.attend = PrefillAttention(sizes)
        self.layers = nn.CellList(
            [
                FusedLayer(config, sizes, groups, self.rotary, self.attend, f"infer.layers.{index}")
                for index in range(config.num_layers)
            ]
        )
        self.norm = RMSNorm(sizes, "infer.norm")
        if not self.tied:
            self.head = empty_parameter(
                (sizes.vocab, sizes.hidden), sizes.param_dtype, "infer.head.weight", trainable=False
            )
        self.columns_product = ColumnsProduct(sizes)
        self.steps = _steps(sizes, groups)
        self.none_ended = Tensor(np.zeros(sizes.rows, np.bool_))
        self.cache_columns = Tensor(np.arange(sizes.columns, dtype=np.int32)[None])
        self.prompt_columns = Tensor(np.arange(sizes.prompt_columns, dtype=np.int32)[None])

    def cache_parameters(self) -> list[Parameter]:
        """Keys and values of all layers, of one shape."""
        return [table for layer in self.layers for table in (layer.cache.keys, layer.cache.values)]

    def prefill(self, prompt_ids: Tensor, starts: Tensor) -> Tensor:
        """``prompt_ids`` (B, P), ``starts`` (B,) first real column of each row -> logits (B, V / mp)."""
        sizes = self.sizes
        offsets = self.prompt_columns - ops.expand_dims(starts, 1)
        positions = ops.reshape(ops.relu(offsets), (-1,))
        cos, sin = self.rotary.angles(positions)
        visible = self.attend.visible(offsets >= 0)
        x = self.embedding(ops.reshape(prompt_ids, (-1,)))
        for layer in self.layers:
            x = layer.prefill(x, cos, sin, visible)
        x = ops.reshape(x, (sizes.rows, sizes.prompt_columns, sizes.hidden))
        x = ops.slice(x, (0, sizes.prompt_columns - 1, 0), (sizes.rows, 1, sizes.hidden))
        x = ops.reshape(x, (sizes.rows, sizes.hidden))
        if self.steps is not None:
            return self.steps.logits(x, self.none_ended, self.norm.weight, self._head())
        return self._logits(ops.transpose(x, (1, 0)))

    def decode(self, tokens: Tensor, ended: Tensor, column: Tensor, starts: Tensor) -> Tensor:
        """``tokens`` (B,) at ``column`` (scalar int32) -> logits of the next token (B, V / mp).

        Logits of sequences that have ``ended``, (B,) bool, are any finite numbers.
        """
        if self.steps is not None:
            return self._step(self.steps, tokens, (ended, starts, column))
        sizes = self.sizes
        cos, sin = self.rotary.angles(column - starts)
        masked = ops.logical_or(self.cache_columns < ops.expand_dims(starts, 1), self.cache_columns > column)
        bias = ops.cast(masked, sizes.softmax_dtype) * _MASKED_SCORE
        # Spelled out in full once per step: adding equal shapes is far cheaper than broadcasting, and there
        # is one addition per layer.
        mask = ops.tile(bias, (1, sizes.kv_heads * sizes.queries))
        mask = ops.reshape(mask, (-1, sizes.queries, sizes.columns))
        entries = self.layers[0].cache.entries(column)
        x = ops.transpose(self.embedding(tokens), (1, 0))
        for layer in self.layers:
            x = layer.decode(x, cos, sin, entries, mask)
        return self._logits(x)

    def _step(self, steps: DecodeSteps, tokens: Tensor, place: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer.step(x, place, steps, (self.rotary.cos, self.rotary.sin))
        return steps.logits(x, place[0], self.norm.weight, self._head())

    def _head(self) -> Parameter:
        return self.embedding.weight if self.tied else self.head

    def _logits(self, x: Tensor) -> Tensor:
        """``x`` (H, B) -> (B, V / mp); see :class:`Linear` for the order of the factors."""
        return ops.transpose(self.columns_product(self._head(), self.norm.columns(x)), (1, 0))


def _steps(sizes: LocalSizes, groups: Groups) -> DecodeSteps | None:
    """The operators for decode steps where available: on a CPU that supports them, in float32."""
    types = {sizes.param_dtype, sizes.compute_dtype, sizes.norm_dtype, sizes.softmax_dtype}
    if ms.get_context("device_target") != "CPU" or types != {ms.float32}:
        return None
    rounded = sizes.matmul_dtype == "bfloat16"
    return decode_steps(rounded=rounded, eps=sizes.eps, adds_residual=groups.mp_index == 0)
