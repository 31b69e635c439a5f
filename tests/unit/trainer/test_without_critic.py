"""A whole run with ``critic: none``: nothing of a critic is built, reported, saved or missed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mindrlhf.data.mindrecord import read_schema
from mindrlhf.models.score_head import SCORE_HEAD
from mindrlhf.trainer.checkpoints import check_fixed, read_state
from mindrlhf.trainer.loop import train
from mindrlhf.trainer.recipes.ppo_job import fixed_settings
from mindrlhf.utils.errors import CheckpointError
from tests.probes import read_columns
from tests.unit.trainer.evaluated_run import EvaluatedRun, assert_same_metrics, lines


def test_no_critic_is_built_and_the_policy_has_no_value_head(evaluated_run: EvaluatedRun) -> None:
    trainer = evaluated_run.trainer
    assert (trainer.models.critic, trainer.models.values, trainer.ppo_update.critic_step) == (None,) * 3
    assert not set(SCORE_HEAD) & trainer.ppo_model_train.parameters.keys()
    assert [trained.name for trained in trainer.trained] == ["policy"]


def test_no_metric_and_no_column_is_about_values(evaluated_run: EvaluatedRun) -> None:
    names = {name for line in evaluated_run.without for name in line}
    assert {"loss/policy", "grad_norm", "objective/scores"} <= names
    assert not [name for name in names if "value" in name or "critic" in name]
    columns, _ = read_schema(evaluated_run.experience / "experience_iteration_000001.mindrecord")
    assert "values" not in columns
    assert {"advantages", "returns", "rewards"} <= columns.keys()


def test_the_ratio_is_one_before_the_first_step_of_every_iteration(evaluated_run: EvaluatedRun) -> None:
    ratios = np.array([update.policy["ratio"] / update.tokens for update in evaluated_run.updates])
    np.testing.assert_allclose(ratios[:, 0], 1, atol=1e-4)
    assert np.abs(ratios[:, 1] - 1).min() > 1e-4, "the policy must have moved"


def test_advantages_are_the_returns_less_their_mean(evaluated_run: EvaluatedRun) -> None:
    file = evaluated_run.experience / "experience_iteration_000002.mindrecord"
    found = read_columns(file, ["rewards", "returns", "advantages", "mask"])
    keep = found["mask"] > 0
    to_go = np.cumsum(found["rewards"][:, ::-1].astype(np.float64), axis=1)[:, ::-1]
    np.testing.assert_allclose(found["returns"], np.where(keep, to_go, 0), rtol=1e-5, atol=1e-6)
    real = to_go[keep]
    np.testing.assert_allclose(
        found["advantages"][keep], (real - real.mean()) / real.std(), rtol=1e-4, atol=1e-5
    )
    assert (found["advantages"][~keep] == 0).all()


def test_a_checkpoint_has_no_critic_and_resumes(
    evaluated_run: EvaluatedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, trainer = evaluated_run.run, evaluated_run.trainer
    checkpoint = evaluated_run.save / "iteration_000001"
    assert sorted(path.name for path in checkpoint.iterdir()) == [
        *("config.json", "manifest.json", "policy", "policy_optimizer", "random", "state.json")
    ]
    state = read_state(checkpoint)
    assert state["layouts"].keys() == {"policy"}
    assert run.recorder is not None
    monkeypatch.setattr(run.recorder, "plot", lambda: None)  # slow
    run.resume(checkpoint, trainer)
    assert train(run, trainer)
    assert_same_metrics(lines(evaluated_run.save / "metrics.jsonl"), evaluated_run.without)

    other = replace(trainer.job, ppo=replace(trainer.config, critic="separate", advantage="gae"))
    with pytest.raises(CheckpointError, match=r"ppo\.critic: none in the checkpoint, separate now"):
        check_fixed(checkpoint, state["fixed"], fixed_settings(other))
