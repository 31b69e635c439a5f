"""Products whose operands are bfloat16 while all else is float32, on CPU.

What mixed precision does to linear layers (Micikevicius et al., arXiv 1710.03740), but for their results,
which stay float32. The operators are those of ``bf16_products.cpp``.
"""

from __future__ import annotations

import functools

import mindspore as ms
from mindspore import Tensor, nn

from mindrlhf.kernels.library import product_library
from mindrlhf.kernels.operators import operator


class BFloat16RowsProduct(nn.Cell):
    """``x W^T`` of float32 matrices with operands rounded to bfloat16, and its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.product = operator(
            product_library(), "RowsProduct", lambda x, weight: (x[0], weight[0]), ms.float32
        )
        self.gradient = operator(
            product_library(),
            "RowsProductGradient",
            lambda dy, x, weight: (x, weight),
            (ms.float32, ms.float32),
        )

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        """``x`` (n, in), ``weight`` (out, in), float32 both -> (n, out) float32."""
        return self.product(x, weight)

    def bprop(self, x: Tensor, weight: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of ``x`` and ``weight``, also of operands rounded to bfloat16."""
        return self.gradient(dout, x, weight)


@functools.cache
def bfloat16_rows_product() -> BFloat16RowsProduct:
    """The one of this process; it holds nothing of a layer's own.

    Raises:
        MindRLHFError: there can be none on this machine, see :func:`product_library`.
    """
    return BFloat16RowsProduct()
