"""Where gradients accumulate: parameters that all graphs of an optimizer step refer to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, ops


class GradientBuffers:
    """One set of gradients for all models that are trained one after the other.

    A compiled graph holds its input tensors until its next call (measured on CPU), and all its results until
    its end. Parameters it only refers to, and a gradient that it has added to one is freed at once: besides
    this set there is never a second one.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[tuple[int, ...], ms.Type], list[Parameter]] = {}

    def matching(self, parameters: Sequence[Parameter]) -> ParameterTuple:
        """One buffer per parameter; later calls reuse those of the same shape and type."""
        taken: Counter[tuple[tuple[int, ...], ms.Type]] = Counter()
        chosen = []
        for parameter in parameters:
            kind = tuple(parameter.shape), parameter.dtype
            buffers = self._buffers.setdefault(kind, [])
            if taken[kind] == len(buffers):
                buffers.append(_new_buffer(*kind, number=len(buffers)))
            chosen.append(buffers[taken[kind]])
            taken[kind] += 1
        return ParameterTuple(chosen)


def clear(buffers: Sequence[Parameter]) -> None:
    """Sets all to zero, whatever they hold; on CPU a parameter's array is its memory, elsewhere a copy."""
    for buffer in buffers:
        if ms.get_context("device_target") == "CPU":
            buffer.asnumpy().fill(0)
        else:
            ops.assign(buffer, ops.zeros_like(buffer))


def _new_buffer(shape: tuple[int, ...], dtype: ms.Type, *, number: int) -> Parameter:
    sizes = "x".join(map(str, shape))
    zeros = Tensor(np.zeros(shape, np.float32)).astype(dtype)
    return Parameter(zeros, name=f"gradient.{dtype}.{sizes}.{number}", requires_grad=False)
