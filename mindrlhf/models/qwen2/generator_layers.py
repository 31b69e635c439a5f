"""Layers of the generation network: sizes of one rank, products, norm, embedding, rotary, key/value cache.

See :mod:`mindrlhf.models.qwen2.generator_network` for the letters.
"""

from __future__ import annotations

from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mindrlhf.configs.keys import ModelConfig
from mindrlhf.models.dtypes import ms_dtype
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.tensor_parallel import RowsProduct, empty_parameter, local_ids
from mindrlhf.utils.sizes import exact_div


@dataclass(frozen=True, kw_only=True)
class LocalSizes:
    """What one rank holds of the model, and the types it computes in."""

    rows: int
    prompt_columns: int
    columns: int
    hidden: int
    kv_heads: int
    queries: int
    head_dim: int
    intermediate: int
    vocab: int
    eps: float
    param_dtype: ms.dtype
    compute_dtype: ms.dtype
    norm_dtype: ms.dtype
    softmax_dtype: ms.dtype
    flash_attention: bool
    matmul_dtype: str = "float32"

    @property
    def slots(self) -> int:
        """Vectors per key/value head in a fused projection: its queries, the key, the value."""
        return self.queries + 2

    @property
    def qkv(self) -> int:
        """Columns of the fused projection."""
        return self.kv_heads * self.slots * self.head_dim

    @property
    def attention(self) -> int:
        """Features of all query heads of this rank."""
        return self.kv_heads * self.queries * self.head_dim


def local_sizes(
    config: ModelConfig, groups: Groups, rows: int, prompt_columns: int, columns: int
) -> LocalSizes:
    """Sizes of one rank of ``groups.mesh``.

    Raises:
        ValueError: heads, key/value heads, intermediate size or vocabulary do not divide by mp.
    """
    mp = groups.mesh.mp
    return LocalSizes(
        rows=rows,
        prompt_columns=prompt_columns,
        columns=columns,
        hidden=config.hidden_size,
        kv_heads=exact_div(config.n_kv_heads, mp, "key/value heads by mp"),
        queries=config.queries_per_kv_head,
        head_dim=config.head_dim,
        intermediate=exact_div(config.intermediate_size, mp, "intermediate size by mp"),
        vocab=exact_div(config.vocab_size, mp, "vocabulary by mp"),
        eps=config.rms_norm_eps,
        param_dtype=ms_dtype(config.param_init_type),
        compute_dtype=ms_dtype(config.compute_dtype),
        norm_dtype=ms_dtype(config.layernorm_compute_type),
        softmax_dtype=ms_dtype(config.softmax_compute_type),
        flash_attention=config.use_flash_attention and ms.get_context("device_target") == "Ascend",
        matmul_dtype=config.matmul_dtype,
    )


class SwapOrder(nn.Cell):
    """Vectors in the order (batch, first, second) -> (batch, second, first), as training does by Reorder."""

    def __init__(self, batch: int, first: int, second: int) -> None:
        super().__init__()
        rows = np.arange(batch * first * second, dtype=np.int32).reshape(batch, first, second)
        self.order = Tensor(rows.transpose(0, 2, 1).reshape(-1))

    def construct(self, x: Tensor) -> Tensor:
        """``x`` (batch * first * second, k), the same shape."""
        return ops.gather(x, self.order, 0)


class ColumnsProduct(nn.Cell):
    """``W X`` for the few columns ``X`` of a decode step."""

    def __init__(self, sizes: LocalSizes) -> None:
        super().__init__()
        self.dtype = sizes.compute_dtype
        self.product = ops.MatMul()
        self.product_of_rows = ops.MatMul(transpose_b=True)

    def construct(self, weight: Tensor, x: Tensor) -> Tensor:
        """``weight`` (out, in), ``x`` (in, B) -> (out, B)."""
        return self.product(ops.cast(weight, self.dtype), x)

    def of_rows(self, weight: Tensor, x: Tensor) -> Tensor:
        """``weight`` (out, in), ``x`` (B, in) -> (out, B)."""
        return self.product_of_rows(ops.cast(weight, self.dtype), x)


