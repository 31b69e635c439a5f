"""Names of number types in a YAML -> MindSpore's types."""

from __future__ import annotations

import mindspore as ms

_DTYPES = {"float32": ms.float32, "float16": ms.float16, "bfloat16": ms.bfloat16}


def ms_dtype(name: str) -> ms.dtype:
    """``"float32"``, ``"float16"`` or ``"bfloat16"`` as a MindSpore type; ``KeyError`` for anything else."""
    return _DTYPES[name]
