"""Advantages, whitening, KL, rewards and explained variance against their published formulas.

The references are written here from the formulas, token by token in Python's float64, and use nothing of
ours. Random texts of ragged lengths; whatever stands behind the end of a text is NaN and must not matter.

Sources: [TRL] huggingface/trl, ``PPOTrainer`` of 0.11 and before (``compute_rewards``, ``loss``) and
``trl/core.py`` (``masked_whiten``, ``masked_var``); [OAI] vwxyzjn/lm-human-preference-details,
``train_policy_accelerate.py``; [KL] J. Schulman, "Approximating KL Divergence", 2020.

Tolerance: ours computes in float64 and rounds to float32 once, at the end, so nothing is more than half a
unit in the last place (2**-24, relative) away from the exact result; on top of that float64's own rounding,
which matters only where numbers cancel and is given with each use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal, getcontext
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindrlhf.algorithms.advantages import gae, reinforce, whiten
from mindrlhf.algorithms.kl import sequence_kl, token_kl
from mindrlhf.algorithms.statistics import explained_variance
from mindrlhf.algorithms.token_rewards import token_rewards
from mindrlhf.configs.keys import PPOConfig
from mindrlhf.trainer.experience import Rollout, ScoredRollout, make_experience
from mindrlhf.trainer.reward_shaping import RewardShaper

HALF_ULP = 2.0**-24
EPSILON = 1e-8  # of whitening, in [TRL] and [OAI]
FACTORS = (0.0, 0.95, 1.0)  # of gamma and lambda

Rows = list[list[float]]


class Texts(NamedTuple):
    """Lengths of the responses of a batch, its columns, and where its numbers come from."""

    lengths: list[int]
    columns: int
    seed: int

    @property
    def mask(self) -> np.ndarray:
        return np.array([[t < length for t in range(self.columns)] for length in self.lengths])

    def numbers(self, which: int, kind: str = "random", scale: float = 1.0) -> np.ndarray:
        """(B, R) float32, a different one for each ``which``; NaN behind the ends."""
        drawn = np.random.default_rng((self.seed, which)).normal(0, scale, self.mask.shape)
        drawn = {"random": drawn, "constant": np.full_like(drawn, drawn[0, 0]), "zero": drawn * 0}[kind]
        return np.where(self.mask, drawn, np.nan).astype(np.float32)

    def rows(self, array: np.ndarray) -> Rows:
        """The real entries as Python floats, a list a text."""
        return [[float(x) for x in row[:length]] for row, length in zip(array, self.lengths, strict=True)]


@st.composite
def texts(draw: st.DrawFn, least_entries: int = 1) -> Texts:
    """Ragged texts, texts of one token only, and texts that fill all columns."""
    columns = draw(st.integers(1, 9))
    count = draw(st.integers(-(-least_entries // columns), 5))
    lengths = draw(
        st.one_of(
            st.lists(st.integers(1, columns), min_size=count, max_size=count),
            st.just([1] * max(count, least_entries)),
            st.just([columns] * count),
        ).filter(lambda lengths: sum(lengths) >= least_entries)
    )
    return Texts(lengths, columns, draw(st.integers(0, 2**32 - 1)))


KINDS = st.sampled_from(["random", "random", "constant", "zero"])


def assert_rounded(found: np.ndarray, wanted: Rows, batch: Texts, float64_error: float) -> None:
    """``found`` (B, R) is ``wanted`` rounded once, and exactly 0 behind the ends."""
    assert found.dtype == np.float32
    assert (found[~batch.mask] == 0).all()
    for found_row, wanted_row in zip(batch.rows(found), wanted, strict=True):
        np.testing.assert_allclose(found_row, wanted_row, rtol=HALF_ULP, atol=float64_error)


def gae_loop(rewards: Rows, values: Rows, gamma: float, lam: float) -> tuple[Rows, Rows]:
    """[TRL] ``PPOTrainer.loss``: advantages from the last token to the first, and advantages + values."""
    advantages, returns = [], []
    for reward, value in zip(rewards, values, strict=True):
        last, backwards = 0.0, []
        for t in range(len(reward) - 1, -1, -1):
            next_value = value[t + 1] if t < len(reward) - 1 else 0.0
            delta = reward[t] + gamma * next_value - value[t]
            last = delta + gamma * lam * last
            backwards.append(last)
        advantages.append(backwards[::-1])
        returns.append([a + v for a, v in zip(backwards[::-1], value, strict=True)])
    return advantages, returns


def gae_double_sum(rewards: Rows, values: Rows, gamma: float, lam: float) -> Rows:
    """arXiv 1506.02438, equation 16: the sum over l >= 0 of (gamma lam)^l delta_{t+l}, within the text."""
    advantages = []
    for reward, value in zip(rewards, values, strict=True):
        following = [*value[1:], 0.0]
        deltas = [r + gamma * after - v for r, v, after in zip(reward, value, following, strict=True)]
        advantages.append(
            [
                math.fsum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, len(deltas)))
                for t in range(len(deltas))
            ]
        )
    return advantages


@pytest.mark.parametrize("lam", FACTORS)
@pytest.mark.parametrize("gamma", FACTORS)
@settings(deadline=None)
@given(batch=texts(), kind=KINDS, value_kind=KINDS)
def test_gae_equals_both_published_forms(
    gamma: float, lam: float, batch: Texts, kind: str, value_kind: str
) -> None:
    rewards, values = batch.numbers(1, kind, 3.0), batch.numbers(2, value_kind, 3.0)
    advantages, returns = gae(rewards, values, batch.mask, gamma, lam)
    wanted, wanted_returns = gae_loop(batch.rows(rewards), batch.rows(values), gamma, lam)
    # Sums of at most 18 numbers below 20: float64 loses less than 1e-13.
    assert_rounded(advantages, wanted, batch, 1e-13)
    assert_rounded(returns, wanted_returns, batch, 1e-13)
    double_sum = gae_double_sum(batch.rows(rewards), batch.rows(values), gamma, lam)
    assert_rounded(advantages, double_sum, batch, 1e-13)


def reinforce_sums(rewards: Rows, gamma: float) -> tuple[Rows, Rows]:
    """Williams, 1992: the discounted sum of what follows each token, less the mean over all tokens."""
    returns = [
        [math.fsum(gamma ** (s - t) * row[s] for s in range(t, len(row))) for t in range(len(row))]
        for row in rewards
    ]
    entries = [x for row in returns for x in row]
    baseline = math.fsum(entries) / len(entries)
    return [[x - baseline for x in row] for row in returns], returns


@pytest.mark.parametrize("gamma", FACTORS)
@settings(deadline=None)
@given(batch=texts(), kind=KINDS)
def test_reinforce_equals_the_formula(gamma: float, batch: Texts, kind: str) -> None:
    rewards = batch.numbers(1, kind, 3.0)
    advantages, returns = reinforce(rewards, None, batch.mask, gamma, 0.5)
    wanted, wanted_returns = reinforce_sums(batch.rows(rewards), gamma)
    assert_rounded(advantages, wanted, batch, 1e-12)
    assert_rounded(returns, wanted_returns, batch, 1e-13)


def moments(entries: Sequence[float]) -> tuple[float, float]:
    """Mean and population variance."""
    mean = math.fsum(entries) / len(entries)
    return mean, math.fsum((x - mean) ** 2 for x in entries) / len(entries)


def whiten_loop(rows: Rows, shift_mean: bool, *, bessel: bool = False) -> Rows:
    """``(x - mean) * rsqrt(var + 1e-8)``, plus the mean when it is not to be shifted.

    The variance is the population's, [OAI] (``unbiased=False``), or with Bessel's correction, [TRL].
    """
    entries = [x for row in rows for x in row]
    mean, variance = moments(entries)
    if bessel:
        variance *= len(entries) / (len(entries) - 1)
    back = 0.0 if shift_mean else mean
    return [[(x - mean) / math.sqrt(variance + EPSILON) + back for x in row] for row in rows]


@pytest.mark.parametrize("shift_mean", [True, False])
@settings(deadline=None)
@given(batch=texts(), kind=KINDS, scale=st.sampled_from([1e-5, 1e-4, 1.0, 100.0]), offset=st.integers(-3, 3))
def test_whitening_equals_the_formula(
    shift_mean: bool, batch: Texts, kind: str, scale: float, offset: int
) -> None:
    """At scales where the 1e-8 under the root decides, too."""
    x = batch.numbers(1, kind, scale) + np.float32(offset)
    # x - mean errs by float64's rounding of x, and a constant batch divides it by sqrt(1e-8).
    error = 1e-15 * (abs(offset) + 5 * scale) / max(scale, 1e-4) if kind == "random" else 1e-11 * (3 + scale)
    assert_rounded(whiten(x, batch.mask, shift_mean), whiten_loop(batch.rows(x), shift_mean), batch, error)


@given(batch=texts(least_entries=2))
def test_whitening_is_trls_but_for_bessels_correction(batch: Texts) -> None:
    """TRL divides by ``n - 1``: its entries are smaller by sqrt((n - 1) / n), 0.4 % for 128 tokens.

    It breaks on a single token (division by 0); [OAI]'s population variance, which is ours, does not.
    """
    x = batch.numbers(1)
    entries = [value for row in batch.rows(x) for value in row]
    n, variance = len(entries), moments(entries)[1]
    factor = math.sqrt((variance * n / (n - 1) + EPSILON) / (variance + EPSILON))
    assert factor == pytest.approx(math.sqrt(n / (n - 1)), rel=EPSILON / variance)
    wanted = [[factor * value for value in row] for row in whiten_loop(batch.rows(x), True, bessel=True)]
    assert_rounded(whiten(x, batch.mask), wanted, batch, 1e-11)


def kl_exact(policy: float, reference: float, estimator: str) -> float:
    """[KL]: d, d^2 / 2 and exp(-d) - 1 + d, in 50 digits: exp(-d) - 1 + d cancels for small d."""
    getcontext().prec = 50
    d = Decimal(policy) - Decimal(reference)
    return float({"k1": d, "k2": d * d / 2, "k3": (-d).exp() - 1 + d}[estimator])


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@settings(deadline=None)
@given(batch=texts(), distance=st.sampled_from([0.0, 1e-4, 0.1, 3.0]))
def test_kl_estimators_equal_the_formulas(estimator: str, batch: Texts, distance: float) -> None:
    policy = -np.abs(batch.numbers(1, scale=3.0))
    reference = np.where(batch.mask, policy + batch.numbers(2, scale=distance), np.nan).astype(np.float32)
    kl = token_kl(policy, reference, batch.mask, estimator)
    wanted = [
        [kl_exact(p, q, estimator) for p, q in zip(p_row, q_row, strict=True)]
        for p_row, q_row in zip(batch.rows(policy), batch.rows(reference), strict=True)
    ]
    # k3 is float64's exp(-d) - 1 plus d: an error of 1e-16 |d|.
    assert_rounded(kl, wanted, batch, 1e-15 * distance)
    by_text = [math.fsum(row) for row in batch.rows(kl)]
    assert sequence_kl(kl) == pytest.approx(math.fsum(by_text) / len(by_text), rel=1e-12, abs=1e-12)


def rewards_loop(kl: Rows, scores: Sequence[float], kl_coef: float) -> Rows:
    """[TRL] ``compute_rewards``: minus the KL at each token, and the score at the last one that is real."""
    rewards = []
    for row, score in zip(kl, scores, strict=True):
        reward = [-kl_coef * k for k in row]
        reward[-1] += score
        rewards.append(reward)
    return rewards


@settings(deadline=None)
@given(batch=texts(), kl_coef=st.sampled_from([0.0, 0.02, 0.15, 1.0]))
def test_token_rewards_equal_the_formula(batch: Texts, kl_coef: float) -> None:
    kl = batch.numbers(1)
    scores = np.random.default_rng(batch.seed).normal(0, 2, len(kl)).astype(np.float32)
    found = token_rewards(kl, scores, np.array(batch.lengths), kl_coef)
    assert_rounded(found, rewards_loop(batch.rows(kl), scores.tolist(), kl_coef), batch, 1e-14)


def scored(batch: Texts, *, with_values: bool) -> ScoredRollout:
    rng = np.random.default_rng(batch.seed)
    count = len(batch.lengths)
    logprobs = -np.abs(batch.numbers(1, scale=3.0))
    rollout = Rollout.of(
        tokens=rng.integers(0, 9, (count, 2 + batch.columns)).astype(np.int32),
        prompt_lengths=rng.integers(1, 3, count).astype(np.int32),
        response_lengths=np.array(batch.lengths, np.int32),
        logprobs=logprobs,
        stopped=rng.integers(0, 2, count).astype(np.int32),
        sample_ids=np.arange(count),
    )
    ref_logprobs = (logprobs + batch.numbers(2)).astype(np.float32)
    values = batch.numbers(3) if with_values else None
    return ScoredRollout(rollout, ref_logprobs, values, rng.normal(0, 2, count).astype(np.float32))


@pytest.mark.parametrize("advantage", ["gae", "reinforce"])
@pytest.mark.parametrize("whiten_rewards", [False, True])
@settings(deadline=None)
@given(
    batch=texts(least_entries=3),
    estimator=st.sampled_from(["k1", "k2", "k3"]),
    gamma=st.sampled_from(FACTORS),
    lam=st.sampled_from(FACTORS),
    penalty=st.sampled_from([0.0, 1.5]),
    whiten_advantages=st.booleans(),
)
def test_experience_equals_the_loops_one_after_the_other(
    whiten_rewards: bool,
    advantage: str,
    batch: Texts,
    estimator: str,
    gamma: float,
    lam: float,
    penalty: float,
    whiten_advantages: bool,
) -> None:
    """[TRL]'s order: KL, rewards, whitened rewards (mean kept), advantages, returns, whitened advantages."""
    given_ = scored(batch, with_values=advantage == "gae")
    rollout = given_.rollout
    config = PPOConfig(
        advantage=advantage,
        critic="separate" if advantage == "gae" else "none",
        kl_coef=0.15,
        kl_estimator=estimator,
        gamma=gamma,
        lam=lam,
        whiten_rewards=whiten_rewards,
        whiten_advantages=whiten_advantages,
        missing_eos_penalty=penalty,
    )
    token_rewards_ = RewardShaper(config)(given_)
    made = make_experience(given_, token_rewards_, config)

    kl = [
        [kl_exact(p, q, estimator) for p, q in zip(p_row, q_row, strict=True)]
        for p_row, q_row in zip(batch.rows(rollout.logprobs), batch.rows(given_.ref_logprobs), strict=True)
    ]
    paid = [
        float(score) - (0.0 if stopped else penalty)
        for score, stopped in zip(given_.scores, rollout.stopped, strict=True)
    ]
    rewards = rewards_loop(kl, paid, 0.15)
    learnt_from = whiten_loop(rewards, shift_mean=False) if whiten_rewards else rewards
    values: Rows = [[]] if given_.values is None else batch.rows(given_.values)
    if given_.values is None:
        advantages, returns = reinforce_sums(learnt_from, gamma)
    else:
        advantages, returns = gae_loop(learnt_from, values, gamma, lam)

    # Every intermediate array is float32: an error of a few HALF_ULP of the largest number on the way, and
    # whitening divides by the spread.
    largest = max(
        abs(x)
        for rows in (kl, rewards, learnt_from, advantages, returns, values)
        for row in rows
        for x in row
    )
    spread_of_rewards = math.sqrt(moments([x for row in rewards for x in row])[1] + EPSILON)
    spread = math.sqrt(moments([x for row in advantages for x in row])[1] + EPSILON)
    error = 4 * HALF_ULP * largest * batch.columns
    learnt_error = error * (1 + 1 / spread_of_rewards) if whiten_rewards else error
    last_error = learnt_error / spread if whiten_advantages else learnt_error
    for name, found, wanted, tolerance in (
        ("kl", token_rewards_.kl, kl, error),
        ("rewards", token_rewards_.rewards, rewards, error),
        ("returns", made.returns, returns, learnt_error),
        ("advantages", made.advantages, whiten_loop(advantages, True) if whiten_advantages else advantages,
         last_error),
    ):  # fmt: skip
        assert (found[~batch.mask] == 0).all(), name
        for found_row, wanted_row in zip(batch.rows(found), wanted, strict=True):
            np.testing.assert_allclose(found_row, wanted_row, rtol=0, atol=tolerance, err_msg=name)


