"""Graphs are compiled in the first iteration, one for all layers, and never again."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import mindspore.graph.api
import numpy as np
import pytest

from mindrlhf.configs.keys import JobConfig
from mindrlhf.models import chunks
from mindrlhf.runtime.device import Runtime
from mindrlhf.runtime.host_exchange import HostExchange
from mindrlhf.trainer.recipes.ppo_job import open_checkpoints
from mindrlhf.trainer.recipes.rl import DataPaths, PPOTrainer
from mindrlhf.trainer.run import Run
from mindrlhf.trainer.weight_paths import WeightPaths
from tests.unit.trainer.tiny_inputs import write_model, write_prompts

ITERATIONS, PROMPT, RESPONSE, DECODE_STEPS = 3, 4, 7, 2


@dataclass
class Compilations:
    """How often each network was compiled in each iteration, by class and object, and what the data were."""

    compiled: list[Counter[tuple[str, int]]]
    lengths: list[list[int]]
    decode_calls: list[int]


@pytest.fixture(scope="module")
def run(tiny_job: JobConfig, tmp_path_factory: pytest.TempPathFactory) -> Compilations:
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
    deep = replace(tiny_job.train, model=replace(tiny_job.train.model, num_layers=3))
    job = replace(tiny_job, infer=deep, train=deep, reward=deep, critic=deep, ppo=ppo)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 24, length) for length in rng.integers(1, PROMPT + 1, 20)]
    data = DataPaths(write_prompts(directory / "data.mindrecord", prompts, job))
    weights = WeightPaths(train=write_model(directory / "policy.safetensors", job, 0, scale=0.1))
    training = Run(open_checkpoints(job, directory / "save", HostExchange(Runtime(0, 1))))
    counts: Counter[tuple[str, int]] = Counter()
    # MindSpore calls it with the network just before each compilation of a cell or a function, and only then.
    check = mindspore.graph.api._check_recompile

    def counting(network: Any, *args: Any) -> Any:
        counts[type(network).__name__, id(network)] += 1
        return check(network, *args)

    result = Compilations([], [], [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mindspore.graph.api, "_check_recompile", counting)
        patch.setattr(chunks, "LAYERS_PER_GRAPH", 1)
        trainer = PPOTrainer(job, weights, data, training)
        training.begin(trainer)
        roll_out, decode = trainer.rollout, trainer.ppo_model_infer._decode

        def rollout(batch: Any, iteration: int) -> Any:
            made = roll_out(batch, iteration)
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
            with training.timed_step(trainer):
                done = trainer.step(training.step)
            training.record(trainer, done)
            result.compiled.append(counts.copy())
    # The data must differ between iterations, or the tests below would show nothing.
    assert len(set(map(tuple, result.lengths))) == ITERATIONS
    assert len(set(result.decode_calls)) > 1, "all rows of some iteration must have stopped early"
    return result


def test_one_graph_serves_all_layers_of_all_models(run: Compilations) -> None:
    """Models that generate, learn and score differ in rows and types alone."""
    compiled = Counter(name for name, _ in run.compiled[0].elements())
    expected = {
        **{"_Prefill": 1, "_Decode": 1},
        # For the rows of a pass and those of a micro-batch, which the critic shares with the policy.
        **{"SharedInputs": 2, "VocabParallelEmbedding": 2, "Block": 2},
        **{"SelectRows": 3, "ScoreHead": 3},  # for the reward model's rows as well
        "LogProbs": 2,  # of policy and reference, which computes no entropy
        "_LossGradient": 2,
        "_Backward": 5,  # embedding, block, rows, scores, log-probs
    }
    assert {name: compiled[name] for name in expected} == expected


def test_later_iterations_compile_nothing(run: Compilations) -> None:
    assert run.compiled[1:] == [Counter()] * (ITERATIONS - 1)
