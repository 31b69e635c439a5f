"""Policy loss and value loss, their statistics and gradients, against the published formulas.

The references are written here from the formulas, token by token in Python's float64; gradients are derived
by hand, and held against central differences of the same loops. What is tested runs in a compiled graph.

Sources: [TRL] huggingface/trl, ``PPOTrainer.loss`` (0.11), ``PPOTrainer.train`` (from 0.12 on); arXiv
1707.06347, equation 7. Tolerances: ``formula_batches.py``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import Tensor, ops

from mindrlhf.algorithms.losses import POLICY_TERMS, VALUE_TERMS, policy_loss_terms, value_loss_terms
from tests.parity.formula_batches import EIGHT_UNITS, Texts, central_difference, exp_error, texts

CLAMP = 20.0

CASES = {(1, 1): 0.2, (1, 6): 0.1, (3, 4): 0.2, (4, 7): 0.4}
"""(B, R) -> cliprange."""

Matrix = list[list[float]]
Run = Callable[..., tuple[list[float], np.ndarray]]


@pytest.fixture(scope="module", autouse=True)
def _graph_mode() -> None:
    ms.set_context(mode=ms.GRAPH_MODE)


@functools.cache
def compiled(terms: Callable[..., Any], *settings_: float) -> Run:
    """The terms and the gradient of the first of them by the first argument."""

    def function(*tensors: Tensor) -> Any:
        return terms(*tensors, *settings_)

    graph = ms.jit(ops.value_and_grad(function, 0, has_aux=True))

    def run(*arrays: np.ndarray) -> tuple[list[float], np.ndarray]:
        found, gradient = graph(*[Tensor(array) for array in arrays])
        return [float(term.asnumpy()) for term in found], gradient.asnumpy()

    return run


class Reference(NamedTuple):
    """Sums over the real tokens and the gradient (B, R) of the first of them, with the tolerance of each."""

    sums: list[float]
    tolerances: list[float]
    gradient: np.ndarray
    gradient_tolerance: np.ndarray


class Token(NamedTuple):
    """One token's terms, and the slope of the first by the first argument, with tolerances."""

    terms: list[float]
    tolerances: list[float]
    slope: float
    slope_tolerance: float


def policy_token(new: float, old: float, advantage: float, cliprange: float) -> Token:
    """[TRL], equation 7: loss, approxkl, whether clipped, ratio and its square.

    The loss is ``-A exp(new - old)``, whose slope is itself, unless the clip, a constant, is greater.
    """
    ratio = math.exp(max(-CLAMP, min(CLAMP, new - old)))
    clipped_ratio = max(1.0 - cliprange, min(1.0 + cliprange, ratio))
    loss, clipped_loss = -advantage * ratio, -advantage * clipped_ratio
    approxkl = 0.5 * (new - old) ** 2
    gone_too_far = ratio > 1.0 + cliprange if advantage > 0 else ratio < 1.0 - cliprange
    error = exp_error(new - old)
    return Token(
        [max(loss, clipped_loss), approxkl, float(clipped_loss > loss), ratio, ratio**2],
        [
            max(abs(loss), abs(clipped_loss)) * error,
            approxkl * EIGHT_UNITS,
            0.0,
            ratio * error,
            2 * ratio**2 * error,
        ],
        0.0 if gone_too_far or abs(new - old) > CLAMP else loss,
        abs(loss) * error,
    )


def value_token(new: float, old: float, target: float, cliprange: float) -> Token:
    """[TRL]: loss, whether clipped, and squared error.

    The loss is ``(V - R)^2 / 2``, of slope ``V - R``, unless the clipped value, a constant, is the worse.
    """
    clipped = max(old - cliprange, min(old + cliprange, new))
    error, clipped_error = (new - target) ** 2, (clipped - target) ** 2
    # The clipped value errs by half a unit of itself, its squared error by that times twice the error.
    largest = max(abs(new), abs(old), abs(target), cliprange)
    worst = max(abs(new - target), abs(clipped - target))
    return Token(
        [0.5 * max(error, clipped_error), float(clipped_error > error), error],
        [EIGHT_UNITS * largest * worst, 0.0, EIGHT_UNITS * error],
        0.0 if clipped_error > error else new - target,
        EIGHT_UNITS * largest,
    )


def reference(
    token: Callable[..., Token], batch: Texts, arrays: Sequence[np.ndarray], cliprange: float
) -> Reference:
    """Loops over the real tokens."""
    gradient, gradient_tolerance = np.zeros(batch.shape), np.zeros(batch.shape)
    tokens = []
    for place in batch.places:
        tokens.append(token(*(float(array[place]) for array in arrays), cliprange))
        gradient[place], gradient_tolerance[place] = tokens[-1].slope, tokens[-1].slope_tolerance
    terms = zip(*(one.terms for one in tokens), strict=True)
    tolerances = zip(*(one.tolerances for one in tokens), strict=True)
    return Reference(
        [math.fsum(term) for term in terms], [math.fsum(t) for t in tolerances], gradient, gradient_tolerance
    )


def policy_inputs(batch: Texts, spread: float, edge: float, kind: str) -> list[np.ndarray]:
    """New and old log-probs and advantages; none within 1e-4 of where the clip begins, in either dtype."""
    rng = np.random.default_rng(batch.seed)
    old = -np.abs(rng.normal(0, 3, batch.shape)).astype(np.float32)
    new = (old + rng.normal(0, spread, batch.shape)).astype(np.float32)
    ratio = np.exp(new.astype(np.float64) - old)
    at_edge = (np.abs(ratio - (1 - edge)) < 1e-4) | (np.abs(ratio - (1 + edge)) < 1e-4)
    new[at_edge] = old[at_edge]
    advantages = rng.normal(0, 1, batch.shape)
    if kind == "constant":
        advantages = np.full(batch.shape, advantages[0, 0])
    if kind == "zero":
        advantages = np.zeros(batch.shape)
    return [new, old, advantages.astype(np.float32)]


