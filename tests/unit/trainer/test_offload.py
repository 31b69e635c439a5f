"""A job whose models take turns on the device computes as one whose models are all there, in less memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest

from mindrlhf.configs.keys import JobConfig, RunConfig
from mindrlhf.planning.job_memory import plan_memory
from mindrlhf.runtime.device import Runtime
from mindrlhf.runtime.host_exchange import HostExchange
from mindrlhf.trainer.recipes.ppo_job import open_checkpoints
from mindrlhf.trainer.recipes.rl import DataPaths, PPOTrainer
from mindrlhf.trainer.run import Run
from mindrlhf.trainer.weight_paths import WeightPaths
from tests.unit.trainer.evaluated_run import assert_same_metrics
from tests.unit.trainer.tiny_inputs import write_model, write_prompts

TURNS = ["infer", "train", "ref", "reward", "critic"]


class Ended(NamedTuple):
    trainer: PPOTrainer
    metrics: list[dict[str, float]]
    present: list[str]
    """Models whose weights are on the device when the job has ended."""


def with_host_memory(config: RunConfig, device: str = "CPU") -> RunConfig:
    context = replace(config.context, memory_offload=True, device_target=device)
    return replace(config, context=context, optimizer={**config.optimizer, "swap": True})


def everywhere(job: JobConfig, device: str = "CPU") -> JobConfig:
    roles = ("infer", "train", "reward", "critic")
    changed: dict[str, Any] = {role: with_host_memory(getattr(job, role), device) for role in roles}
    return replace(job, **changed)


@pytest.fixture(scope="module")
def ended(tiny_job: JobConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Ended]:
    """By whether it is offloaded: two iterations, saved after the first."""
    directory = tmp_path_factory.mktemp("offload")
    job = replace(tiny_job, ppo=replace(tiny_job.ppo, total_iterations=2, micro_batch_size=1))
    prompts = [np.arange(2, 2 + length) for length in (1, 3, 4, 2)] * 4
    data = DataPaths(write_prompts(directory / "data.mindrecord", prompts, job))
    model = write_model(directory / "policy.safetensors", job, 0, scale=0.1)
    runs = {}
    for offloaded in (False, True):
        one = everywhere(job) if offloaded else job
        run = Run(open_checkpoints(one, directory / str(offloaded), HostExchange(Runtime(0, 1))))
        trainer = PPOTrainer(one, WeightPaths(train=model, reward=model), data, run, verify_sync=True)
        trainer.begin()
        metrics = []
        for step in range(2):
            metrics.append(dict(trainer.step(step).metrics))
            run.checkpoints.save(step + 1, trainer.trained, trainer.stateful)
        models = trainer.models
        present = [name for name in TURNS if getattr(models, name).store.device_bytes]
        runs[offloaded] = Ended(trainer, metrics, present)
    return runs


def test_results_are_the_same(ended: dict[bool, Ended]) -> None:
    assert_same_metrics(ended[True].metrics, ended[False].metrics)
    for part in ("infer", "train", "critic"):
        found, wanted = (dict(getattr(ended[way].trainer.models, part).shards()) for way in (True, False))
        for name, array in wanted.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-6)


def test_one_model_is_on_the_device_and_no_optimizer_state(ended: dict[bool, Ended]) -> None:
    assert ended[False].present == TURNS
    assert ended[True].present == ["critic"], "the last to be used"
    update = ended[True].trainer.ppo_update
    for step in (update.policy_step, update.critic_step):
        assert step is not None
        assert step.optimizer.state.device_bytes == 4, "the count of steps"
        assert max(np.abs(step.optimizer.state.array(key)).max() for key in step.optimizer.state) > 0


@pytest.mark.parametrize("offloaded", [False, True])
def test_the_account_is_what_the_planner_says(
    ended: dict[bool, Ended], offloaded: bool, tiny_job: JobConfig
) -> None:
    trainer = ended[offloaded].trainer
    on_device = replace(tiny_job.train, context=replace(tiny_job.train.context, device_target="Ascend"))
    job = replace(tiny_job, infer=on_device, train=on_device, reward=on_device, critic=on_device)
    job = everywhere(job, "Ascend") if offloaded else job
    training = next(phase for phase in plan_memory(job).phases if phase.name == "training")
    found = trainer.models.device_memory.most
    steps = 4 * len([one for one in (trainer.ppo_update.policy_step, trainer.ppo_update.critic_step) if one])
    assert found["weights"] == training.parts["weights"]
    assert found["gradients"] == training.parts["gradients"]
    assert found["moments"] == training.parts["moments"] + steps
    assert found["kv_cache"] == training.parts["kv_cache"] == 0