@settings(deadline=None)
@given(batch=texts(least_entries=2), noise=st.sampled_from([0.0, 0.1, 1.0, 10.0]), bias=st.integers(-2, 2))
def test_explained_variance_equals_the_formula(batch: Texts, noise: float, bias: int) -> None:
    """``1 - Var(R - V) / Var(R)`` (OpenAI baselines), so that a constant error of the values is not counted.

    [TRL]'s ``val/var_explained`` is ``1 - mean((V - R)^2) / Var(R)``, which counts it.
    """
    returns = batch.numbers(1, scale=2.0)
    values = np.where(batch.mask, returns + batch.numbers(2, scale=noise) + bias, np.nan).astype(np.float32)
    entries = [x for row in batch.rows(returns) for x in row]
    errors = [
        r - v
        for r_row, v_row in zip(batch.rows(returns), batch.rows(values), strict=True)
        for r, v in zip(r_row, v_row, strict=True)
    ]
    (_, variance), (mean_error, error_variance) = moments(entries), moments(errors)
    found = explained_variance(values, returns, batch.mask)
    wanted = 1.0 - error_variance / variance
    # A float, never rounded to float32; two variances of numbers below 50, over one.
    assert found == pytest.approx(wanted, rel=1e-12, abs=1e-12 / variance)
    mean_square = math.fsum(error**2 for error in errors) / len(errors)
    assert found - mean_error**2 / variance == pytest.approx(
        1.0 - mean_square / variance, rel=1e-11, abs=1e-12 / variance
    )


@given(batch=texts(), kind=st.sampled_from(["constant", "zero"]))
def test_explained_variance_of_constant_returns_is_0(batch: Texts, kind: str) -> None:
    assert explained_variance(batch.numbers(1), batch.numbers(2, kind), batch.mask) == 0.0
