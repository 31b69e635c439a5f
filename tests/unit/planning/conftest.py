"""A job small enough to count its bytes by hand, and the shipped YAMLs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mindrlhf.configs.keys import (
    ContextConfig,
    JobConfig,
    ModelConfig,
    ParallelConfig,
    PPOConfig,
    RunConfig,
)
from mindrlhf.configs.load import load_job

TINY = ModelConfig(
    vocab_size=24,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    n_kv_heads=2,
    intermediate_size=20,
    seq_length=16,
)


@pytest.fixture
def tiny_job() -> Callable[..., JobConfig]:
    """Makes a job of TINY: infer dp1 mp2, train dp2 mp1, reward as infer, critic as train; takes PPO keys."""

    def make(*, device: str = "CPU", **ppo: object) -> JobConfig:
        def run(name: str, dp: int, mp: int) -> RunConfig:
            return RunConfig(
                path=Path(name),
                context=ContextConfig(device_target=device),
                parallel=ParallelConfig(data_parallel=dp, model_parallel=mp),
                model=TINY,
                optimizer={"type": "AdamW"},
            )

        infer, train = run("generate_x.yaml", 1, 2), run("finetune_x.yaml", 2, 1)
        sizes: dict[str, object] = {
            "rollout_batch_size": 8,
            "num_minibatches": 2,
            "max_prompt_length": 4,
            "max_response_length": 6,
            "decode_steps_per_call": 2,
        }
        return JobConfig(infer=infer, train=train, reward=infer, critic=train, ppo=PPOConfig(**(sizes | ppo)))

    return make


@pytest.fixture
def shipped_job(repo_root: Path) -> Callable[..., JobConfig]:
    """Reads the YAMLs of a model size, ``qwen2_7b`` for instance."""

    def read(size: str, *, device: str | None = None, overrides: tuple[str, ...] = ()) -> JobConfig:
        folder = repo_root / "model_configs/qwen_ppo"
        generate = folder / f"generate_{size}.yaml"
        return load_job(
            sft_path_infer=generate,
            sft_path_train=folder / f"finetune_{size}.yaml",
            reward_path=generate,
            critic_path=generate,
            ppo_config=folder / f"ppo_{size.removesuffix('_8p')}.yaml",
            overrides=overrides,
            device_target=device,
        )

    return read
