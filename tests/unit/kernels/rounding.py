"""What machines tests of kernels need, and what bfloat16 products are compared with."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from mindrlhf.kernels.library import KERNEL_FLAGS, NEEDED_FLAG, processor_flags

needs_bfloat16 = pytest.mark.skipif(
    NEEDED_FLAG not in processor_flags() or shutil.which("g++") is None, reason="needs avx512_bf16 and g++"
)

needs_kernels = pytest.mark.skipif(
    not processor_flags() >= KERNEL_FLAGS or shutil.which("g++") is None, reason="needs AVX-512 and g++"
)


def rounded(array: np.ndarray) -> np.ndarray:
    """float32 -> the nearest bfloat16, ties to even, as float64."""
    bits = array.astype(np.float32).view(np.uint32).astype(np.uint64)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype(np.uint32)
    return nearest.view(np.float32).astype(np.float64)
