"""Key/value cache of one decoder layer, as two flat tables of head vectors.

Row ``(b * N + n) * S + c`` holds head ``n`` of sequence ``b`` at column ``c`` (N: this rank's key/value
heads, S: columns of prompt and response, D: size of a head). Flat, because one new column is then one
``ScatterUpdate`` of B * N rows, and because the whole table viewed as ``(B * N, S, D)`` is what
``BatchMatMul`` wants, without a copy.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer


class KVCache(nn.Cell):
    """Keys and values of B sequences, N heads and S columns.

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
        self.table_shape = (heads * columns, head_dim)
        self.cache_shape = (heads, columns, head_dim)
        self.columns = columns
        self.first_rows = Tensor(np.arange(heads, dtype=np.int32) * columns)
        self.keys = Parameter(
            initializer("zeros", self.table_shape, dtype), name=f"{name}.keys", requires_grad=False
        )
        self.values = Parameter(
            initializer("zeros", self.table_shape, dtype), name=f"{name}.values", requires_grad=False
        )
        self.scatter = ops.ScatterUpdate()

    def rows(self, column: Tensor) -> Tensor:
        """Table rows of ``column`` (scalar int32) -> (B * N,) int32; the same for every layer."""
        return self.first_rows + column

    def write(self, rows: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores one column and gives the caches with it in.

        Args:
            rows: (B * N,) int32 from :meth:`rows`.
            keys, values: (B * N, D).

        Returns:
            All keys and all values, (B * N, S, D) each.
        """
        all_keys = self.scatter(self.keys, rows, keys)
        all_values = self.scatter(self.values, rows, values)
        return ops.reshape(all_keys, self.cache_shape), ops.reshape(all_values, self.cache_shape)

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
        return ops.reshape(heads, self.table_shape)
