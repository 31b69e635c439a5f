"""What a decoder layer does between its products, one pass over memory each; see ``fused_layers.cpp``.

Each cell does what its namesake in :mod:`mindrlhf.models.qwen2.layers` does by MindSpore's operations, with
its gradient, for float32 on CPU.
"""

from __future__ import annotations

from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mindrlhf.kernels.library import kernel_library
from mindrlhf.kernels.operators import operator


class KernelNormalise(nn.Cell):
    """``x / sqrt(mean(x^2) + eps) * weight`` of rows."""

    def __init__(self, library: Path, eps: float) -> None:
        super().__init__()
        self.eps = Tensor(np.array([eps], np.float32))
        self.forward = operator(library, "Normalise", lambda x, *_: x, ms.float32)
        self.gradient = operator(
            library, "NormaliseGradient", lambda x, weight, *_: (x, weight), (ms.float32, ms.float32)
        )

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        """``x`` (n, H), ``weight`` (1, H) -> (n, H)."""
        return self.forward(x, weight, self.eps)

    def bprop(self, x: Tensor, weight: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of ``x`` and ``weight``."""
        return self.gradient(x, weight, self.eps, dout)


class KernelSwiGLU(nn.Cell):
    """``silu(gate) * up``."""

    def __init__(self, library: Path) -> None:
        super().__init__()
        self.forward = operator(library, "SwiGluRows", lambda gate, up: gate, ms.float32)
        self.gradient = operator(
            library, "SwiGluGradient", lambda gate, up, dy: (gate, up), (ms.float32, ms.float32)
        )

    def construct(self, gate: Tensor, up: Tensor) -> Tensor:
        """``gate`` and ``up`` (n, I) -> (n, I)."""
        return self.forward(gate, up)

    def bprop(self, gate: Tensor, up: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of ``gate`` and ``up``."""
        return self.gradient(gate, up, dout)


class KernelSoftmax(nn.Cell):
    """Softmax of attention scores plus an additive mask, which all heads of a sequence share."""

    def __init__(self, library: Path) -> None:
        super().__init__()
        self.forward = operator(library, "MaskedSoftmax", lambda scores, attention_mask: scores, ms.float32)
        self.gradient = operator(library, "SoftmaxGradient", lambda y, dy: y, ms.float32)

    def construct(self, scores: Tensor, attention_mask: Tensor) -> Tensor:
        """``scores`` (B * heads * Q, T), ``attention_mask`` (B, Q, T) -> the shape of the scores."""
        return self.forward(scores, attention_mask)

    def bprop(
        self, scores: Tensor, attention_mask: Tensor, out: Tensor, dout: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradient of ``scores``; ``attention_mask`` is a constant."""
        return self.gradient(out, dout), ops.zeros_like(attention_mask)


class KernelRotary(nn.Cell):
    """``x * cos + rotate_half(x) * sin``."""

    def __init__(self, library: Path) -> None:
        super().__init__()
        self.forward = operator(library, "Rotate", lambda x, cos, sin: x, ms.float32)
        self.gradient = operator(library, "RotateGradient", lambda x, cos, sin: x, ms.float32)

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``x`` and tables (n, D) -> (n, D)."""
        return self.forward(x, cos, sin)

    def bprop(
        self, x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, dout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient of ``x``; the tables are constants."""
        return self.gradient(dout, cos, sin), ops.zeros_like(cos), ops.zeros_like(sin)


def layer_kernels(dtype: ms.dtype) -> Path | None:
    """The library for cells that compute in ``dtype`` on this device; ``None`` leaves them to MindSpore."""
    if dtype != ms.float32 or ms.get_context("device_target") != "CPU":
        return None
    return kernel_library()