class Linear(nn.Cell):
    """``y = x W^T + b`` with ``W`` stored (out, in), for many rows or for few.

    The few rows of a decode step are stored as columns, with the weight as the left factor, ``W X``: measured
    on CPU with 16 rows, that takes 3/4 of the time of ``x W`` with the weight stored (in, out), and 1/3 of
    the time of ``x W^T``. With many rows all take the same time.
    """

    def __init__(
        self, inputs: int, outputs: int, sizes: LocalSizes, name: str, *, has_bias: bool = False
    ) -> None:
        super().__init__()
        self.dtype = sizes.compute_dtype
        self.has_bias = has_bias
        self.weight = empty_parameter((outputs, inputs), sizes.param_dtype, f"{name}.weight", trainable=False)
        if has_bias:
            self.bias = empty_parameter((outputs,), sizes.param_dtype, f"{name}.bias", trainable=False)
            self.bias_add = ops.BiasAdd()
        self.rows_product = RowsProduct(sizes.compute_dtype, sizes.matmul_dtype)
        self.columns_product = ColumnsProduct(sizes)

    def construct(self, x: Tensor) -> Tensor:
        """Many rows: ``x`` (n, in) -> (n, out)."""
        return self._add_bias(self.rows_product(x, self.weight))

    def columns(self, x: Tensor) -> Tensor:
        """Columns to columns: ``x`` (in, B) -> (out, B), without bias."""
        return self.columns_product(self.weight, x)

    def columns_to_rows(self, x: Tensor) -> Tensor:
        """``x`` (in, B) -> (B, out)."""
        return self._add_bias(ops.transpose(self.columns(x), (1, 0)))

    def rows_to_columns(self, x: Tensor) -> Tensor:
        """``x`` (B, in) -> (out, B), without bias."""
        return self.columns_product.of_rows(self.weight, x)

    def _add_bias(self, y: Tensor) -> Tensor:
        if self.has_bias:
            y = self.bias_add(y, ops.cast(self.bias, self.dtype))
        return y


class RMSNorm(nn.Cell):
    """``x / sqrt(mean(x^2) + eps) * g`` over the features (arXiv 1910.07467).

    Factors of a row and of a column are spelled out by an outer product: a broadcast operation is slower
    on CPU and keeps 16 bytes per element as long as the graph lives.
    """

    def __init__(self, sizes: LocalSizes, name: str) -> None:
        super().__init__()
        self.dtype = sizes.norm_dtype
        self.out_dtype = sizes.compute_dtype
        self.eps = sizes.eps
        self.weight = empty_parameter((sizes.hidden,), sizes.param_dtype, f"{name}.weight", trainable=False)
        self.mean = ops.ReduceMean(keep_dims=True)
        self.outer = ops.MatMul()

    def construct(self, x: Tensor) -> Tensor:
        """``x`` (n, H) -> (n, H)."""
        x = ops.cast(x, self.dtype)
        scale = ops.rsqrt(self.mean(x * x, 1) + self.eps)
        weight = ops.reshape(ops.cast(self.weight, self.dtype), (1, -1))
        return ops.cast(x * self.outer(scale, weight), self.out_dtype)

    def columns(self, x: Tensor) -> Tensor:
        """``x`` (H, B) -> (H, B)."""
        x = ops.cast(x, self.dtype)
        scale = ops.rsqrt(self.mean(x * x, 0) + self.eps)
        weight = ops.reshape(ops.cast(self.weight, self.dtype), (-1, 1))
        return ops.cast(x * self.outer(weight, scale), self.out_dtype)


class Embedding(nn.Cell):
    """Looks ids up in this rank's rows of the vocabulary and sums over the group."""

    def __init__(self, sizes: LocalSizes, groups: Groups, name: str) -> None:
        super().__init__()
        self.dtype = sizes.compute_dtype
        self.weight = empty_parameter(
            (sizes.vocab, sizes.hidden), sizes.param_dtype, f"{name}.weight", trainable=False
        )
        self.rows = sizes.vocab
        self.first = groups.mp_index * sizes.vocab
        self.split = groups.mp_group is not None
        if self.split:
            self.all_reduce = ops.AllReduce(group=groups.mp_group)

    def construct(self, ids: Tensor) -> Tensor:
        """``ids`` (n,) int32 -> (n, H)."""
        if not self.split:
            return ops.cast(ops.gather(self.weight, ids, 0), self.dtype)
        local, held = local_ids(ids, self.first, self.rows)
        x = ops.cast(ops.gather(self.weight, local, 0), self.dtype)
        return self.all_reduce(x * ops.expand_dims(ops.cast(held, self.dtype), 1))


