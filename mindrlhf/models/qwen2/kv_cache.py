"""Key/value cache of one decoder layer: a table of head vectors for keys and one for values.

Entry ``(b * N + n, c)`` holds head ``n`` of sequence ``b`` at column ``c`` (N: this rank's key/value
heads, S: columns of prompt and response, D: size of a head). ``(B * N, S, D)`` is what ``BatchMatMul``
wants, and one new column is one ``ScatterNdUpdate`` of B * N vectors. The shape must be the parameter's
own: on CPU a reshape of an updated parameter copies the whole table, at every step.
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
        shape = (heads, columns, head_dim)
        self.columns = columns
        self.head_numbers = Tensor(np.stack([np.arange(heads), np.zeros(heads)], 1).astype(np.int32))
        self.one_column = Tensor(np.array([[0, 1]] * heads, np.int32))
        self.keys = Parameter(initializer("zeros", shape, dtype), name=f"{name}.keys", requires_grad=False)
        self.values = Parameter(
            initializer("zeros", shape, dtype), name=f"{name}.values", requires_grad=False
        )
        self.scatter = ops.ScatterNdUpdate()

    def entries(self, column: Tensor) -> Tensor:
        """Where ``column`` (scalar int32) of each head is -> (B * N, 2) int32; the same for every layer."""
        return self.head_numbers + self.one_column * column

    def write(self, entries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores one column and gives the caches with it in.

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
