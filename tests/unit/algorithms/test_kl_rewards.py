"""kl.py and rewards.py against hand-worked values and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindrlhf.algorithms.kl import (
    AdaptiveKLController,
    FixedKLController,
    sequence_kl,
    token_kl,
)
from mindrlhf.algorithms.token_rewards import penalize_missing_stop, token_rewards

TRUE = np.ones((1, 2), dtype=bool)


def test_estimators_by_hand() -> None:
    """d = ln 2: k1 = 0.693147, k2 = 0.240227, k3 = 1/2 - 1 + ln 2 = 0.193147; and d = -ln 2."""
    logp = np.log(np.array([[0.5, 0.25]], dtype=np.float32))
    ref = np.log(np.array([[0.25, 0.5]], dtype=np.float32))
    np.testing.assert_allclose(token_kl(logp, ref, TRUE, "k1"), [[0.6931472, -0.6931472]], rtol=1e-6)
    np.testing.assert_allclose(token_kl(logp, ref, TRUE, "k2"), [[0.2402265, 0.2402265]], rtol=1e-6)
    np.testing.assert_allclose(token_kl(logp, ref, TRUE, "k3"), [[0.1931472, 0.3068528]], rtol=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_nothing_outside_the_mask_is_used(estimator: str) -> None:
    logp = np.array([[-1.0, np.nan, -np.inf, -2000.0]], dtype=np.float32)
    ref = np.array([[-1.5, 0.0, -np.inf, 0.0]], dtype=np.float32)
    kl = token_kl(logp, ref, np.array([[1, 0, 0, 0]]), estimator)
    assert kl.dtype == np.float32
    assert kl[0, 0] != 0.0
    np.testing.assert_array_equal(kl[0, 1:], 0.0)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_unbiased_estimators_average_to_the_kl(estimator: str) -> None:
    """E_p over the whole vocabulary of an unbiased estimator is sum p log(p/q), exactly."""
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.2, 0.5, 0.3])
    per_token = token_kl(np.log(p)[None], np.log(q)[None], np.ones((1, 3), bool), estimator)
    assert float((p * per_token[0]).sum()) == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-6)


@given(st.floats(-5, 5))
def test_k2_and_k3_are_never_negative(d: float) -> None:
    logp, ref = np.array([[d]]), np.array([[0.0]])
    for estimator in ("k2", "k3"):
        assert token_kl(logp, ref, np.ones((1, 1), bool), estimator)[0, 0] >= 0


def test_unknown_estimator_names_the_known() -> None:
    with pytest.raises(ValueError, match="'k4'; choose one of k1, k2, k3"):
        token_kl(TRUE, TRUE, TRUE, "k4")


def test_sequence_kl_is_sum_then_mean() -> None:
    assert sequence_kl(np.array([[1.0, 2.0, 0.0], [4.0, 0.0, 0.0]], dtype=np.float32)) == 3.5


def test_fixed_controller_stays() -> None:
    controller = FixedKLController(0.02)
    controller.update(100.0, 1000)
    assert controller.value == 0.02
    controller.load_state_dict({"kl_coef": 7.0})
    assert controller.value == 0.02


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.15),  # on target
        (6.6, 0.15 * (1 + 0.1 * 256 / 10000)),  # 10 % above: inside the clip
        (5.4, 0.15 * (1 - 0.1 * 256 / 10000)),
        (60.0, 0.15 * (1 + 0.2 * 256 / 10000)),  # far above: e = +0.2, not -0.2
        (0.0, 0.15 * (1 - 0.2 * 256 / 10000)),
        (-3.0, 0.15 * (1 - 0.2 * 256 / 10000)),
    ],
)
def test_adaptive_controller_by_hand(kl: float, expected: float) -> None:
    controller = AdaptiveKLController(0.15, target=6.0, horizon=10000)
    controller.update(kl, 256)
    assert controller.value == pytest.approx(expected, rel=1e-12)


def test_adaptive_controller_converges_on_a_responding_policy() -> None:
    """A policy whose KL is 3 / kl_coef settles at the target 6, that is at 0.5, from both sides."""
    for start in (0.05, 5.0):
        controller = AdaptiveKLController(start, target=6.0, horizon=1000)
        for _ in range(400):
            controller.update(3.0 / controller.value, 100)
        assert controller.value == pytest.approx(0.5, rel=1e-3)


def test_adaptive_controller_goes_on_after_a_restart() -> None:
    one = AdaptiveKLController(0.1, 6.0, 1000)
    one.update(9.0, 64)
    two = AdaptiveKLController(0.1, 6.0, 1000)
    two.load_state_dict(one.state_dict())
    one.update(2.0, 64)
    two.update(2.0, 64)
    assert one.value == two.value != 0.1


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_adaptive_controller_refuses_what_would_spoil_it(kl: float) -> None:
    controller = AdaptiveKLController(0.1, 6.0, 1000)
    with pytest.raises(ValueError, match="finite"):
        controller.update(kl, 64)
    assert controller.value == 0.1


def test_controllers_refuse_impossible_settings() -> None:
    with pytest.raises(ValueError, match="kl_coef"):
        FixedKLController(-0.1)
    with pytest.raises(ValueError, match="kl_coef"):
        AdaptiveKLController(math.nan, 6.0, 1000)
    with pytest.raises(ValueError, match="target"):
        AdaptiveKLController(0.1, 0.0, 1000)


def test_token_rewards_by_hand() -> None:
    kl = np.array([[0.5, -1.0, 9.0], [2.0, 9.0, 9.0], [1.0, 2.0, 3.0]], dtype=np.float32)
    scores = np.array([2.0, -1.0, 0.5], dtype=np.float32)
    rewards = token_rewards(kl, scores, np.array([2, 1, 3]), kl_coef=0.1)
    assert rewards.dtype == np.float32
    expected = [[-0.05, 0.1 + 2.0, 0.0], [-0.2 - 1.0, 0.0, 0.0], [-0.1, -0.2, -0.3 + 0.5]]
    np.testing.assert_allclose(rewards, expected, rtol=1e-6)


def test_drifting_from_the_reference_costs_reward() -> None:
    """The sign: a token the policy likes more than the reference does has KL > 0 and reward < 0."""
    kl = token_kl(np.array([[-0.1, -0.1]]), np.array([[-2.0, -2.0]]), TRUE)
    rewards = token_rewards(kl, np.zeros(1), np.array([2]), kl_coef=0.2)
    assert (rewards < 0).all()


def test_rubbish_behind_the_end_is_not_used() -> None:
    kl = np.array([[1.0, np.nan, np.inf]], dtype=np.float32)
    np.testing.assert_allclose(token_rewards(kl, np.ones(1), np.array([1]), 0.5), [[0.5, 0.0, 0.0]])


@pytest.mark.parametrize("length", [0, 3])
def test_a_score_without_a_slot_is_an_error(length: int) -> None:
    with pytest.raises(ValueError, match=r"1\.\.2"):
        token_rewards(np.zeros((1, 2)), np.ones(1), np.array([length]), 0.1)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"\(2, 2\), \(1,\), \(2,\)"):
        token_rewards(np.zeros((2, 2)), np.ones(1), np.array([1, 1]), 0.1)


def test_missing_stop_penalty() -> None:
    scores = penalize_missing_stop(np.array([1.0, 1.0]), np.array([True, False]), 1.5)
    assert scores.dtype == np.float32
    assert scores.tolist() == [1.0, -0.5]
