"""A rollout of two sequences, worked by hand from log-probs to advantages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindrlhf.algorithms.advantages import ADVANTAGES, Advantage
from mindrlhf.configs.keys import PPOConfig
from mindrlhf.configs.load import load_ppo_config
from mindrlhf.trainer.experience import Experience, Rollout, ScoredRollout, TokenRewards, make_experience
from mindrlhf.trainer.reward_shaping import RewardShaper

PAD = 9  # the pad token is a stop token too, as in Qwen2
NAN = np.float32("nan")

# Two prompt columns, three response columns. Row 0: one prompt token, two response tokens, the second of
# which is the stop token (= pad). Row 1: two prompt tokens, the last of them the pad token itself.
ROLLOUT = Rollout.of(
    tokens=np.array([[PAD, 4, 5, PAD, PAD], [3, PAD, 6, 7, 8]], np.int32),
    prompt_lengths=np.array([1, 2], np.int32),
    response_lengths=np.array([2, 3], np.int32),
    logprobs=np.array([[-1.0, -2.0, 0.0], [-0.5, -1.0, -1.5]], np.float32),
    stopped=np.array([1, 0], np.int32),
    sample_ids=np.array([0, 1]),
)
SCORED = ScoredRollout(
    ROLLOUT,
    ref_logprobs=np.array([[-1.5, -1.0, NAN], [-0.5, -3.0, -1.0]], np.float32),
    values=np.array([[1.0, 2.0, NAN], [0.0, 1.0, -1.0]], np.float32),
    scores=np.array([10.0, -4.0], np.float32),
)
# logp - ref, with kl_coef 0.1: r = -0.1 * kl, and the score at the last token.
KL = np.array([[0.5, -1.0, 0.0], [0.0, 2.0, -0.5]])
REWARDS = np.array([[-0.05, 10.1, 0.0], [0.0, -0.2, -3.95]])
# gamma 1, lambda 0.5. Row 0: A1 = 10.1 - 2 = 8.1; A0 = (-0.05 + 2 - 1) + 0.5 * 8.1 = 5.0.
# Row 1: A2 = -3.95 + 1 = -2.95; A1 = (-0.2 - 1 - 1) + 0.5 * A2 = -3.675; A0 = (0 + 1 - 0) + 0.5 * A1.
ADVANTAGE = np.array([[5.0, 8.1, 0.0], [-0.8375, -3.675, -2.95]])
RETURNS = np.array([[6.0, 10.1, 0.0], [-0.8375, -2.675, -3.95]])
# What is still to come of the rewards; their mean over the five tokens is 0.37.
RETURNS_TO_GO = np.array([[10.05, 10.1, 0.0], [-4.15, -4.15, -3.95]])
MASK = np.array([[1, 1, 0], [1, 1, 1]])


def rewards(scored: ScoredRollout = SCORED, **changes: Any) -> TokenRewards:
    return RewardShaper(PPOConfig(kl_coef=0.1, kl_estimator="k1", **changes))(scored)


def experience(scored: ScoredRollout = SCORED, **changes: Any) -> Experience:
    config = PPOConfig(**{"gamma": 1.0, "lam": 0.5, "whiten_advantages": False, **changes})
    return make_experience(scored, rewards(scored), config)


def whitened(array: np.ndarray) -> np.ndarray:
    real = array[MASK == 1]
    return np.where(MASK, (array - real.mean()) / np.sqrt(real.var() + 1e-8), 0)


def test_masks_and_positions_come_from_lengths_though_pad_is_the_stop_token() -> None:
    np.testing.assert_array_equal(ROLLOUT.valid, [[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(ROLLOUT.position_ids, [[0, 0, 1, 2, 0], [0, 1, 2, 3, 4]])
    assert {array.dtype for array in ROLLOUT.inputs} == {np.dtype(np.int32)}
    np.testing.assert_array_equal(ROLLOUT.mask, MASK)
    assert ROLLOUT.prompt_columns == 2


def test_kl_is_policy_minus_reference_and_is_taken_off_the_reward() -> None:
    made = rewards()
    assert made.kl_coef == 0.1
    np.testing.assert_allclose(made.kl, KL, atol=1e-6)
    np.testing.assert_allclose(made.rewards, REWARDS, atol=1e-6)


def test_score_slot_is_the_last_real_token() -> None:
    without = rewards(SCORED._replace(scores=np.zeros(2, np.float32)))
    np.testing.assert_allclose(rewards().rewards - without.rewards, [[0, 10, 0], [0, 0, -4]], atol=1e-6)


def test_a_response_that_never_stops_pays_the_penalty_at_its_last_token() -> None:
    difference = rewards(missing_eos_penalty=1.5).rewards - rewards().rewards
    np.testing.assert_allclose(difference, [[0, 0, 0], [0, 0, -1.5]], atol=1e-6)


@pytest.mark.parametrize(("estimator", "expected"), [("k2", [0.125, 0.5]), ("k3", [0.10653066, 0.71828183])])
def test_other_kl_estimators_feed_reward_and_log_alike(estimator: str, expected: list[float]) -> None:
    made = RewardShaper(PPOConfig(kl_coef=0.1, kl_estimator=estimator))(SCORED)
    np.testing.assert_allclose(made.kl[0, :2], expected, rtol=1e-5)
    np.testing.assert_allclose(made.rewards[0, 0], -0.1 * expected[0], rtol=1e-5)


def test_advantages_and_returns_by_hand() -> None:
    made = experience()
    np.testing.assert_allclose(made.advantages, ADVANTAGE, atol=1e-5)
    np.testing.assert_allclose(made.returns, RETURNS, atol=1e-5)
    np.testing.assert_array_equal(made.old_values, [[1, 2, 0], [0, 1, -1]])


def test_advantages_are_whitened_over_real_tokens_and_returns_are_not() -> None:
    made = experience(whiten_advantages=True)
    np.testing.assert_allclose(made.advantages, whitened(ADVANTAGE), atol=1e-5)
    np.testing.assert_allclose(made.returns, RETURNS, atol=1e-5)


def test_whitened_rewards_keep_their_mean_and_are_what_is_learnt_from() -> None:
    made = experience(whiten_rewards=True)
    learnt = np.where(MASK, whitened(REWARDS) + REWARDS[MASK == 1].mean(), 0)
    # With V = 0 behind the end, the last advantage of each row is r - V.
    np.testing.assert_allclose(made.advantages[[0, 1], [1, 2]], learnt[[0, 1], [1, 2]] - [2, -1], atol=1e-5)


@pytest.mark.parametrize("whiten", [False, True])
def test_reinforce_needs_no_values(whiten: bool) -> None:
    scored = SCORED._replace(values=None)
    made = experience(scored, advantage="reinforce", critic="none", whiten_advantages=whiten)
    assert made.old_values is None
    np.testing.assert_allclose(made.returns, RETURNS_TO_GO, atol=1e-5)
    advantages = np.where(MASK, RETURNS_TO_GO - (10.05 + 10.1 - 4.15 - 4.15 - 3.95) / 5, 0)
    np.testing.assert_allclose(made.advantages, whitened(advantages) if whiten else advantages, atol=1e-5)


def test_an_algorithm_of_ones_own_is_a_function_and_an_entry(
    repo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here each token's advantage is its response's reward less that of the other responses (RLOO)."""

    def mine(
        rewards: np.ndarray, values: np.ndarray | None, mask: np.ndarray, gamma: float, lam: float
    ) -> tuple[np.ndarray, np.ndarray]:
        assert values is None
        totals = np.where(mask, rewards, 0).sum(axis=1, keepdims=True)
        others = (totals.sum() - totals) / (len(totals) - 1)
        return np.where(mask, totals - others, 0), np.where(mask, totals, 0)

    monkeypatch.setitem(ADVANTAGES, "mine", Advantage(mine, needs_critic=False))
    preset = repo_root / "model_configs" / "qwen_ppo" / "ppo_qwen2_tiny.yaml"
    settings = ["advantage=mine", "critic=none", "kl_coef=0.1", "whiten_advantages=False"]
    config = load_ppo_config(preset, settings)
    scored = SCORED._replace(values=None)
    made = make_experience(scored, RewardShaper(config)(scored), config)
    np.testing.assert_allclose(made.advantages, MASK * np.array([[14.2], [-14.2]]), atol=1e-5)
    np.testing.assert_allclose(made.returns, MASK * np.array([[10.05], [-4.15]]), atol=1e-5)


def test_nothing_behind_the_end_gets_in() -> None:
    made = experience(whiten_advantages=True)
    for array in (*rewards(), made.old_values, made.advantages, made.returns):
        assert array is not None
        assert np.isfinite(array).all()
