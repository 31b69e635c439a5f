"""Log-softmax over a vocabulary without arrays of the logits' size; see ``log_probs.cpp``."""

from __future__ import annotations

from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mindrlhf.kernels.library import kernel_library
from mindrlhf.kernels.operators import operator


class KernelLogitSums(nn.Cell):
    """What :class:`mindrlhf.parallel.tensor_parallel.LogitSums` does, for float32 on CPU.

    Args:
        library: the compiled file.
        scale: factor of the logits.
        columns: how many of them are real.
    """

    def __init__(self, library: Path, scale: float, columns: int) -> None:
        super().__init__()
        self.settings = Tensor(np.array([scale, columns], np.float32))
        row = lambda logits, tokens, settings: [logits[0]]  # noqa: E731
        self.sums = operator(library, "LogitSums", lambda *shapes: (row(*shapes),) * 4, (ms.float32,) * 4)
        self.gradient_rows = operator(library, "LogitsGradient", lambda logits, *_: logits, ms.float32)

    def construct(self, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``logits`` (n, k) float32, ``tokens`` (n,) int32 -> four (n,)."""
        return self.sums(logits, tokens, self.settings)

    def gradient(self, logits: Tensor, tokens: Tensor, *of_rows: Tensor) -> Tensor:
        """``of_rows``: five (n,) -> (n, k)."""
        return self.gradient_rows(logits, tokens, self.settings, ops.stack(of_rows, 1))


def logits_library() -> Path | None:
    """The library for log-probs on this device; ``None`` leaves them to MindSpore."""
    return kernel_library() if ms.get_context("device_target") == "CPU" else None
