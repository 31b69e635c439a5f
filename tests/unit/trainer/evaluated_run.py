"""A run without a critic, trained first without and then with evaluation on held-out prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindrlhf.configs.keys import JobConfig, PPOConfig
from mindrlhf.data.prompts import PromptBatch
from mindrlhf.data.tokenizer_loading import load_tokenizer
from mindrlhf.runtime.device import Runtime
from mindrlhf.runtime.host_exchange import HostExchange
from mindrlhf.trainer.builder import PPOModels
from mindrlhf.trainer.evaluation import Evaluation, evaluate
from mindrlhf.trainer.experience import Experience
from mindrlhf.trainer.loop import train
from mindrlhf.trainer.recipes.ppo_job import open_checkpoints
from mindrlhf.trainer.recipes.rl import DataPaths, PPOTrainer
from mindrlhf.trainer.run import Run
from mindrlhf.trainer.update import UpdateResult
from mindrlhf.trainer.weight_paths import WeightPaths
from tests.unit.trainer.tiny_inputs import write_model, write_prompts

LETTERS = "abcdefghijklmnopqrstu"  # ids 0 .. 20, then the three control tokens
PAD, END = 21, 23
HELD_OUT, BATCH, PROMPT, RESPONSE = 7, 4, 4, 3
TIMES = ("time/", "tokens_per_second")


@dataclass
class Reward:
    """One for each letter; remembers what it was given."""

    calls: list[tuple[list[str], list[str]]] = field(default_factory=list)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        self.calls.append((list(prompts), list(responses)))
        return [float(len(response)) for response in responses]


@dataclass
class EvaluatedRun:
    """The trainer after both runs, and what they left."""

    run: Run
    trainer: PPOTrainer
    calls: list[tuple[list[str], list[str]]]
    """Of the reward function, in the run with evaluation."""
    save: Path
    experience: Path
    without: list[dict[str, float]]
    """Metrics of the run without evaluation."""
    updates: list[UpdateResult]
    first: Evaluation
    last: Evaluation


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def assert_same_metrics(found: Sequence[dict[str, float]], wanted: Sequence[dict[str, float]]) -> None:
    """But for times, and for what MindSpore's CPU kernels differ by from one call to the next."""
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            if not name.startswith(TIMES):
                assert one[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


def evaluated_job(tiny_job: JobConfig) -> JobConfig:
    ppo = replace(
        tiny_job.ppo,
        advantage="reinforce",
        critic="none",
        total_iterations=2,
        save_interval=1,
        keep_checkpoints=5,
        eval_interval=0,
        eval_samples=3,
        generation_batch_size=2,
        score_batch_size=2,
        stop_token_ids=(END, 3, 8, 13),
        pad_token_id=PAD,
        valid_vocab_size=24,
    )
    return replace(tiny_job, ppo=ppo)


def run_with_and_without_evaluation(job: JobConfig, directory: Path) -> EvaluatedRun:
    """Trains for two iterations, sets the job back to its beginning, and trains with evaluation."""
    (directory / "tokenizer").mkdir()
    vocab = {letter: number for number, letter in enumerate(LETTERS)}
    (directory / "tokenizer" / "vocab.json").write_text(json.dumps(vocab))
    (directory / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 20, 1 + row % 4) for row in range(12)]
    held_out = [[row, *[20] * (row % 4)] for row in range(HELD_OUT)]
    reward, save = Reward(), directory / "save"
    run = Run(
        open_checkpoints(job, save, HostExchange(Runtime(rank=0, world_size=1))),
        experience_file=directory / "experience.mindrecord",
    )
    trainer = PPOTrainer(
        job,
        WeightPaths(
            train=write_model(directory / "policy.ckpt", job, 1),
            reward=write_model(directory / "reward.ckpt", job, 2, lm_head=False, score_head=True),
        ),
        DataPaths(
            write_prompts(directory / "train", prompts, job), write_prompts(directory / "eval", held_out, job)
        ),
        run,
        tokenizer=load_tokenizer(directory / "tokenizer"),
        reward_function=reward,
        keeps_experience=True,
    )
    updates: list[UpdateResult] = []
    learn = trainer.update

    def update(experience: Experience, iteration: int) -> UpdateResult:
        updates.append(learn(experience, iteration))
        return updates[-1]

    results: list[Evaluation] = []

    def kept(
        models: PPOModels,
        prompts: PromptBatch,
        exchange: HostExchange,
        config: PPOConfig,
        extra_scores: Any,
        on_prompts: Callable[[int], None],
    ) -> Evaluation:
        told: list[int] = []
        results.append(evaluate(models, prompts, exchange, config, extra_scores, told.append))
        assert sum(told) == len(results[-1].scores), "progress ends when every prompt is answered"
        return results[-1]

    held_out, trainer.held_out = trainer.held_out, None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "update", update)
        patch.setattr("mindrlhf.trainer.recipes.rl.evaluate", kept)
        trainer.begin()
        start = run.save(trainer)
        train(run, trainer)
        without = lines(save / "metrics.jsonl")
        run.resume(start, trainer)
        trainer.held_out = held_out
        reward.calls.clear()
        train(run, trainer)
    return EvaluatedRun(run, trainer, list(reward.calls), save, directory, without, updates, *results)
