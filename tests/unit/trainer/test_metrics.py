"""Metrics: names of the checklist, and values worked by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mindrlhf.configs.schema import PPOConfig
from mindrlhf.trainer.experience import Experience, Rollout, Scores, make_experience
from mindrlhf.trainer.metrics import rollout_metrics, time_metrics, update_metrics
from mindrlhf.trainer.recorder import summary_line
from mindrlhf.trainer.update import UpdateResult

# correctness.md, item 20
NAMES = {
    *(
        f"objective/{name}"
        for name in ("kl", "kl_coef", "entropy", "non_score_reward", "scores", "rlhf_reward")
    ),
    *(f"policy/{name}" for name in ("approxkl", "clipfrac", "entropy", "ratio", "ratio_var")),
    *(f"loss/{name}" for name in ("policy", "value", "pretrain", "total")),
    *(f"value/{name}" for name in ("clipfrac", "error", "mean", "explained_var")),
    *(f"time/{name}" for name in ("rollout", "score", "sync", "train")),
    *("response/length", "response/eos_rate", "lr", "grad_norm", "tokens_per_second"),
}

ROLLOUT = Rollout.of(
    tokens=np.zeros((2, 5), np.int32),
    prompt_lengths=np.array([2, 1], np.int32),
    response_lengths=np.array([1, 3], np.int32),
    logprobs=np.array([[-1, 0, 0], [-2, -3, -1]], np.float32),
    stopped=np.array([0, 1], np.int32),
    sample_ids=np.array([0, 1]),
)
SCORES = Scores(
    ref_logprobs=np.array([[-2, 5, 5], [-2, -2, -4]], np.float32),
    values=np.array([[0, 0, 0], [1, 1, 1]], np.float32),
    scores=np.array([1, 4], np.float32),
)
# Two steps of 3 and 1 tokens.
RESULT = UpdateResult(
    tokens=np.array([3.0, 1.0]),
    policy=np.array([[6, 0.5, 1, 3, 3, 9], [4, 0.3, 1, 2, 4, 1]], np.float32),
    value=np.array([[9, 2, 6, -3], [1, 0, 2, 1]], np.float32),
    grad_norm=np.array([1.0, 3.0]),
    critic_grad_norm=np.array([5.0, 6.0]),
    learning_rate=1e-3,
)
SECONDS = {"rollout": 2.0, "score": 1.0, "train": 4.0, "sync": 0.5}


def experience() -> Experience:
    return make_experience(ROLLOUT, SCORES, 0.5, PPOConfig())


def test_every_name_of_the_checklist_is_there_and_is_json() -> None:
    metrics = rollout_metrics(ROLLOUT, SCORES, experience(), 0.5)
    metrics |= update_metrics(RESULT, PPOConfig(vf_coef=0.1)) | time_metrics(SECONDS, 4, 8.0)
    assert metrics.keys() >= NAMES, NAMES - metrics.keys()
    json.dumps({name: float(value) for name, value in metrics.items()}, allow_nan=False)
    assert "iteration 2/5" in summary_line({**metrics, "iteration": 2}, 5)


def test_rollout_metrics_by_hand() -> None:
    metrics = rollout_metrics(ROLLOUT, SCORES, experience(), 0.5)
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
        value=RESULT.value[:1], grad_norm=np.array([1.0]), critic_grad_norm=np.array([5.0])
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


def test_time_metrics() -> None:
    metrics = time_metrics(SECONDS, 100, 8.0)
    assert metrics["time/iteration"] == 8.0
    assert metrics["tokens_per_second"] == 12.5
    assert metrics["tokens_per_second/rollout"] == 50.0
