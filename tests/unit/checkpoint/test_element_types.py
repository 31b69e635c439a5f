from __future__ import annotations

import numpy as np
import pytest

from mindrlhf.checkpoint.element_types import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    cast,
    element_type,
    from_mindspore,
    parse_dtype,
    to_mindspore,
)
from mindrlhf.utils.errors import CheckpointError


def test_float32_to_bfloat16_rounds_to_nearest_even():
    # bfloat16 keeps 7 fraction bits: between 1 and 1 + 2^-7 the middle goes to the even neighbour.
    numbers = [1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -2.0, 0.0, -0.0]
    bits = cast(np.array(numbers, np.float32), BFLOAT16)[0].view(np.uint16)
    assert bits.tolist() == [0x3F80, 0x3F80, 0x3F82, 0x3F81, 0xC000, 0x0000, 0x8000]


@pytest.mark.filterwarnings("error")
def test_nan_and_infinity_stay_what_they_are():
    numbers = np.array([0x7FFFFFFF, 0x7F800001, 0xFFC00000, 0x7F800000, 0xFF800000], np.uint32)
    narrow, overflowed = cast(numbers.view(np.float32), BFLOAT16)
    back, _ = cast(narrow, FLOAT32)
    assert np.isnan(back[:3]).all()
    assert back[3:].tolist() == [np.inf, -np.inf]
    assert not overflowed


@pytest.mark.parametrize(
    ("number", "target", "overflows"),
    [
        (65504.0, FLOAT16, False),
        (65519.0, FLOAT16, False),  # rounds down to the largest float16
        (65520.0, FLOAT16, True),
        (-1e6, FLOAT16, True),
        (np.inf, FLOAT16, False),
        (3.3e38, BFLOAT16, False),
        (3.4e38, BFLOAT16, True),
        (np.nan, FLOAT16, False),
    ],
)
def test_overflow_is_a_finite_value_that_becomes_infinite(number, target, overflows):
    array = np.array([[0.5, number]], np.float32)
    assert cast(array, target)[1] is overflows


def test_every_bfloat16_and_float16_survives_float32():
    bits = np.arange(65536, dtype=np.uint16)
    for narrow in (BFLOAT16, FLOAT16):
        wide, _ = cast(bits.view(narrow), FLOAT32)
        finite = ~np.isnan(wide)
        back, _ = cast(wide, narrow)
        assert np.array_equal(back.view(np.uint16)[finite], bits[finite])


def test_casts_equal_torch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    numbers = (rng.normal(size=50_000) * np.exp(rng.normal(size=50_000) * 5)).astype(np.float32)
    tensor = torch.from_numpy(numbers)
    as_bf16 = tensor.to(torch.bfloat16)
    narrow = cast(numbers, BFLOAT16)[0]
    assert np.array_equal(narrow.view(np.int16), as_bf16.view(torch.int16).numpy())
    assert np.array_equal(cast(numbers, FLOAT16)[0], tensor.to(torch.float16).numpy())
    assert np.array_equal(cast(narrow, FLOAT16)[0], as_bf16.to(torch.float16).numpy())


def test_bfloat16_crosses_to_mindspore_and_back():
    from mindspore.common.np_dtype import bfloat16

    array = np.array([1.5, -2.0], np.float32).astype(bfloat16)
    assert element_type(array.dtype) == BFLOAT16
    ours = from_mindspore(array)
    assert ours.dtype == BFLOAT16
    assert ours.view(np.uint16).tolist() == [0x3FC0, 0xC000]
    assert to_mindspore(ours).dtype == bfloat16
    assert from_mindspore(ours) is not None
    assert to_mindspore(np.ones(2, np.int8)).dtype == np.int8


def test_names():
    assert parse_dtype("bf16") == parse_dtype("bfloat16") == BFLOAT16
    with pytest.raises(CheckpointError, match=r"'int8'.*fp32, fp16, bf16"):
        parse_dtype("int8")
    with pytest.raises(CheckpointError, match="complex128"):
        element_type(np.dtype(np.complex128))
