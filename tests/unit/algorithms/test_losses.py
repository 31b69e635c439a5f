"""losses.py in a compiled graph, against hand-worked values.

tests/parity/test_formulas_losses.py holds terms and gradients against the formulas on random texts.
"""

from __future__ import annotations

from collections.abc import Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops

from mindrlhf.algorithms.losses import (
    POLICY_TERMS,
    VALUE_TERMS,
    cross_entropy_sum,
    entropy_sum,
    policy_loss_terms,
    value_loss_terms,
)

CLIP, CLAMP, CLIP_VALUE = 0.2, 20.0, 0.25
SHAPE = (2, 4)
MASK = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], dtype=bool)


def _policy(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    return policy_loss_terms(logprobs, old, advantages, mask, CLIP, CLAMP)


def _value(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    return value_loss_terms(values, old, returns, mask, CLIP_VALUE)


def _compiled(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[list[float], np.ndarray]]:
    graph = ms.jit(ops.value_and_grad(function, 0, has_aux=True))

    def run(*arrays_: np.ndarray) -> tuple[list[float], np.ndarray]:
        terms, gradient = graph(*[Tensor(array) for array in arrays_])
        return [float(term.asnumpy()) for term in terms], gradient.asnumpy()

    return run


@pytest.fixture(scope="module")
def policy() -> Callable[..., tuple[list[float], np.ndarray]]:
    ms.set_context(mode=ms.GRAPH_MODE)
    return _compiled(_policy)


@pytest.fixture(scope="module")
def value() -> Callable[..., tuple[list[float], np.ndarray]]:
    ms.set_context(mode=ms.GRAPH_MODE)
    return _compiled(_value)


def test_policy_loss_by_hand(policy) -> None:
    """Ratios 2, 2, 0.5, - / 0.5, 1 with both signs of the advantage: every branch of the clip."""
    ratio = np.array([[2.0, 2.0, 0.5, 1.0], [0.5, 1.0, 1.0, 1.0]], dtype=np.float32)
    advantages = np.array([[1.0, -1.0, 1.0, 5.0], [-1.0, 3.0, 5.0, 5.0]], dtype=np.float32)
    terms, gradient = policy(np.log(ratio), np.zeros(SHAPE, np.float32), advantages, MASK)
    # -1.2 (clipped, no gradient), 2, -0.5, | 0.8 (clipped, no gradient), -3
    assert terms[0] == pytest.approx(-1.2 + 2.0 - 0.5 + 0.8 - 3.0, rel=1e-6)
    expected = [[0.0, 2.0, -0.5, 0.0], [0.0, -3.0, 0.0, 0.0]]
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-7)
    stats = dict(zip(POLICY_TERMS, terms, strict=True))
    assert stats["clipfrac"] == 2.0
    assert stats["ratio"] == pytest.approx(2 + 2 + 0.5 + 0.5 + 1, rel=1e-6)
    assert stats["ratio_squared"] == pytest.approx(4 + 4 + 0.25 + 0.25 + 1, rel=1e-6)
    assert stats["approxkl"] == pytest.approx(0.5 * 4 * np.log(2.0) ** 2, rel=1e-6)


def test_first_step_has_the_plain_policy_gradient(policy) -> None:
    """Before any update both branches are equal everywhere; the gradient must be -A, not 0 and not -2A."""
    logprobs = np.full(SHAPE, -1.5, np.float32)
    advantages = np.arange(8, dtype=np.float32).reshape(SHAPE) - 3.0
    terms, gradient = policy(logprobs, logprobs, advantages, MASK)
    np.testing.assert_allclose(gradient, np.where(MASK, -advantages, 0.0), rtol=1e-6)
    assert terms[1:] == [0.0, 0.0, 5.0, 5.0]


def test_value_loss_by_hand(value) -> None:
    """Old value 0, clip 0.25: inside; above and away from the return; above and beyond it; below."""
    values = np.array([[0.2, 1.0, 1.0, 9.0], [-1.0, 0.0, 9.0, 9.0]], dtype=np.float32)
    returns = np.array([[1.0, 1.0, -1.0, 0.0], [-2.0, 0.5, 0.0, 0.0]], dtype=np.float32)
    terms, gradient = value(values, np.zeros(SHAPE, np.float32), returns, MASK)
    squares = [0.8**2, 0.75**2, 2.0**2, 1.75**2, 0.5**2]
    assert terms[0] == pytest.approx(0.5 * sum(squares), rel=1e-6)
    # Clipped ones have no gradient; the others (V - R).
    np.testing.assert_allclose(gradient, [[-0.8, 0.0, 2.0, 0.0], [0.0, -0.5, 0.0, 0.0]], rtol=1e-6, atol=1e-7)
    stats = dict(zip(VALUE_TERMS, terms, strict=True))
    assert stats["value_clipfrac"] == 2.0
    assert stats["value_error"] == pytest.approx(0.64 + 0.0 + 4.0 + 1.0 + 0.25, rel=1e-6)


@pytest.mark.parametrize("rubbish", [np.nan, np.inf, -np.inf, 3e38, -1e4])
def test_rubbish_outside_the_mask_changes_nothing(policy, value, rubbish: float) -> None:
    rng = np.random.default_rng(0)
    clean = [rng.normal(size=SHAPE).astype(np.float32) for _ in range(3)]
    for run in (policy, value):
        terms, gradient = run(*clean, MASK)
        for which in range(3):
            dirty = [array.copy() for array in clean]
            dirty[which][~MASK] = rubbish
            got_terms, got_gradient = run(*dirty, MASK)
            assert got_terms == terms
            np.testing.assert_array_equal(got_gradient, gradient)
            np.testing.assert_array_equal(got_gradient[~MASK], 0.0)


@pytest.mark.parametrize(("logprob", "old"), [(0.0, -500.0), (-500.0, 0.0)])
def test_extreme_ratios_stay_finite(policy, logprob: float, old: float) -> None:
    for sign in (1.0, -1.0):
        terms, gradient = policy(
            np.full(SHAPE, logprob, np.float32),
            np.full(SHAPE, old, np.float32),
            np.full(SHAPE, sign, np.float32),
            MASK,
        )
        assert np.isfinite(terms).all()
        np.testing.assert_array_equal(gradient, 0.0)


def test_sums_add_up_over_rows(policy, value) -> None:
    """The sums of two micro-batches are the sums of the batch."""
    rng = np.random.default_rng(1)
    whole = [rng.normal(size=SHAPE).astype(np.float32) for _ in range(3)]
    for run in (policy, value):
        terms, gradient = run(*whole, MASK)
        parts = [run(*[array[i : i + 1] for array in whole], MASK[i : i + 1]) for i in range(2)]
        np.testing.assert_allclose(np.sum([part[0] for part in parts], axis=0), terms, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(np.concatenate([part[1] for part in parts]), gradient)


def test_only_the_new_policy_and_values_get_a_gradient() -> None:
    arrays_ = [Tensor(np.full(SHAPE, 0.3 * k, np.float32)) for k in (1, 2, 3)] + [Tensor(MASK)]
    for function in (_policy, _value):
        graph = ms.jit(ops.value_and_grad(function, (0, 1, 2), has_aux=True))
        _, gradients = graph(*arrays_)
        assert np.abs(gradients[0].asnumpy()).max() > 0
        for gradient in gradients[1:]:
            np.testing.assert_array_equal(gradient.asnumpy(), 0.0)


def test_float16_inputs_and_integer_masks(policy) -> None:
    half = [np.full(SHAPE, k, np.float16) for k in (-1.0, -1.0, 2.0)]
    terms, gradient = policy(*half, MASK.astype(np.int32))
    assert terms[0] == -10.0
    np.testing.assert_array_equal(gradient, np.where(MASK, -2.0, 0.0))


def test_entropy_and_cross_entropy_sums_by_hand() -> None:
    ms.set_context(mode=ms.GRAPH_MODE)
    x = np.array([[-1.0, -2.5, 0.5, np.inf], [-3.0, 4.0, np.nan, -np.inf]], np.float32)
    for function, sign in ((entropy_sum, 1.0), (cross_entropy_sum, -1.0)):
        value, gradient = ms.jit(ops.value_and_grad(function, 0))(Tensor(x), Tensor(MASK))
        assert float(value.asnumpy()) == pytest.approx(sign * (-1.0 - 2.5 + 0.5 - 3.0 + 4.0), rel=1e-6)
        np.testing.assert_array_equal(gradient.asnumpy(), sign * MASK)
