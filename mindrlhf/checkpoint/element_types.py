"""Element types of stored weights, without MindSpore or torch.

numpy has no bfloat16, so weights travel as *storage* arrays: bfloat16 as its raw uint16 bits, every
other type as itself. Only :func:`to_numpy` needs MindSpore, and only for bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mindrlhf.utils.errors import CheckpointError


@dataclass(frozen=True)
class ElementType:
    """One element type: its numpy-like name, storage type, and names in the two file formats."""

    name: str
    storage: np.dtype[Any]
    safetensors: str
    mindspore: str

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return self.storage.itemsize

    @property
    def is_weight(self) -> bool:
        """Whether a model's weights may have this type."""
        return self.name in ("float64", "float32", "float16", "bfloat16")

    def __str__(self) -> str:
        return self.name


def _element(name: str, storage: str, safetensors: str, mindspore: str) -> ElementType:
    return ElementType(name, np.dtype(storage), safetensors, mindspore)


FLOAT32 = _element("float32", "<f4", "F32", "Float32")
FLOAT16 = _element("float16", "<f2", "F16", "Float16")
BFLOAT16 = _element("bfloat16", "<u2", "BF16", "BFloat16")

ELEMENT_TYPES = (
    FLOAT32,
    FLOAT16,
    BFLOAT16,
    _element("float64", "<f8", "F64", "Float64"),
    _element("int8", "i1", "I8", "Int8"),
    _element("int16", "<i2", "I16", "Int16"),
    _element("int32", "<i4", "I32", "Int32"),
    _element("int64", "<i8", "I64", "Int64"),
    _element("uint8", "u1", "U8", "UInt8"),
    _element("uint16", "<u2", "U16", "UInt16"),
    _element("uint32", "<u4", "U32", "UInt32"),
    _element("uint64", "<u8", "U64", "UInt64"),
    _element("bool", "?", "BOOL", "Bool"),
)

BY_NAME = {element.name: element for element in ELEMENT_TYPES}
BY_SAFETENSORS = {element.safetensors: element for element in ELEMENT_TYPES}
BY_MINDSPORE = {element.mindspore: element for element in ELEMENT_TYPES}

_SHORT_NAMES = {"fp32": FLOAT32, "fp16": FLOAT16, "bf16": BFLOAT16}
OUTPUT_DTYPES = (*_SHORT_NAMES, *(element.name for element in _SHORT_NAMES.values()))


def parse_dtype(text: str) -> ElementType:
    """The element type called fp32, fp16, bf16, float32, float16 or bfloat16.

    Raises:
        CheckpointError: any other name.
    """
    found = _SHORT_NAMES.get(text) or BY_NAME.get(text)
    if found is None or text not in OUTPUT_DTYPES:
        raise CheckpointError(f"unknown dtype {text!r}: use one of {', '.join(OUTPUT_DTYPES)}")
    return found


def element_type(dtype: np.dtype[Any] | type) -> ElementType:
    """The element type of a numpy dtype, MindSpore's bfloat16 among them.

    Raises:
        CheckpointError: a type that weights files cannot hold.
    """
    name = np.dtype(dtype).name
    if name not in BY_NAME:
        raise CheckpointError(f"arrays of type {name} cannot be stored in a checkpoint")
    return BY_NAME[name]


def to_storage(array: np.ndarray) -> np.ndarray:
    """The storage array of ``array``: raw bits for bfloat16, little-endian values otherwise."""
    element = element_type(array.dtype)
    if element is BFLOAT16:
        return array.view(element.storage)
    return array.astype(element.storage, copy=False)


def to_numpy(storage: np.ndarray, element: ElementType) -> np.ndarray:
    """A storage array as numbers; bfloat16 becomes ``mindspore.common.np_dtype.bfloat16``."""
    if element is not BFLOAT16:
        return storage
    from mindspore.common.np_dtype import bfloat16

    return storage.view(bfloat16)


def cast(storage: np.ndarray, source: ElementType, target: ElementType) -> tuple[np.ndarray, bool]:
    """Converts a storage array, rounding to nearest even.

    Returns:
        the storage array in ``target``, and whether a finite value became infinite.
    """
    if source is target:
        return storage, False
    numbers = _bfloat16_to_float32(storage) if source is BFLOAT16 else storage
    if source.itemsize < target.itemsize:  # a wider float holds every value
        return numbers.astype(target.storage, copy=False), False
    with np.errstate(over="ignore", invalid="ignore"):
        if target is BFLOAT16:
            result = _float32_to_bfloat16(numbers.astype(np.float32))
            infinite = (result & 0x7FFF) == 0x7F80
        else:
            result = numbers.astype(target.storage)
            infinite = np.isinf(result)
    # Looking at the source only when there is an infinity at all keeps the common case to one pass.
    overflowed = bool(infinite.any()) and bool(np.isfinite(numbers[infinite]).any())
    return result, overflowed


def _bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _float32_to_bfloat16(numbers: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(numbers).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(BFLOAT16.storage)
    nan = np.isnan(numbers)
    if nan.any():  # rounding could carry a NaN's payload into the sign; keep its upper half and stay quiet
        rounded[nan] = (bits[nan] >> 16) | np.uint32(0x40)
    return rounded
