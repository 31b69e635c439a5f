"""Element types of stored weights: numpy's, and bfloat16 from ``ml_dtypes``.

MindSpore has its own bfloat16 numpy type. Arrays cross between the two by their bits, in
:func:`from_mindspore` and :func:`to_mindspore`; only the latter imports MindSpore, and only for bfloat16.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from mindrlhf.utils.errors import CheckpointError

DType = np.dtype[Any]

BFLOAT16: DType = np.dtype(ml_dtypes.bfloat16)
FLOAT16: DType = np.dtype(np.float16)
FLOAT32: DType = np.dtype(np.float32)
FLOAT64: DType = np.dtype(np.float64)

WEIGHT_TYPES = (FLOAT32, FLOAT16, BFLOAT16, FLOAT64)
"""What a model's weights may be stored as."""

_TYPES: tuple[tuple[DType, str, str], ...] = (  # numpy's, safetensors' and MindSpore's name
    (FLOAT32, "F32", "Float32"),
    (FLOAT16, "F16", "Float16"),
    (BFLOAT16, "BF16", "BFloat16"),
    (FLOAT64, "F64", "Float64"),
    (np.dtype(np.int8), "I8", "Int8"),
    (np.dtype(np.int16), "I16", "Int16"),
    (np.dtype(np.int32), "I32", "Int32"),
    (np.dtype(np.int64), "I64", "Int64"),
    (np.dtype(np.uint8), "U8", "UInt8"),
    (np.dtype(np.uint16), "U16", "UInt16"),
    (np.dtype(np.uint32), "U32", "UInt32"),
    (np.dtype(np.uint64), "U64", "UInt64"),
    (np.dtype(np.bool_), "BOOL", "Bool"),
)

BY_NAME = {dtype.name: dtype for dtype, _, _ in _TYPES}
BY_SAFETENSORS = {name: dtype for dtype, name, _ in _TYPES}
BY_MINDSPORE = {name: dtype for dtype, _, name in _TYPES}
SAFETENSORS_NAMES = {dtype: name for name, dtype in BY_SAFETENSORS.items()}
MINDSPORE_NAMES = {dtype: name for name, dtype in BY_MINDSPORE.items()}

_SHORT_NAMES = {"fp32": FLOAT32, "fp16": FLOAT16, "bf16": BFLOAT16}
OUTPUT_DTYPES = (*_SHORT_NAMES, *(dtype.name for dtype in _SHORT_NAMES.values()))


def parse_dtype(text: str) -> DType:
    """The element type called fp32, fp16, bf16, float32, float16 or bfloat16.

    Raises:
        CheckpointError: any other name.
    """
    if text not in OUTPUT_DTYPES:
        raise CheckpointError(f"unknown dtype {text!r}: use one of {', '.join(OUTPUT_DTYPES)}")
    return _SHORT_NAMES[text] if text in _SHORT_NAMES else BY_NAME[text]


def element_type(dtype: DType | type) -> DType:
    """The element type in which an array of numpy type ``dtype``, or MindSpore's bfloat16, is stored.

    Raises:
        CheckpointError: a type that weights files cannot hold.
    """
    name = np.dtype(dtype).name
    if name not in BY_NAME:
        raise CheckpointError(f"arrays of type {name} cannot be stored in a checkpoint")
    return BY_NAME[name]


def from_mindspore(array: np.ndarray) -> np.ndarray:
    """``array`` itself, or a view in which MindSpore's bfloat16 is that of ``ml_dtypes``."""
    wanted = element_type(array.dtype)
    return array.view(wanted) if wanted == BFLOAT16 else array.astype(wanted, copy=False)


def to_mindspore(array: np.ndarray) -> np.ndarray:
    """``array`` itself, or a view in which bfloat16 is ``mindspore.common.np_dtype.bfloat16``."""
    if array.dtype != BFLOAT16:
        return array
    from mindspore.common.np_dtype import bfloat16

    return array.view(bfloat16)


def cast(array: np.ndarray, target: DType) -> tuple[np.ndarray, bool]:
    """Converts an array, rounding to nearest even.

    Returns:
        the array in ``target``, and whether a finite value became infinite.
    """
    if array.dtype == target:
        return array, False
    with np.errstate(over="ignore", invalid="ignore"):
        result = array.astype(target)
        if array.dtype.itemsize < target.itemsize:  # a wider float holds every value
            return result, False
        infinite = np.isinf(result)
    # Checking the source only when the result has an infinity keeps the common case to one pass.
    return result, bool(infinite.any() and np.isfinite(array[infinite]).any())
