"""Decode steps on CPU as one operator per half layer; see ``decode_steps.cpp``.

This follows vLLM and FasterTransformer on GPUs. With one token per sequence, decoding is bound by reading the
weights, so everything else in a layer must hide behind that.
"""

from __future__ import annotations

from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn

from mindrlhf.kernels.library import kernel_library
from mindrlhf.kernels.operators import operator
from mindrlhf.utils.errors import MindRLHFError


class DecodeSteps(nn.Cell):
    """The operators of one library, with the settings that all layers share.

    Letters as in :mod:`mindrlhf.models.qwen2.generator_network`; sequences that have ended are not computed
    and give zeros.

    Args:
        library: from :func:`kernel_library`.
        rounded: whether products round their operands to bfloat16, as training then does.
        eps: of the normalisation.
        adds_residual: whether this rank's partial sums include ``x``; those of one rank per group do.
    """

    def __init__(self, library: Path, *, rounded: bool, eps: float, adds_residual: bool) -> None:
        super().__init__()
        suffix = "Rounded" if rounded else ""
        self.eps = Tensor(np.array([eps], np.float32))
        self.adds = Tensor(np.array(adds_residual))
        self.attention_step = operator(library, f"AttentionStep{suffix}", lambda x, *_: x, ms.float32)
        self.feed_forward_step = operator(library, f"FeedForwardStep{suffix}", lambda x, *_: x, ms.float32)
        self.logits_step = operator(library, f"LogitsStep{suffix}", _logits_shape, ms.float32)

    def attention(
        self,
        x: Tensor,
        place: tuple[Tensor, Tensor, Tensor],
        norm: Parameter,
        projections: tuple[Parameter, Tensor, Parameter],
        rotary: tuple[Tensor, Tensor],
        cache: tuple[Parameter, Parameter],
    ) -> Tensor:
        """This rank's partial sum of ``x`` plus attention's output; writes the new column into the cache.

        Args:
            x: (B, H) float32.
            place: ended (B,) bool; first real column of each (B,) int32; column of the tokens, int32.
            norm: (H,).
            projections: fused (qkv, H); its bias (qkv,); output (H, attention).
            rotary: cos and sin of every position, (S, qkv) each.
            cache: keys and values, (B * N, S, D) each.

        Returns:
            (B, H).
        """
        ended, starts, column = place
        qkv, bias, out = projections
        return self.attention_step(
            x, ended, starts, column, norm, self.eps, qkv, bias, *rotary, out, *cache, self.adds
        )

    def feed_forward(
        self, x: Tensor, ended: Tensor, norm: Parameter, gate_up: Parameter, down: Parameter
    ) -> Tensor:
        """The same for the feed-forward half: ``gate_up`` (2 * I, H), ``down`` (H, I) -> (B, H)."""
        return self.feed_forward_step(x, ended, norm, self.eps, gate_up, down, self.adds)

    def logits(self, x: Tensor, ended: Tensor, norm: Parameter, head: Parameter) -> Tensor:
        """``x`` (B, H), ``head`` (V / mp, H) -> (B, V / mp)."""
        return self.logits_step(x, ended, norm, self.eps, head)


class KernelInverseCDF(nn.Cell):
    """What :class:`mindrlhf.models.inverse_cdf.PlainInverseCDF` does, in a tenth of the time on CPU.

    Args:
        library: from :func:`kernel_library`.
    """

    def __init__(self, library: Path) -> None:
        super().__init__()
        self.softmax = operator(
            library,
            "TokenProbabilities",
            lambda logits: (logits, logits[:1], logits[:1], logits[:1]),
            (ms.float32, ms.int32, ms.float32, ms.float32),
        )
        self.sums = operator(library, "RowSums", lambda probabilities: probabilities[:1], ms.float32)
        self.lookup = operator(
            library, "LookUp", lambda probabilities, logits, target: (target, target), (ms.int32, ms.float32)
        )

    def construct(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``logits`` (B, V) -> probabilities (B, V); index and value of the largest, log of the sum, (B,)."""
        return self.softmax(logits)

    def totals(self, probabilities: Tensor) -> Tensor:
        """``probabilities`` (B, V) -> their sums (B,)."""
        return self.sums(probabilities)

    def look_up(self, probabilities: Tensor, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """``probabilities``, ``logits`` (B, V), ``target`` (B,) -> ids (B,) int32 and their logits (B,)."""
        return self.lookup(probabilities, logits, target)


def kernel_inverse_cdf() -> KernelInverseCDF | None:
    """The one for this machine; ``None`` where there is none, see :func:`kernel_library`."""
    library = kernel_library()
    return None if library is None else KernelInverseCDF(library)


def decode_steps(*, rounded: bool, eps: float, adds_residual: bool) -> DecodeSteps | None:
    """Those for this machine; ``None`` where there are none, see :func:`kernel_library`.

    Raises:
        MindRLHFError: there are none and products are rounded, which MindSpore's own operations cannot do.
    """
    library = kernel_library()
    if library is None and rounded:
        raise MindRLHFError("--cpu_matmul_dtype bfloat16 needs compiled kernels; leave it at float32")
    if library is None:
        return None
    return DecodeSteps(library, rounded=rounded, eps=eps, adds_residual=adds_residual)


def _logits_shape(
    x: list[int], ended: list[int], norm: list[int], eps: list[int], head: list[int]
) -> list[int]:
    return [x[0], head[0]]