def assert_equal(run: Run, inputs: Sequence[np.ndarray], batch: Texts, wanted: Reference) -> None:
    terms, gradient = run(*batch.rubbish_behind(*inputs), batch.mask)
    for found, expected, tolerance in zip(terms, wanted.sums, wanted.tolerances, strict=True):
        assert found == pytest.approx(expected, rel=0, abs=tolerance)
    assert (np.abs(gradient - wanted.gradient) <= wanted.gradient_tolerance).all()
    assert (gradient[~batch.mask] == 0).all()


SPREADS = st.sampled_from([0.0, 0.01, 0.3, 1.0])


@settings(deadline=None)
@given(batch=texts(), spread=SPREADS, kind=st.sampled_from(["random", "random", "constant", "zero"]))
def test_policy_loss_statistics_and_gradient_equal_the_formula(
    batch: Texts, spread: float, kind: str
) -> None:
    """A spread of 0 is the first step of every iteration: all ratios are 1, clip and ratio tie."""
    cliprange = CASES[batch.shape]
    inputs = policy_inputs(batch, spread, cliprange, kind)
    wanted = reference(policy_token, batch, inputs, cliprange)
    assert_equal(compiled(policy_loss_terms, cliprange, CLAMP), inputs, batch, wanted)


@settings(deadline=None)
@given(
    distance=st.integers(-60 * 8, 60 * 8).map(lambda n: n / 8).filter(lambda d: abs(d) != CLAMP),
    advantage=st.sampled_from([1.5, -1.5, 0.0]),
)
def test_policy_loss_beyond_the_clamp_of_the_log_ratio(distance: float, advantage: float) -> None:
    batch = Texts((1, 1), [1], 0)
    inputs = [np.full((1, 1), number, np.float32) for number in (distance, 0.0, advantage)]
    wanted = reference(policy_token, batch, inputs, 0.2)
    assert_equal(compiled(policy_loss_terms, 0.2, CLAMP), inputs, batch, wanted)


def value_inputs(batch: Texts, spread: float, cliprange: float) -> list[np.ndarray]:
    """New and old values and returns; none within 1e-4 of where the clip begins or where the errors tie.

    They are multiples of 1/1024, whose sums and differences float32 gives exactly.
    """
    rng = np.random.default_rng(batch.seed)
    old = rng.normal(0, 1, batch.shape)
    new, targets = old + rng.normal(0, spread, batch.shape), old + rng.normal(0, 0.5, batch.shape)
    old, new, targets = (np.round(array * 1024) / 1024 for array in (old, new, targets))
    distance = new - old
    clipped = old + np.clip(distance, -cliprange, cliprange)
    tie = np.abs(np.abs(clipped - targets) - np.abs(new - targets)) < 1e-4
    at_edge = np.abs(np.abs(distance) - cliprange) < 1e-4
    unclear = at_edge | (tie & (np.abs(distance) > cliprange))
    return [np.where(unclear, old, new), old, targets]


@settings(deadline=None)
@given(batch=texts(), spread=SPREADS)
def test_value_loss_and_gradient_equal_the_formula(batch: Texts, spread: float) -> None:
    cliprange = CASES[batch.shape]
    inputs = value_inputs(batch, spread, cliprange)
    wanted = reference(value_token, batch, inputs, cliprange)
    assert_equal(compiled(value_loss_terms, cliprange), inputs, batch, wanted)


def test_terms_are_named_in_the_order_of_the_references() -> None:
    assert POLICY_TERMS == ("policy_loss", "approxkl", "clipfrac", "ratio", "ratio_squared")
    assert VALUE_TERMS == ("value_loss", "value_clipfrac", "value_error")


def test_values_within_the_range_are_never_counted_as_clipped() -> None:
    rng = np.random.default_rng(0)
    old, targets = rng.normal(0, 1, (2, 64, 64))
    new = old + rng.uniform(-0.19, 0.19, old.shape)
    arrays = [array.astype(np.float32) for array in (new, old, targets)]
    terms, _ = compiled(value_loss_terms, 0.2)(*arrays, np.ones(old.shape, bool))
    assert terms[VALUE_TERMS.index("value_clipfrac")] == 0


@settings(deadline=None)
@given(batch=texts(), spread=SPREADS)
def test_gradients_of_the_references_are_the_slopes_of_the_loops(batch: Texts, spread: float) -> None:
    """Which makes them the slopes of what was compared with the loops above: nothing is taken from ours."""
    cliprange = CASES[batch.shape]
    cases: list[tuple[Callable[..., Token], list[np.ndarray]]] = [
        (policy_token, policy_inputs(batch, spread, cliprange, "random")),
        (value_token, value_inputs(batch, spread, cliprange)),
    ]
    for token, inputs in cases:
        for place in batch.places:
            new, *rest = (float(array[place]) for array in inputs)
            slope = central_difference(lambda x: token(x, *rest, cliprange).terms[0], new)  # noqa: B023
            assert slope == pytest.approx(token(new, *rest, cliprange).slope, rel=1e-7, abs=1e-7)
