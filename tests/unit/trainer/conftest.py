"""The smallest job there is, in graph mode, and a run of it, for the trainer's tests."""

from __future__ import annotations

from pathlib import Path

import mindspore as ms
import pytest

from mindrlhf.configs.keys import (
    ContextConfig,
    JobConfig,
    ModelConfig,
    ParallelConfig,
    PPOConfig,
    RunConfig,
)
from tests.unit.trainer.evaluated_run import EvaluatedRun, evaluated_job, run_with_and_without_evaluation


@pytest.fixture(scope="session")
def tiny_job() -> JobConfig:
    """One layer of 16 features, 4 prompts, two minibatches, a constant learning rate."""
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    run = RunConfig(
        path=Path("tiny.yaml"),
        context=ContextConfig(),
        parallel=ParallelConfig(),
        model=ModelConfig(
            vocab_size=24,
            hidden_size=16,
            num_layers=1,
            num_heads=4,
            n_kv_heads=2,
            intermediate_size=20,
            seq_length=16,
        ),
        optimizer={"type": "AdamW", "betas": [0.9, 0.95], "eps": 1e-5, "weight_decay": 0.1},
        lr_schedule={"type": "ConstantWarmUpLR", "learning_rate": 1e-2, "warmup_steps": 0, "total_steps": -1},
    )
    ppo = PPOConfig(
        seed=3,
        total_iterations=4,
        rollout_batch_size=4,
        ppo_epochs=1,
        num_minibatches=2,
        max_prompt_length=4,
        max_response_length=3,
        stop_token_ids=(1,),
    )
    return JobConfig(infer=run, train=run, reward=run, critic=run, ppo=ppo)


@pytest.fixture(scope="session")
def evaluated_run(tiny_job: JobConfig, tmp_path_factory: pytest.TempPathFactory) -> EvaluatedRun:
    """Without a critic; what uses it may go on with it from one of its checkpoints."""
    return run_with_and_without_evaluation(evaluated_job(tiny_job), tmp_path_factory.mktemp("evaluated"))
