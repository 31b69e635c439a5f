"""Pieces of the decoder, by hand."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from mindrlhf.configs.keys import ModelConfig
from mindrlhf.models.qwen2.layers import (
    Reorder,
    RMSNorm,
    Rotary,
    Softmax,
    SwiGLU,
    causal_padding_mask,
    rotary_tables,
    rotate,
    transposed_rows,
)
from mindrlhf.parallel.tensor_parallel import AddBias

torch = pytest.importorskip("torch")


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


def test_causal_padding_mask_are_later_ones_and_pads() -> None:
    valid = Tensor(np.array([[0, 1, 1], [1, 1, 0]], np.int32))
    expected = [
        [[[1, 1, 1], [1, 0, 1], [1, 0, 0]]],
        [[[0, 1, 1], [0, 0, 1], [0, 0, 1]]],
    ]
    np.testing.assert_array_equal(causal_padding_mask(valid, ms.float32).asnumpy(), expected)


def test_rms_norm() -> None:
    # mean of squares (1 + 49) / 2 = 25, with eps 0.999: divide by sqrt(25.999).
    found = norm(2, 0.999)(Tensor([[1.0, 7.0]], ms.float32), Tensor([2.0, -1.0], ms.float32)).asnumpy()
    np.testing.assert_allclose(found, [[2 / 25.999**0.5, -7 / 25.999**0.5]], rtol=1e-6)


def norm(size: int, eps: float) -> RMSNorm:
    return RMSNorm(
        ModelConfig(
            vocab_size=8,
            hidden_size=size,
            num_layers=1,
            num_heads=1,
            n_kv_heads=1,
            intermediate_size=4,
            rms_norm_eps=eps,
        )
    )


def gradients(cell: nn.Cell, weighted_by: np.ndarray, *inputs: np.ndarray) -> list[np.ndarray]:
    """Of ``sum(cell(*inputs) * weighted_by)``, in graph mode."""
    ms.set_context(mode=ms.GRAPH_MODE)

    def total(*tensors: Tensor) -> Tensor:
        return (cell(*tensors) * Tensor(weighted_by)).sum()

    places = tuple(range(len(inputs)))
    found = ops.grad(total, places)(*map(Tensor, inputs))
    return [gradient.asnumpy() for gradient in (found if isinstance(found, tuple) else (found,))]


def torch_gradients(function: Any, weighted_by: np.ndarray, *inputs: np.ndarray) -> list[np.ndarray]:
    tensors = [torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in inputs]
    (function(*tensors) * torch.tensor(weighted_by)).sum().backward()
    return [tensor.grad.numpy() for tensor in tensors]


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def test_gradients_of_rms_norm_equal_torch() -> None:
    x, weight, weighted_by = normal(10, 8), normal(8), normal(10, 8)[::-1].copy()
    expected = torch_gradients(
        lambda x, w: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-3) * w, weighted_by, x, weight
    )
    for found, wanted in zip(gradients(norm(8, 1e-3), weighted_by, x, weight), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_gradients_of_swiglu_equal_torch() -> None:
    gate, up, weighted_by = 4 * normal(6, 7), normal(7, 6).reshape(6, 7), normal(6, 7)[::-1].copy()
    expected = torch_gradients(lambda g, u: torch.nn.functional.silu(g) * u, weighted_by, gate, up)
    for found, wanted in zip(gradients(SwiGLU(), weighted_by, gate, up), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_gradient_of_the_rotation_turns_back() -> None:
    cos, sin = rotary_tables(8, 5, 100.0)
    x, weighted_by = normal(5, 8), normal(8, 5).reshape(5, 8)
    found = gradients(Rotary(), weighted_by, x, cos, sin)[0]
    back = rotate(Tensor(weighted_by), Tensor(cos), Tensor(-sin)).asnumpy()
    np.testing.assert_allclose(found, back, atol=1e-6)


def test_gradient_of_softmax_equals_torch() -> None:
    x, weighted_by = 3 * normal(5, 9), normal(9, 5).reshape(5, 9)
    x[0, 4:] = -1.0e9  # masked keys
    expected = torch_gradients(lambda x: torch.softmax(x, -1), weighted_by, x)[0]
    found = gradients(Softmax(), weighted_by, x)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert not found[0, 4:].any()


def test_gradients_of_a_bias_equal_torch() -> None:
    x, bias, weighted_by = normal(6, 5), normal(5), normal(5, 6).reshape(6, 5)
    expected = torch_gradients(lambda x, b: x + b, weighted_by, x, bias)
    for found, wanted in zip(gradients(AddBias(), weighted_by, x, bias), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


def test_rows_swap_places_and_their_gradients_go_back() -> None:
    ms.set_context(mode=ms.GRAPH_MODE)
    batch, length, heads, size = 2, 3, 4, 5
    x, weighted_by = normal(batch * length * heads, size), normal(batch * heads * length, size, 1)[..., 0]
    order, back = transposed_rows(batch, length, heads), transposed_rows(batch, heads, length)
    found = Reorder()(Tensor(x), order, back).asnumpy()
    expected = x.reshape(batch, length, heads, size).transpose(0, 2, 1, 3).reshape(-1, size)
    np.testing.assert_array_equal(found, expected)

    def total(x: Tensor) -> Tensor:
        return (Reorder()(x, order, back) * Tensor(weighted_by)).sum()

    found = ops.grad(total)(Tensor(x)).asnumpy()
    expected = weighted_by.reshape(batch, heads, length, size).transpose(0, 2, 1, 3).reshape(-1, size)
    np.testing.assert_array_equal(found, expected)
