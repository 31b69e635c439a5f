"""Products whose operands are bfloat16 while all else is float32, on CPU.

What mixed precision does to linear layers (Micikevicius et al., arXiv 1710.03740), but for their results,
which stay float32. The operators are those of ``bf16_products.cpp``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mindspore as ms
from mindspore import Tensor, nn, ops

from mindrlhf.kernels.library import product_library


class BFloat16RowsProduct(nn.Cell):
    """``x W^T`` of float32 matrices with operands rounded to bfloat16, and its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.product = _operator("RowsProduct", lambda x, weight: (x[0], weight[0]), ms.float32)
        self.gradient = _operator(
            "RowsProductGradient", lambda dy, x, weight: (x, weight), (ms.float32, ms.float32)
        )

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        """``x`` (n, in), ``weight`` (out, in), float32 both -> (n, out) float32."""
        return self.product(x, weight)

    def bprop(self, x: Tensor, weight: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of ``x`` and ``weight``, also of operands rounded to bfloat16."""
        return self.gradient(dout, x, weight)


def _operator(name: str, shape: Callable[..., Any], dtype: Any) -> ops.Custom:
    """An operator of the library; ``shape`` gives its results' shapes from those of its operands."""
    return ops.Custom(f"{product_library()}:{name}", shape, lambda *_: dtype, func_type="aot")


@functools.cache
def bfloat16_rows_product() -> BFloat16RowsProduct:
    """The one of this process; it holds nothing of a layer's own.

    Raises:
        MindRLHFError: there can be none on this machine, see :func:`product_library`.
    """
    return BFloat16RowsProduct()
