"""Graphs are compiled in the first iteration, one for each network, and never again."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mindspore.graph.api
import numpy as np
import pytest

from mindrlhf.checkpoint.sources import ArraySource
from mindrlhf.checkpoint.weight_files import write_weights
from mindrlhf.configs.schema import JobConfig
from mindrlhf.data.columns import LOSS_MASK, PRETRAIN_IDS, PROMPT_IDS, prompt_schema
from mindrlhf.data.mindrecord import write_mindrecord
from mindrlhf.models.qwen2.layouts import parameter_layouts
from mindrlhf.parallel.layout import Mesh
from mindrlhf.runtime.device import Runtime
from mindrlhf.trainer.builder import WeightPaths
from mindrlhf.trainer.recipes.rl import PPOTrainer, TrainerPaths

ITERATIONS, PROMPT, RESPONSE, DECODE_STEPS = 3, 4, 7, 2


@dataclass
class Run:
    """How often each network was compiled in each iteration, by class and object, and what the data were."""

    compiled: list[Counter[tuple[str, int]]]
    lengths: list[list[int]]
    decode_calls: list[int]


def write_inputs(job: JobConfig, directory: Path) -> tuple[Path, Path]:
    """Random weights, and prompts of random lengths."""
    rng = np.random.default_rng(0)
    layouts = parameter_layouts(job.train.model, Mesh())
    weights = {
        name: 0.1 * rng.standard_normal(item.shape).astype(np.float32) for name, item in layouts.items()
    }
    write_weights(directory / "policy.safetensors", ArraySource(weights))
    prompts = np.zeros((20, PROMPT), np.int32)
    sequences = np.zeros((20, PROMPT + RESPONSE), np.int32)
    for row, length in enumerate(rng.integers(1, PROMPT + 1, len(prompts))):
        sequences[row, :length] = prompts[row, PROMPT - length :] = rng.integers(2, 24, length)
    batch = {PROMPT_IDS: prompts, PRETRAIN_IDS: sequences, LOSS_MASK: np.zeros_like(sequences)}
    write_mindrecord(directory / "data.mindrecord", prompt_schema(PROMPT, PROMPT + RESPONSE), [batch])
    return directory / "policy.safetensors", directory / "data.mindrecord"


@pytest.fixture(scope="module")
def run(tiny_job: JobConfig, tmp_path_factory: pytest.TempPathFactory) -> Run:
    directory = tmp_path_factory.mktemp("compilations")
    ppo = replace(
        tiny_job.ppo,
        seed=5,
        max_prompt_length=PROMPT,
        max_response_length=RESPONSE,
        decode_steps_per_call=DECODE_STEPS,
        stop_token_ids=tuple(range(1, 24, 3)),  # a third of the ids: some batches end early
        micro_batch_size=1,
    )
    job = replace(tiny_job, ppo=ppo)
    weights, data = write_inputs(job, directory)
    counts: Counter[tuple[str, int]] = Counter()
    # MindSpore calls it with the network just before each compilation of a cell or a function, and only then.
    check = mindspore.graph.api._check_recompile

    def counting(network: Any, *args: Any) -> Any:
        counts[type(network).__name__, id(network)] += 1
        return check(network, *args)

    result = Run([], [], [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mindspore.graph.api, "_check_recompile", counting)
        trainer = PPOTrainer(
            job, WeightPaths(train=weights), TrainerPaths(data, directory / "save"), Runtime(0, 1)
        )
        trainer.start_from_equal_policies()
        roll_out, decode = trainer.rollout, trainer.ppo_model_infer._decode

        def rollout(batch: Any) -> Any:
            made = roll_out(batch)
            result.lengths.append(made.response_lengths.tolist())
            return made

        def counted_decode(*args: Any) -> Any:
            result.decode_calls[-1] += 1
            return decode(*args)

        patch.setattr(trainer, "rollout", rollout)
        patch.setattr(trainer.ppo_model_infer, "_decode", counted_decode)
        for _ in range(ITERATIONS):
            counts.clear()
            result.decode_calls.append(0)
            trainer.run_iteration(trainer.prompts.next_batch())
            result.compiled.append(counts.copy())
    return run_checked(result)


def run_checked(result: Run) -> Run:
    """The data must differ between iterations, or the tests below would show nothing."""
    assert len(set(map(tuple, result.lengths))) == ITERATIONS
    assert len(set(result.decode_calls)) > 1, "all rows of some iteration must have stopped early"
    return result


def test_first_iteration_compiles_each_network_once(run: Run) -> None:
    assert set(run.compiled[0].values()) == {1}
    networks = Counter(name for name, _ in run.compiled[0])
    # PPOModelTrain is the reference: the policy is only run inside its loss. Policy and critic have a loss.
    expected = {
        "_Prefill": 1,
        "_Decode": 1,
        "PPOModelTrain": 1,
        "CriticModel": 1,
        "RewardModel": 1,
        "Backward": 2,
    }
    assert {name: networks[name] for name in expected} == expected


def test_later_iterations_compile_nothing(run: Run) -> None:
    assert run.compiled[1:] == [Counter()] * (ITERATIONS - 1)
