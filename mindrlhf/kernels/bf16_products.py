"""Products whose operands are bfloat16 while everything else is float32, on CPU.

Mixed precision for linear layers (Micikevicius et al., arXiv 1710.03740), except that results stay float32.
The operators are those of ``bf16_products.cpp``.
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
        """``x`` (n, in), ``weight`` (out, in), both float32 -> (n, out) float32."""
        return self.product(x, weight)

    def bprop(self, x: Tensor, weight: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of ``x`` and ``weight``, from operands that are rounded to bfloat16 as well."""
        return self.gradient(dout, x, weight)


@functools.cache
def bfloat16_rows_product() -> BFloat16RowsProduct:
    """The instance of this process, which all layers share because it holds no state.

    Raises:
        MindRLHFError: this machine cannot have it, see :func:`product_library`.
    """
    return BFloat16RowsProduct()
