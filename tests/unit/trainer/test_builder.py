"""Which checkpoint fills which model."""

from __future__ import annotations

from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest

from mindrlhf.checkpoint.shards import save_shard
from mindrlhf.configs.keys import JobConfig
from mindrlhf.models.qwen2.layouts import parameter_layouts
from mindrlhf.models.score_head import SCORE_HEAD
from mindrlhf.parallel.layout import mesh_of
from mindrlhf.trainer.builder import build_models
from mindrlhf.trainer.weight_paths import WeightPaths
from mindrlhf.utils.errors import MindRLHFError


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    paths = {name: tmp_path / f"{name}.ckpt" for name in ("infer", "train", "ref", "reward", "critic")}
    for path in paths.values():
        path.touch()
    return paths


@pytest.mark.parametrize(
    ("given", "filled"),
    [
        ("infer train ref reward critic", ("infer", "train", "ref", "reward", "critic")),
        ("infer train", ("infer", "train", "infer", None, None)),
        ("infer", ("infer", "infer", "infer", None, None)),
        ("train", ("train", "train", "train", None, None)),
        ("train ref", ("train", "train", "ref", None, None)),
        ("infer reward", ("infer", "infer", "infer", "reward", "reward")),
        ("infer critic", ("infer", "infer", "infer", None, "critic")),
    ],
)
def test_models_stand_in_for_each_other(
    files: dict[str, Path], given: str, filled: tuple[str | None, ...]
) -> None:
    checked = WeightPaths(**{name: files[name] for name in given.split()}).checked()
    assert astuple(checked) == tuple(name and files[name] for name in filled)
    assert checked.checked() == checked


def test_no_policy_at_all_names_the_flags(files: dict[str, Path]) -> None:
    with pytest.raises(MindRLHFError, match="--load_sft_checkpoint_train"):
        WeightPaths(reward=files["reward"]).checked()


def test_all_paths_that_are_not_there_are_named_at_once(files: dict[str, Path], tmp_path: Path) -> None:
    paths = WeightPaths(infer=files["infer"], reward=tmp_path / "no_reward", critic=tmp_path / "no_critic")
    with pytest.raises(MindRLHFError, match=r"(?s)reward: .*no_reward.*critic: .*no_critic"):
        paths.checked()


def random_checkpoint(directory: Path, job: JobConfig, seed: int, **heads: bool) -> Path:
    rng = np.random.default_rng(seed)
    layouts = parameter_layouts(job.infer.model, mesh_of(job.infer), **heads)
    arrays = {name: rng.standard_normal(layout.shape).astype(np.float32) for name, layout in layouts.items()}
    save_shard(directory, 0, arrays)
    return directory


def test_a_critic_starts_from_the_reward_model_head_and_all(tiny_job: JobConfig, tmp_path: Path) -> None:
    weights = WeightPaths(
        infer=random_checkpoint(tmp_path / "policy", tiny_job, 1),
        reward=random_checkpoint(tmp_path / "reward", tiny_job, 2, lm_head=False, score_head=True),
    )
    models = build_models(tiny_job, weights, rank=0)
    assert models.reward is not None
    assert models.critic is not None
    reward, critic, policy = (dict(m.shards()) for m in (models.reward, models.critic, models.train))
    assert critic.keys() == reward.keys() >= set(SCORE_HEAD)
    for name, array in reward.items():
        np.testing.assert_array_equal(critic[name], array, err_msg=name)
        assert name not in policy or (policy[name] != array).any(), "the policy is another model"
    own = random_checkpoint(tmp_path / "critic", tiny_job, 3, lm_head=False, score_head=True)
    models = build_models(tiny_job, replace(weights, critic=own), rank=0)
    assert models.critic is not None
    assert all((array != reward[name]).any() for name, array in models.critic.shards())


@pytest.mark.parametrize(
    ("critic", "separate", "value_head"),
    [("separate", True, False), ("shared", False, True), ("none", False, False)],
)
def test_no_critic_is_built_that_the_job_does_not_have(
    tiny_job: JobConfig, tmp_path: Path, critic: str, separate: bool, value_head: bool
) -> None:
    job = replace(tiny_job, ppo=replace(tiny_job.ppo, critic=critic))
    models = build_models(job, WeightPaths(infer=random_checkpoint(tmp_path, job, 1)), 0)
    assert (models.critic is not None) == separate
    assert models.train.value_head == value_head == (SCORE_HEAD[0] in models.train.layouts)
    assert (models.values is not None) == (critic != "none")
    assert models.values is models.values, "one object, so that it compiles once"