class Rotary(nn.Cell):
    """Rotary position embedding of whole fused rows, half-split pairing as in GPT-NeoX and Qwen2.

    ``x cos + (x R) sin`` with R the matrix that maps (a, b) to (-b, a) (arXiv 2104.09864). The tables
    hold, per position, cos and sin for every slot of a fused row: scaled by 1/sqrt(D) for queries (the
    scale of the scores), plain for keys, and 1 and 0 for values, which do not change.
    """

    def __init__(self, sizes: LocalSizes, theta: float) -> None:
        super().__init__()
        cos, sin = rotary_tables(sizes, theta)
        self.cos = Tensor(cos, sizes.compute_dtype)
        self.sin = Tensor(sin, sizes.compute_dtype)
        half = np.eye(sizes.head_dim // 2, dtype=np.float32)
        zero = np.zeros_like(half)
        self.rotate_half = Tensor(np.block([[zero, half], [-half, zero]]), sizes.compute_dtype)
        self.head_dim = sizes.head_dim
        self.matmul = ops.MatMul()

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """``positions`` (n,) int32 -> cos and sin of fused rows, (n, qkv) each."""
        return ops.gather(self.cos, positions, 0), ops.gather(self.sin, positions, 0)

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``x``, ``cos``, ``sin`` (n, qkv) -> (n, qkv)."""
        rotated = self.matmul(ops.reshape(x, (-1, self.head_dim)), self.rotate_half)
        return x * cos + ops.reshape(rotated, x.shape) * sin


def rotary_tables(sizes: LocalSizes, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of every position and every slot of a fused row, (S, qkv) float32 each."""
    size = sizes.head_dim
    frequencies = theta ** -(np.arange(0, size, 2, dtype=np.float64) / size)
    angles = np.outer(np.arange(sizes.columns), np.concatenate([frequencies, frequencies]))[:, None]
    scale = np.r_[np.full(sizes.queries, size**-0.5), 1.0][:, None]
    value = np.zeros((sizes.columns, 1, size))
    cos = np.concatenate([np.cos(angles) * scale, value + 1.0], axis=1).reshape(sizes.columns, -1)
    sin = np.concatenate([np.sin(angles) * scale, value], axis=1).reshape(sizes.columns, -1)
    repeat = (1, sizes.kv_heads)
    return np.tile(cos, repeat).astype(np.float32), np.tile(sin, repeat).astype(np.float32)


class KVCache(nn.Cell):
    """Keys and values of B sequences, N key/value heads of this rank and S columns, for one decoder layer.

    Entry ``(b * N + n, c)`` of either table is the vector of head ``n`` of sequence ``b`` at column ``c``.
    ``(B * N, S, D)`` is what ``BatchMatMul`` takes, and one new column is one ``ScatterNdUpdate`` of B * N
    vectors. The shape must be the parameter's own: on CPU a reshape of an updated parameter copies the whole
    table at every step.

    Args:
        sequences: B.
        kv_heads: N, key/value heads of this rank.
        columns: S.
        head_dim: D.
        dtype: type of the stored vectors.
        name: unique prefix of the two parameters.
    """

    def __init__(
        self, sequences: int, kv_heads: int, columns: int, head_dim: int, dtype: ms.dtype, name: str
    ) -> None:
        super().__init__()
        heads = sequences * kv_heads
        shape = (heads, columns, head_dim)
        self.columns = columns
        self.head_numbers = Tensor(np.stack([np.arange(heads), np.zeros(heads)], 1).astype(np.int32))
        self.one_column = Tensor(np.array([[0, 1]] * heads, np.int32))
        self.keys = empty_parameter(shape, dtype, f"{name}.keys", trainable=False)
        self.values = empty_parameter(shape, dtype, f"{name}.values", trainable=False)
        self.scatter = ops.ScatterNdUpdate()

    def entries(self, column: Tensor) -> Tensor:
        """Indices of ``column`` (scalar int32) of each head -> (B * N, 2) int32; the same for every layer."""
        return self.head_numbers + self.one_column * column

    def write(self, entries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores one column and returns the updated caches.

        Args:
            entries: (B * N, 2) int32 from :meth:`entries`.
            keys, values: (B * N, D).

        Returns:
            All keys and all values, (B * N, S, D) each.
        """
        return self.scatter(self.keys, entries, keys), self.scatter(self.values, entries, values)

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Replaces everything: ``keys`` and ``values`` (B * N, P, D) become columns 0 .. P-1.

        The columns after them become zero, so that nothing of an earlier batch (a NaN, say) is left.
        """
        ops.assign(self.keys, self._padded(keys))
        ops.assign(self.values, self._padded(values))

    def _padded(self, heads: Tensor) -> Tensor:
        missing = self.columns - heads.shape[1]
        if missing > 0:
            heads = ops.Pad(((0, 0), (0, missing), (0, 0)))(heads)
        return heads
