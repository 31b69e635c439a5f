"""Policy loss, value loss and entropy, their statistics and gradients, against the published formulas.

The references are written here from the formulas, token by token in Python's float64; gradients are derived
by hand, and held against central differences of the same loops. What is tested runs in a compiled graph.

Sources: [TRL] huggingface/trl, ``PPOTrainer.loss`` (0.11), ``PPOTrainer.train`` (from 0.12 on) and
``trl/core.py`` (``entropy_from_logits``, ``logprobs_from_logits``); arXiv 1707.06347, equation 7.

Tolerance: graphs compute in float32, whose unit is 2**-23 (1.2e-7) of a number. A token's term takes about
ten operations, so it is held to 8 units (1e-6) of the largest number that is added or subtracted on the way
to it, and a sum to the sum of its terms' tolerances. MindSpore's ``Exp`` on the CPU is less exact than
float32 allows (measured: 3.3e-6 relative between -1 and 1, 8.1e-6 between -20 and 20, 2.3e-5 at -80), which
comes on top wherever there is an exponential. Counts are exact.
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

from mindrlhf.algorithms.losses import POLICY_STATS, VALUE_STATS, policy_loss_terms, value_loss_terms
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layers import VocabParallelLogProbs
from mindrlhf.parallel.layout import Mesh

EIGHT_UNITS = 2.0**-20
CLAMP = 20.0


def exp_error(exponent: float) -> float:
    """What was measured of ``exp``, plus the 8 units of all the rest; relative."""
    return 3.5e-6 + 2.5e-7 * abs(exponent) + EIGHT_UNITS


STEP = 1e-6
"""Of central differences in float64: the error of a slope is about 1e-10."""

CASES = {(1, 1): 0.2, (1, 6): 0.1, (3, 4): 0.2, (4, 7): 0.4}
"""(B, R) -> cliprange. Every pair is a graph to compile, hence so few."""

Matrix = list[list[float]]
Run = Callable[..., tuple[list[float], np.ndarray]]


@pytest.fixture(scope="module", autouse=True)
def _graph_mode() -> None:
    ms.set_context(mode=ms.GRAPH_MODE)


class Texts(NamedTuple):
    """Shape and lengths of a batch of responses, and where its numbers come from."""

    shape: tuple[int, int]
    lengths: list[int]
    seed: int

    @property
    def mask(self) -> np.ndarray:
        return np.arange(self.shape[1]) < np.array(self.lengths)[:, None]

    @property
    def places(self) -> list[tuple[int, int]]:
        """Rows and columns of the real tokens."""
        return [(row, t) for row, length in enumerate(self.lengths) for t in range(length)]

    def rubbish_behind(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """float32, with NaN behind the ends."""
        return [np.where(self.mask, array, np.nan).astype(np.float32) for array in arrays]


@st.composite
def texts(draw: st.DrawFn) -> Texts:
    """Ragged texts, texts of one token only, and texts that fill all columns."""
    rows, columns = shape = draw(st.sampled_from(list(CASES)))
    ragged = st.lists(st.integers(1, columns), min_size=rows, max_size=rows)
    lengths = draw(st.one_of(ragged, st.just([1] * rows), st.just([columns] * rows)))
    return Texts(shape, lengths, draw(st.integers(0, 2**32 - 1)))


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


def test_statistics_are_named_in_the_order_of_the_references() -> None:
    assert POLICY_STATS == ("approxkl", "clipfrac", "ratio", "ratio_sq")
    assert VALUE_STATS == ("clipfrac", "error")


def test_values_within_the_range_are_never_counted_as_clipped() -> None:
    rng = np.random.default_rng(0)
    old, targets = rng.normal(0, 1, (2, 64, 64))
    new = old + rng.uniform(-0.19, 0.19, old.shape)
    arrays = [array.astype(np.float32) for array in (new, old, targets)]
    terms, _ = compiled(value_loss_terms, 0.2)(*arrays, np.ones(old.shape, bool))
    assert terms[1 + VALUE_STATS.index("clipfrac")] == 0


class LogProbs(ms.nn.Cell):
    """``sum(w logprobs) + sum(u entropy)`` of given logits, with both beside it."""

    def __init__(self, vocab: int, valid: int) -> None:
        super().__init__()
        self.log_probs = VocabParallelLogProbs(vocab, Groups(Mesh(), 0), valid_vocab_size=valid)

    def construct(self, logits: Tensor, tokens: Tensor, w: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        logprobs, entropy = self.log_probs(logits, tokens)
        return (w * logprobs).sum() + (u * entropy).sum(), ops.stop_gradient(ops.stack((logprobs, entropy)))


VOCABULARIES = {(1, 1): (5, 5), (1, 6): (8, 6), (3, 4): (16, 16), (4, 7): (12, 11)}
"""(B, R) -> rows of the vocabulary, and how many of them the tokenizer knows."""


@functools.cache
def compiled_logprobs(shape: tuple[int, int]) -> Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray]]:
    graph = ms.jit(ops.value_and_grad(LogProbs(*VOCABULARIES[shape]), 0, has_aux=True))

    def run(*arrays: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        (_, both), gradient = graph(*[Tensor(array) for array in arrays])
        return both.asnumpy()[0], both.asnumpy()[1], gradient.asnumpy()

    return run


def distribution(logits: Sequence[float]) -> list[float]:
    """Log-probs: ``z - logsumexp(z)``."""
    largest = max(logits)
    total = largest + math.log(math.fsum(math.exp(z - largest) for z in logits))
    return [z - total for z in logits]


def entropy_of(logits: Sequence[float]) -> float:
    """[TRL] ``entropy_from_logits``: ``logsumexp(z) - sum(softmax(z) z)``."""
    logprobs = distribution(logits)
    total = logits[0] - logprobs[0]
    return total - math.fsum(math.exp(logp) * z for logp, z in zip(logprobs, logits, strict=True))


def logits_slope(logits: Sequence[float], token: int, w: float, u: float) -> list[float]:
    """d (w logp_token + u H) / dz_j = w ([j = token] - p_j) - u p_j (log p_j + H)."""
    logprobs, entropy = distribution(logits), entropy_of(logits)
    return [
        w * (float(j == token) - math.exp(logp)) - u * math.exp(logp) * (logp + entropy)
        for j, logp in enumerate(logprobs)
    ]


@settings(deadline=None)
@given(batch=texts(), scale=st.sampled_from([0.0, 1.0, 5.0, 30.0]), offset=st.sampled_from([0.0, 300.0]))
def test_logprobs_entropy_and_their_gradient_equal_the_formula(
    batch: Texts, scale: float, offset: float
) -> None:
    """Uniform, ordinary and nearly certain distributions; logits far from 0; rows beyond the vocabulary."""
    vocab, valid = VOCABULARIES[batch.shape]
    rng = np.random.default_rng(batch.seed)
    logits = (offset + rng.normal(0, scale, (*batch.shape, vocab))).astype(np.float32)
    logits[..., valid:] += 50.0
    tokens = rng.integers(0, valid, batch.shape).astype(np.int32)
    w, u = (rng.normal(0, 1, batch.shape).astype(np.float32) for _ in range(2))
    logprobs, entropy, gradient = compiled_logprobs(batch.shape)(logits, tokens, w, u)
    assert (gradient[..., valid:] == 0).all()
    for place in np.ndindex(batch.shape):
        z = [float(x) for x in logits[place][:valid]]
        token, weights = int(tokens[place]), (float(w[place]), float(u[place]))
        # Logits less their maximum are the numbers that are subtracted from and summed over.
        tolerance = exp_error(0.0) * (1.0 + max(z) - min(z))
        assert logprobs[place] == pytest.approx(distribution(z)[token], rel=0, abs=tolerance)
        assert entropy[place] == pytest.approx(entropy_of(z), rel=0, abs=tolerance)
        slope = logits_slope(z, token, *weights)
        tolerance *= abs(weights[0]) + abs(weights[1])
        np.testing.assert_allclose(gradient[place][:valid], slope, rtol=0, atol=tolerance)


def central_difference(function: Callable[[float], float], at: float) -> float:
    return (function(at + STEP) - function(at - STEP)) / (2 * STEP)


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
    rng = np.random.default_rng(batch.seed)
    logits, chosen = rng.normal(0, 2, 6).tolist(), int(rng.integers(6))
    for j, wanted in enumerate(logits_slope(logits, chosen, 0.7, -0.4)):

        def weighted(x: float, j: int = j) -> float:
            moved = [*logits[:j], x, *logits[j + 1 :]]
            return 0.7 * distribution(moved)[chosen] - 0.4 * entropy_of(moved)

        assert central_difference(weighted, logits[j]) == pytest.approx(wanted, rel=1e-7, abs=1e-7)
