"""What a response is paid: penalty, centre, scale and clip by hand, in this order."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from mindrlhf.configs.keys import PPOConfig
from mindrlhf.trainer.experience import Rollout, ScoredRollout
from mindrlhf.trainer.reward_shaping import RewardShaper, ScoreShaping
from mindrlhf.trainer.skipped_updates import SkippedUpdate

STOPPED = np.array([1, 1, 0])
SCORES = np.array([1.0, 3.0, 7.0], np.float32)


def paid(*batches: Any, **settings: Any) -> np.ndarray:
    """What the last of some batches is paid."""
    shaping = ScoreShaping(PPOConfig(**settings))
    return [shaping(np.asarray(batch, np.float32), STOPPED[: len(batch)]) for batch in batches][-1]


def test_scores_pass_unchanged_by_default() -> None:
    shaping = ScoreShaping(PPOConfig())
    np.testing.assert_array_equal(shaping(SCORES, STOPPED), SCORES)
    assert shaping.moments.count == 0


def test_scale_is_the_sample_deviation_of_this_batch_at_first() -> None:
    # 1, 3, 7 - 2: mean 3, squared distances 4 + 0 + 4, variance 8 / 2
    np.testing.assert_allclose(
        paid(SCORES, scale_rewards=True, missing_eos_penalty=2.0), [0.5, 1.5, 2.5], rtol=1e-6
    )


def test_scale_is_of_all_batches_so_far() -> None:
    # -2, 2, 6, 10: mean 4, squared distances 36 + 4 + 4 + 36, variance 80 / 3
    found = paid([-2, 2], [6, 10], scale_rewards=True)
    np.testing.assert_allclose(found, np.array([6, 10]) / (80 / 3) ** 0.5, rtol=1e-6)


def test_centring_subtracts_the_running_mean_with_or_without_scale() -> None:
    np.testing.assert_allclose(paid([-2, 2], [6, 10], center_rewards=True), [2, 6], rtol=1e-6)
    both = paid([-2, 2], [6, 10], center_rewards=True, scale_rewards=True)
    np.testing.assert_allclose(both, np.array([2, 6]) / (80 / 3) ** 0.5, rtol=1e-6)


def test_clip_comes_last_and_on_both_sides() -> None:
    np.testing.assert_array_equal(paid([-9, 0.5], score_clip=2.0), [-2, 0.5])
    np.testing.assert_allclose(
        paid(SCORES, scale_rewards=True, missing_eos_penalty=2.0, score_clip=2.0), [0.5, 1.5, 2.0], rtol=1e-6
    )
    # The penalty is taken before the clip: 7 - 6 = 1, not 2 - 6.
    np.testing.assert_array_equal(paid(SCORES, missing_eos_penalty=6.0, score_clip=2.0), [1, 2, 1])


def test_equal_scores_are_not_blown_up() -> None:
    np.testing.assert_array_equal(paid([3, 3], [3, 3], scale_rewards=True), [3, 3])
    np.testing.assert_array_equal(paid([3], scale_rewards=True), [3])


def test_the_state_goes_on_after_a_restart() -> None:
    config = PPOConfig(scale_rewards=True, center_rewards=True)
    first, second = ScoreShaping(config), ScoreShaping(config)
    first(SCORES, STOPPED)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    batch = np.array([5.0, -1.0, 2.0], np.float32)
    wanted = first(batch, STOPPED)
    np.testing.assert_array_equal(second(batch, STOPPED), wanted)
    assert (ScoreShaping(config)(batch, STOPPED) != wanted).any()


def scored(scores: Any, logprob: float = 0.0, fault: SkippedUpdate | None = None) -> ScoredRollout:
    """Two responses, of one and two tokens, whose log-probs are ``logprob`` above the reference's."""
    rollout = Rollout.of(
        tokens=np.zeros((2, 4), np.int32),
        prompt_lengths=np.array([1, 1], np.int32),
        response_lengths=np.array([1, 2], np.int32),
        logprobs=np.full((2, 2), logprob, np.float32),
        stopped=np.array([1, 1], np.int32),
        sample_ids=np.array([0, 1]),
    )
    return ScoredRollout(rollout, np.zeros((2, 2), np.float32), None, np.float32(scores), fault)


def test_the_shaped_score_is_paid_at_the_last_token() -> None:
    shaper = RewardShaper(PPOConfig(scale_rewards=True))
    shaper(scored([-2, 2]))
    scale = (80 / 3) ** 0.5
    np.testing.assert_allclose(shaper(scored([6, 10])).rewards, [[6 / scale, 0], [0, 10 / scale]], rtol=1e-6)


def test_the_kl_coefficient_is_adapted_after_its_use_and_survives_a_restart() -> None:
    config = PPOConfig(
        kl_controller="adaptive", kl_coef=0.1, kl_target=1.0, kl_horizon=20, center_rewards=True
    )
    shaper = RewardShaper(config)
    first = shaper(scored([0, 0], logprob=1.0))  # KL 1 and 2: 50 % above the target, so e = 0.2
    assert first.kl_coef == 0.1
    np.testing.assert_allclose(first.rewards, [[-0.1, 0], [-0.1, -0.1]], rtol=1e-6)
    again = RewardShaper(config)
    again.load_state_dict(json.loads(json.dumps(shaper.state_dict())))
    for one in (shaper, again):
        second = one(scored([4, 4]))
        assert second.kl_coef == pytest.approx(0.1 * (1 + 0.2 * 2 / 20))
        np.testing.assert_allclose(second.rewards, [[2, 0], [0, 2]], rtol=1e-6)


def test_a_rollout_with_a_fault_changes_neither_moments_nor_coefficient() -> None:
    shaper = RewardShaper(PPOConfig(kl_controller="adaptive", scale_rewards=True))
    shaper(scored([1, 3]))
    before = json.dumps(shaper.state_dict())
    made = shaper(scored([5, 9], logprob=1.0, fault=SkippedUpdate("both", "value", np.array([0]))))
    assert json.dumps(shaper.state_dict()) == before
    assert made.kl_coef == shaper.kl_controller.value
    assert np.isfinite(made.rewards).all()
