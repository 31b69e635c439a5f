"""Pieces of networks: their gradients are those of their cells, and are summed by name in float32."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

from mindrlhf.models.pieces import Gradients, Piece, Recomputed, Weights

ROWS, INPUTS, OUTPUTS = 5, 4, 3


@pytest.fixture(autouse=True)
def _graph_mode() -> None:
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")


class Squares(nn.Cell):
    """``factor (x W)^2 + b``, and ``x W`` beside it."""

    def construct(self, x: Tensor, factor: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        product = ops.matmul(x, weight)
        return factor * product * product + bias, product


class SquaresGradient(nn.Cell):
    """Written out; takes ``x W``."""

    def construct(
        self,
        dout: Tensor,
        kept: tuple[Tensor, ...],
        x: Tensor,
        factor: Tensor,
        weight: Tensor,
        bias: Tensor,
    ) -> tuple[Tensor, ...]:
        d_product = 2.0 * dout * factor * kept[0]
        return ops.matmul(d_product, weight.T), ops.matmul(x.T, d_product), dout.sum(axis=0)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


X, FACTOR, DOUT = normal(ROWS, INPUTS), normal(ROWS, OUTPUTS), normal(ROWS, OUTPUTS)[::-1].copy()
WEIGHTS = {"weight": normal(INPUTS, OUTPUTS), "bias": normal(OUTPUTS)}


def weights() -> Weights:
    parameters = {name: Parameter(Tensor(array), name=name) for name, array in WEIGHTS.items()}
    return Weights({**parameters, "other": Parameter(Tensor(X), name="other")}, WEIGHTS)


@pytest.mark.parametrize("kind", ["any cell", "kept", "recomputed"])
def test_gradients_equal_those_of_the_cell(kind: str) -> None:
    cell, written_out = Squares(), SquaresGradient()
    d_product = np.zeros_like(DOUT)  # of the second result, which no gradient that is written out has
    if kind == "any cell":
        piece, d_product = Piece(cell, inputs=1, constants=1), normal(OUTPUTS, ROWS).T.copy()
    elif kind == "kept":
        piece = Piece(cell, inputs=1, constants=1, gradient=written_out)
    else:
        piece = Piece(cell, inputs=1, constants=1, gradient=Recomputed(cell, written_out))
    args, gradients = (Tensor(X), Tensor(FACTOR)), Gradients()
    y, product = piece(*args, *weights().tensors)
    np.testing.assert_allclose(product.asnumpy(), X @ WEIGHTS["weight"], atol=1e-6)
    np.testing.assert_allclose(y.asnumpy(), FACTOR * product.asnumpy() ** 2 + WEIGHTS["bias"], atol=1e-6)

    def total(*inputs: Tensor) -> Tensor:
        y, product = cell(*inputs)
        return (y * Tensor(DOUT)).sum() + (product * Tensor(d_product)).sum()

    wanted = ops.grad(total, (0, 2, 3))(*args, *weights().tensors)
    douts = (Tensor(DOUT), Tensor(d_product)) if kind == "any cell" else (Tensor(DOUT),)
    kept = (product,) if kind == "kept" else ()
    for times in (1, 2):
        dx = piece.backward(douts, args, weights(), gradients, kept)
        assert dx is not None
        found = dx * times, gradients["weight"], gradients["bias"]
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one.asnumpy(), times * other.asnumpy(), rtol=1e-6, atol=1e-6)


def test_without_an_input_there_are_gradients_of_weights_only() -> None:
    class Rows(nn.Cell):
        def construct(self, numbers: Tensor, table: Tensor) -> Tensor:
            return ops.gather(table, numbers, 0)

    table = Weights({"table": Parameter(Tensor(X), name="table")}, ["table"])
    numbers, gradients = Tensor([1, 3, 1], ms.int32), Gradients()
    piece, dout = Piece(Rows(), inputs=0, constants=1), normal(3, INPUTS)
    assert piece.backward((Tensor(dout),), (numbers,), table, gradients) is None
    wanted = np.zeros_like(X)
    np.add.at(wanted, [1, 3, 1], dout)
    np.testing.assert_allclose(gradients["table"].asnumpy(), wanted, atol=1e-6)


def test_weights_are_those_of_the_moment() -> None:
    parameters = {name: Parameter(Tensor(array), name=name) for name, array in WEIGHTS.items()}
    found = Weights(parameters, ["bias", "weight"])
    for change in (lambda p: p.set_data(p * 2.0), lambda p: ops.assign(p, p * 2.0)):
        for parameter in parameters.values():
            change(parameter)
        for name, tensor in zip(found.names, found.tensors, strict=True):
            assert not isinstance(tensor, Parameter)
            np.testing.assert_array_equal(tensor.asnumpy(), parameters[name].asnumpy())
    np.testing.assert_array_equal(found.tensors[0].asnumpy(), 4 * WEIGHTS["bias"])


@pytest.mark.parametrize("dtype", [ms.float32, ms.bfloat16, ms.float16])
def test_gradients_are_summed_in_float32(dtype: ms.Type) -> None:
    """4096 + 1 is 4096 in the smaller types."""
    gradients = Gradients()
    for value in (4096.0, 1.0, 1.0):
        gradients.add(("a",), (Tensor([value], ms.float32).astype(dtype),))
    assert gradients["a"].dtype == ms.float32
    assert gradients["a"].asnumpy().tolist() == [4098.0]


def test_each_name_has_one_gradient() -> None:
    with pytest.raises(ValueError, match="shorter"):
        Gradients().add(("a", "b"), (Tensor(X),))


def test_what_has_been_cleared_does_not_come_back() -> None:
    gradients = Gradients()
    gradients.add(("a",), (Tensor(X),))
    gradients.clear()
    gradients.add(("a",), (Tensor(2 * X),))
    np.testing.assert_array_equal(gradients["a"].asnumpy(), 2 * X)
