"""Pieces of the decoder, by hand."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor

from mindrlhf.models.decoder import RMSNorm, hidden_keys, rotary_tables, rotate


def test_rotary_tables_and_rotation_turn_pairs_of_the_two_halves() -> None:
    cos, sin = rotary_tables(4, 3, 100.0)
    # Frequencies 100^0 and 100^(-2/4) = 0.1; the halves of the last axis are equal.
    angles = np.outer([0, 1, 2], [1.0, 0.1, 1.0, 0.1])
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-7)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-7)
    x = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
    table = [Tensor(part[2].reshape(1, 1, 1, 4)) for part in (cos, sin)]
    found = rotate(Tensor(x.reshape(1, 1, 1, 4)), *table).asnumpy().ravel()
    pairs = (x[:2] + 1j * x[2:]) * np.exp(1j * np.array([2.0, 0.2]))
    np.testing.assert_allclose(found, [*pairs.real, *pairs.imag], atol=1e-6)


def test_hidden_keys_are_later_ones_and_pads() -> None:
    valid = Tensor(np.array([[0, 1, 1], [1, 1, 0]], np.int32))
    expected = [
        [[[1, 1, 1], [1, 0, 1], [1, 0, 0]]],
        [[[0, 1, 1], [0, 0, 1], [0, 0, 1]]],
    ]
    np.testing.assert_array_equal(hidden_keys(valid, ms.float32).asnumpy(), expected)


def test_rms_norm() -> None:
    norm = RMSNorm(2, 1.0, ms.float32, ms.float32)
    norm.weight.set_data(Tensor([2.0, -1.0], ms.float32))
    # mean of squares (1 + 49) / 2 = 25, with eps 1: divide by sqrt(26).
    found = norm(Tensor([[1.0, 7.0]], ms.float32)).asnumpy()
    np.testing.assert_allclose(found, [[2 / 26**0.5, -7 / 26**0.5]], rtol=1e-6)
