"""Metrics: their names, and values worked by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mindrlhf.configs.keys import PPOConfig
from mindrlhf.trainer.experience import Rollout, ScoredRollout, make_experience
from mindrlhf.trainer.metrics import rollout_metrics, update_metrics
from mindrlhf.trainer.recorder import summary_line
from mindrlhf.trainer.reward_shaping import RewardShaper
from mindrlhf.trainer.shown_metrics import ppo_metrics
from mindrlhf.trainer.update import UpdateResult

NAMES = {
    *(
        f"objective/{name}"
        for name in ("kl", "kl_coef", "entropy", "non_score_reward", "scores", "scores_std", "rlhf_reward")
    ),
    *(f"policy/{name}" for name in ("approxkl", "clipfrac", "entropy", "ratio", "ratio_var", "steps")),
    *(f"loss/{name}" for name in ("policy", "pretrain", "total")),
    *("response/length", "response/eos_rate", "lr", "grad_norm", "update/skipped"),
}
NAMES_OF_A_CRITIC = {
    *(f"value/{name}" for name in ("clipfrac", "error", "mean", "explained_var")),
    *("loss/value", "grad_norm/critic"),
}

ROLLOUT = Rollout.of(
    tokens=np.zeros((2, 5), np.int32),
    prompt_lengths=np.array([2, 1], np.int32),
    response_lengths=np.array([1, 3], np.int32),
    logprobs=np.array([[-1, 0, 0], [-2, -3, -1]], np.float32),
    stopped=np.array([0, 1], np.int32),
    sample_ids=np.array([0, 1]),
)
SCORED = ScoredRollout(
    ROLLOUT,
    ref_logprobs=np.array([[-2, 5, 5], [-2, -2, -4]], np.float32),
    values=np.array([[0, 0, 0], [1, 1, 1]], np.float32),
    scores=np.array([1, 4], np.float32),
)
# Two steps of 3 and 1 tokens.
RESULT = UpdateResult(
    tokens=np.array([3.0, 1.0]),
    policy={
        "policy_loss": np.array([6.0, 4.0]),
        "approxkl": np.array([0.5, 0.3]),
        "clipfrac": np.array([1.0, 1.0]),
        "ratio": np.array([3.0, 2.0]),
        "ratio_squared": np.array([3.0, 4.0]),
        "entropy": np.array([9.0, 1.0]),
    },
    value={
        "value_loss": np.array([9.0, 1.0]),
        "value_clipfrac": np.array([2.0, 0.0]),
        "value_error": np.array([6.0, 2.0]),
        "value": np.array([-3.0, 1.0]),
    },
    grad_norm=np.array([1.0, 3.0]),
    critic_grad_norm=np.array([5.0, 6.0]),
    learning_rate=1e-3,
)
NO_CRITIC = RESULT._replace(value={}, critic_grad_norm=np.zeros(0))


def metrics_of(scored: ScoredRollout, config: PPOConfig) -> dict[str, float]:
    rewards = RewardShaper(config)(scored)
    return rollout_metrics(scored, rewards, make_experience(scored, rewards, config))


def test_every_name_is_there_and_is_json() -> None:
    config = PPOConfig(vf_coef=0.1)
    metrics = metrics_of(SCORED, config) | update_metrics(RESULT, config)
    assert metrics.keys() == NAMES | NAMES_OF_A_CRITIC
    json.dumps({name: float(value) for name, value in metrics.items()}, allow_nan=False)
    line = summary_line(metrics, ppo_metrics(config).summary)
    assert line.startswith("score +2.5000  kl +1.5000  length 2.0  stop rate 0.50  policy loss +3.00000  ")
    assert "value loss 2.00000" in line


def test_without_a_critic_nothing_is_said_of_one() -> None:
    config = PPOConfig(advantage="reinforce", critic="none")
    metrics = metrics_of(SCORED._replace(values=None), config) | update_metrics(NO_CRITIC, config)
    assert metrics.keys() == NAMES
    assert metrics["loss/total"] == metrics["loss/policy"] == pytest.approx(3.0)
    assert "value" not in summary_line(metrics, ppo_metrics(config).summary)
    assert [column.metric for column in ppo_metrics(config).columns if "value" in column.metric] == []


def test_rollout_metrics_by_hand() -> None:
    metrics = metrics_of(SCORED, PPOConfig(kl_coef=0.5))
    # KL by sequence: 1, and 0 - 1 + 3 = 2.
    assert metrics["objective/kl"] == pytest.approx(1.5)
    assert metrics["objective/non_score_reward"] == pytest.approx(-0.75)
    assert metrics["objective/scores"] == pytest.approx(2.5)
    assert metrics["objective/scores_std"] == pytest.approx(1.5)
    assert metrics["objective/rlhf_reward"] == pytest.approx(1.75)
    assert metrics["objective/entropy"] == pytest.approx((1 + 6) / 2)
    assert metrics["response/length"] == 2
    assert metrics["response/eos_rate"] == 0.5
    assert metrics["objective/kl_coef"] == 0.5


def test_update_metrics_by_hand() -> None:
    metrics = update_metrics(RESULT, PPOConfig(vf_coef=0.1))
    assert metrics["loss/policy"] == pytest.approx((6 / 3 + 4 / 1) / 2)
    assert metrics["loss/value"] == pytest.approx((9 / 3 + 1 / 1) / 2)
    assert metrics["loss/total"] == pytest.approx(3.0 + 0.1 * 2.0)
    assert metrics["policy/approxkl"] == pytest.approx(0.8 / 4)
    assert metrics["policy/clipfrac"] == pytest.approx(0.5)
    assert metrics["policy/ratio"] == pytest.approx(1.25)
    assert metrics["policy/ratio_var"] == pytest.approx(7 / 4 - 1.25**2)
    assert metrics["policy/entropy"] == pytest.approx(2.5)
    assert metrics["value/clipfrac"] == pytest.approx(0.5)
    assert metrics["value/error"] == pytest.approx(2.0)
    assert metrics["value/mean"] == pytest.approx(-0.5)
    assert (metrics["grad_norm"], metrics["grad_norm/critic"], metrics["lr"]) == (2.0, 5.5, 1e-3)


def test_extras_enter_the_total_loss_and_what_was_not_done_counts_as_nothing() -> None:
    config = PPOConfig(vf_coef=0.1, entropy_coef=0.5, ptx_coef=2.0)
    metrics = update_metrics(RESULT._replace(pretrain_loss=np.array([3.0, 5.0])), config)
    assert metrics["loss/pretrain"] == pytest.approx(4.0)
    # Entropy by minibatch: 9 / 3 and 1 / 1.
    assert metrics["loss/total"] == pytest.approx(3.0 + 0.1 * 2.0 - 0.5 * 2.0 + 2.0 * 4.0)
    # A separate critic did not see the minibatch that ended the steps.
    ended = RESULT._replace(
        value={name: sums[:1] for name, sums in RESULT.value.items()},
        grad_norm=np.array([1.0]),
        critic_grad_norm=np.array([5.0]),
    )
    metrics = update_metrics(ended, PPOConfig(vf_coef=0.1))
    assert (metrics["policy/steps"], metrics["grad_norm"], metrics["grad_norm/critic"]) == (1, 1, 5)
    assert metrics["loss/value"] == pytest.approx(9 / 3)
    assert metrics["value/mean"] == pytest.approx(-1.0)
    assert metrics["loss/policy"] == pytest.approx(3.0), "the policy did see it"
    warm_up = RESULT._replace(grad_norm=np.zeros(0), learning_rate=0.0)
    metrics = update_metrics(warm_up, PPOConfig())
    assert (metrics["policy/steps"], metrics["grad_norm"], metrics["lr"]) == (0, 0, 0)
    assert metrics["grad_norm/critic"] == 5.5
