"""Kernels between the products against torch's autograd in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from tests.unit.kernels.rounding import needs_kernels

pytestmark = needs_kernels
torch = pytest.importorskip("torch")

# Rows and columns: one number; fewer than a vector; odd; many pieces of rows.
SHAPES = [(1, 2), (3, 10), (37, 130), (700, 96)]
EPS = 0.01


@pytest.fixture(scope="module", autouse=True)
def _graph_mode() -> None:
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")


def normalise(x: Any, weight: Any) -> Any:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * weight


def swiglu(gate: Any, up: Any) -> Any:
    return torch.nn.functional.silu(gate) * up


def rotate(x: Any, cos: Any, sin: Any) -> Any:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def softmax(scores: Any, mask: Any) -> Any:
    """Every head of a sequence has the mask of the sequence."""
    sequences, query_length, length = mask.shape
    heads = scores.reshape(sequences, -1, query_length, length)
    return torch.softmax(heads + mask[:, None], -1).reshape(scores.shape)


def cell(name: str) -> nn.Cell:
    from mindrlhf.kernels import fused_layers
    from mindrlhf.kernels.library import kernel_library

    library = kernel_library()
    return (
        fused_layers.KernelNormalise(library, EPS)
        if name == "Normalise"
        else getattr(fused_layers, f"Kernel{name}")(library)
    )


class Both(nn.Cell):
    def __init__(self, part: nn.Cell) -> None:
        super().__init__()
        self.part = part
        self.gradients = ops.GradOperation(get_all=True, sens_param=True)

    def construct(self, dy: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.part(*inputs), *self.gradients(self.part)(*inputs, dy)


def random(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return (2.0 * np.random.default_rng([seed, *shape]).standard_normal(shape)).astype(np.float32)


def check(name: str, reference: Callable[..., Any], inputs: list[np.ndarray], varied: int) -> None:
    """Result and gradients of the first ``varied`` inputs."""
    doubles = [torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in inputs]
    wanted = reference(*doubles)
    dy = random(tuple(wanted.shape), 9)
    wanted.backward(torch.tensor(dy, dtype=torch.float64))
    y, *gradients = Both(cell(name))(Tensor(dy), *map(Tensor, inputs))
    compared = zip(
        [y, *gradients[:varied]], [wanted.detach(), *(x.grad for x in doubles[:varied])], strict=True
    )
    for found, expected in compared:
        expected = expected.numpy()
        atol = 2e-6 * max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(found.asnumpy(), expected, rtol=2e-6, atol=atol)


@pytest.mark.parametrize("shape", SHAPES)
def test_normalise(shape: tuple[int, int]) -> None:
    check("Normalise", normalise, [random(shape, 1), random((1, shape[1]), 2)], 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(shape: tuple[int, int]) -> None:
    check("SwiGLU", swiglu, [random(shape, 1), random(shape, 2)], 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_rotary(shape: tuple[int, int]) -> None:
    # Tables whose halves differ, as no model has them, so that no number can be taken for another.
    check("Rotary", rotate, [random(shape, 1), random(shape, 2), random(shape, 3)], 1)


@pytest.mark.parametrize(
    ("sequences", "heads", "query_length", "length"), [(1, 1, 1, 1), (2, 3, 5, 7), (3, 8, 40, 33)]
)
def test_softmax(sequences: int, heads: int, query_length: int, length: int) -> None:
    mask = np.where(random((sequences, query_length, length), 2) > 1.0, np.float32(-1e9), np.float32(0.0))
    mask[..., 0] = 0.0
    check("Softmax", softmax, [random((sequences * heads * query_length, length), 1), mask], 1)


def test_extremes_and_nan() -> None:
    gate = np.array([[200.0, -200.0, 90.0, -90.0, np.nan, 0.0]], np.float32)
    found = Both(cell("SwiGLU"))(Tensor(np.ones_like(gate)), Tensor(gate), Tensor(np.ones_like(gate)))[0]
    np.testing.assert_allclose(found.asnumpy()[0], [200.0, 0.0, 90.0, 0.0, np.nan, 0.0], atol=1e-30)
    scores = np.array([[1.0, np.nan, 2.0], [300.0, -300.0, 299.0]], np.float32)
    none = np.zeros((1, 2, 3), np.float32)
    y = Both(cell("Softmax"))(Tensor(np.ones_like(scores)), Tensor(scores), Tensor(none))[0].asnumpy()
    pad = Both(cell("Softmax"))(Tensor(scores[1:]), Tensor(scores[1:] / 100), Tensor(none[:, 1:] - 1e9))[0]
    np.testing.assert_allclose(pad.asnumpy(), [[1 / 3] * 3], rtol=1e-6)  # sees nothing: an average, no NaN
    assert np.isnan(y[0]).all()
    np.testing.assert_allclose(y[1], [1 / (1 + np.exp(-1.0)), 0.0, 1 / (1 + np.e)], rtol=1e-6)


def test_sums_over_rows_are_the_same_to_the_bit_each_time() -> None:
    inputs = [Tensor(random((2000, 64), seed)) for seed in (1, 2)] + [Tensor(random((1, 64), 3))]
    both = Both(cell("Normalise"))
    first = both(*inputs)[2].asnumpy()
    for _ in range(5):
        np.testing.assert_array_equal(both(*inputs)[2].asnumpy(), first)
