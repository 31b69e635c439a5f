"""bfloat16 products and their gradients against float64 products of rounded operands."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from tests.unit.kernels.rounding import needs_bfloat16, rounded

pytestmark = needs_bfloat16

# Rows, inputs, outputs: one element; one row; odd; more outputs than rows; blocks of rows; of columns.
SIZES = [(1, 1, 1), (1, 64, 40), (77, 130, 33), (17, 16, 515), (1500, 24, 48), (40, 32, 1111)]


@pytest.fixture(scope="module", autouse=True)
def _graph_mode() -> None:
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")


class WithGradients(nn.Cell):
    """A product, and the gradients of its sum weighted by ``dy``."""

    def __init__(self) -> None:
        super().__init__()
        from mindrlhf.kernels.bf16_products import bfloat16_rows_product

        self.product = bfloat16_rows_product()
        self.gradients = ops.GradOperation(get_all=True, sens_param=True)

    def construct(self, x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.product(x, weight), *self.gradients(self.product)(x, weight, dy)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def check(found: Tensor, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found.asnumpy(), wanted, rtol=0, atol=2e-6 * max(1.0, np.abs(wanted).max()))


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SIZES)
def test_product_and_gradients(rows: int, inputs: int, outputs: int) -> None:
    x, weight, dy = random(rows, inputs), random(outputs, inputs, seed=1), random(rows, outputs, seed=2)
    y, d_x, d_weight = WithGradients()(Tensor(x), Tensor(weight), Tensor(dy))
    check(y, rounded(x) @ rounded(weight).T)
    check(d_x, rounded(dy) @ rounded(weight))
    check(d_weight, rounded(dy).T @ rounded(x))
    if rows * inputs > 1:
        exact = x.astype(np.float64) @ weight.T.astype(np.float64)
        assert np.abs(y.asnumpy() - exact).max() > 1e-4, "operands must have been rounded"


def test_ties_go_to_even_and_infinities_and_nan_stay() -> None:
    one = np.float32(1.0)
    # Half way between two neighbours, whose last bit is even below in the first and above in the second.
    ties = np.array([one + 2.0**-8, one + 3 * 2.0**-8, -one - 2.0**-8, 3.4e38, np.inf, -np.inf, np.nan])
    x = ties.astype(np.float32)[:, None]
    found = WithGradients()(Tensor(x), Tensor(np.ones((1, 1), np.float32)), Tensor(np.ones_like(x)))[0]
    wanted = [1.0, 1.0 + 2.0**-6, -1.0, np.inf, np.inf, -np.inf, np.nan]
    np.testing.assert_array_equal(found.asnumpy()[:, 0], np.array(wanted, np.float32))


def test_the_same_product_gives_the_same_bits_and_depends_on_no_earlier_one() -> None:
    cell, small = WithGradients(), WithGradients()
    arrays = [Tensor(random(*shape)) for shape in ((1500, 64), (300, 64), (1500, 300))]
    first = [output.asnumpy() for output in cell(*arrays)]
    small(*(Tensor(random(*shape)) for shape in ((3, 8), (5, 8), (3, 5))))
    for output, before in zip(cell(*arrays), first, strict=True):
        np.testing.assert_array_equal(output.asnumpy(), before)


def test_a_layer_with_many_rows_in_more_dimensions() -> None:
    from mindrlhf.parallel.tensor_parallel import RowsProduct

    x, weight = random(2, 3, 8), random(5, 8, seed=1)
    y = RowsProduct(ms.float32, "bfloat16")(Tensor(x), Tensor(weight))
    assert y.shape == (2, 3, 5)
    assert y.dtype == ms.float32
    check(y, rounded(x) @ rounded(weight).T)
