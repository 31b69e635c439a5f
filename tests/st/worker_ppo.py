"""One job of any number of workers: whole PPO runs, one layout pair after another (see test_ppo.py).

    worker_ppo.py JOBS_FILE

Runs without msrun too, as one worker. For each case of the JSON file it trains, watches what no
metric shows, and leaves ``{case}_rank{r}.npz`` beside the results.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from worker_support import results_directory, write_results

from mindrlhf.configs.load import load_job
from mindrlhf.data.prompts import PromptBatch
from mindrlhf.trainer.evaluation import Evaluation
from mindrlhf.trainer.experience import Experience, Rollout, ScoredRollout, TokenRewards
from mindrlhf.trainer.recipe import StepResult
from mindrlhf.trainer.recipes import ppo_job, rl
from mindrlhf.trainer.recipes.rl import DataPaths, PPOTrainer
from mindrlhf.trainer.update import UpdateResult
from mindrlhf.utils.errors import MindRLHFError
from mindrlhf.utils.ranks import env_world_size, is_scheduler
from tests.probes import policy_logprobs

RESUME_FROM = 1
evaluate = rl.evaluate


class WatchedTrainer(PPOTrainer):
    """A trainer that keeps what it saw, and compares its two policies on every rollout."""

    seen: dict[str, np.ndarray]
    history: list[dict[str, float]]
    digests_then: dict[str, str]
    last_experience: Experience

    def rollout(self, batch: PromptBatch, iteration: int) -> Rollout:
        """A rollout, and its log-probs as the training network sees them before the update."""
        rollout = super().rollout(batch, iteration)
        trained = policy_logprobs(self.ppo_model_train, rollout, self.exchange, rows_per_pass=0)
        self._keep("rollout", rollout._asdict() | {"train_logprobs": trained})
        return rollout

    def watch_rewards(self) -> None:
        """Keeps the rewards of each iteration."""
        shape = self.reward_shaper

        def shaped(scored: ScoredRollout) -> TokenRewards:
            rewards = shape(scored)
            self._keep("experience", rewards._asdict())
            return rewards

        self.reward_shaper = shaped  # type: ignore[assignment]

    def update(self, experience: Experience, iteration: int) -> UpdateResult:
        """An update of experience that is kept first."""
        self._keep("experience", {**experience._asdict(), **experience.rollout._asdict()})
        self.last_experience = experience
        return super().update(experience, iteration)

    def step(self, step: int) -> StepResult:
        """An iteration whose metrics are kept."""
        result = super().step(step)
        self.history.append({"iteration": step + 1, **result.metrics})
        if step + 1 == RESUME_FROM:
            self.digests_then = digests(self)
        return result

    def _keep(self, what: str, arrays: dict[str, Any]) -> None:
        for name, array in arrays.items():
            if isinstance(array, np.ndarray):
                self.seen[f"{what}/{self.run.step + 1}/{name}"] = array


def run_case(name: str, case: dict[str, Any], runtime: Any) -> dict[str, Any]:
    """Trains one layout pair, then looks at the weights, resumes, and breaks a weight on purpose."""
    from mindrlhf.runtime.host_exchange import HostExchange
    from mindrlhf.trainer.loop import train
    from mindrlhf.trainer.run import Run
    from mindrlhf.trainer.weight_paths import WeightPaths

    begin = time.perf_counter()
    job = load_job(
        sft_path_infer=case["infer"],
        sft_path_train=case["train"],
        reward_path=case["reward"],
        critic_path=case["critic"],
        ppo_config=case["ppo"],
        overrides=case["overrides"],
        world_size=runtime.world_size,
    )
    weights = {model: Path(path) for model, path in case["weights"].items()}
    save = results_directory() / name
    run = Run(ppo_job.open_checkpoints(job, save, HostExchange(runtime)))
    data = DataPaths(Path(case["data"]), Path(case["held_out"]))
    trainer = WatchedTrainer(job, WeightPaths(**weights), data, run)
    trainer.seen, trainer.history = {}, []
    trainer.watch_rewards()
    evaluations = watch_evaluations(trainer)
    report: dict[str, Any] = {"different_at_start": len(trainer.weight_sync.differences())}
    # MindSpore collects garbage before each compilation: 0.3 s a time over all that imports have made.
    gc.freeze()
    report["seconds/build"] = time.perf_counter() - begin
    train(run, trainer)
    report["last"] = str(run.last_checkpoint)
    report["seconds/train"] = time.perf_counter() - begin
    report["metrics"] = plain(trainer.history)
    report["evaluations"] = plain(evaluations)
    report["shards"] = digests(trainer)
    report["different_at_end"] = trainer.weight_sync.differences()
    seen = dict(trainer.seen)
    if case["greedy"]:
        seen |= greedy(trainer)
    if case["resume"]:
        report |= resume(trainer, save / f"iteration_{RESUME_FROM:06d}")
    if case["resume_other"]:
        other = resume(trainer, Path(case["resume_other"]) / f"iteration_{RESUME_FROM:06d}")
        report["metrics_of_other"] = other["metrics_again"]
        report["rollout_of_other"] = other["rollout_again"]
    report["skipped"] = skip(trainer)
    report["broken"] = {
        kind: refusal(trainer, parameter, rank) for kind, (parameter, rank) in case["break"].items()
    }
    np.savez(results_directory() / f"{name}_rank{runtime.rank}.npz", **seen)
    report["seconds/all"] = time.perf_counter() - begin
    return report


def watch_evaluations(trainer: WatchedTrainer) -> list[dict[str, float]]:
    """Metrics of each evaluation from here on; what they are of goes to ``trainer.seen``."""
    found: list[dict[str, float]] = []

    def watched(*arguments: Any, **options: Any) -> Evaluation:
        result, iteration = evaluate(*arguments, **options), trainer.run.step
        found.append({"iteration": iteration, **result.metrics()})
        arrays = {"scores": result.scores, "kl": result.kl, **result.rollout._asdict()}
        trainer.seen |= {f"evaluation/{iteration}/{name}": array for name, array in arrays.items()}
        return result

    rl.evaluate = watched
    return found


def resume(trainer: WatchedTrainer, checkpoint: Path) -> dict[str, Any]:
    """Sets the trainer back and trains it again; what came back, and the metrics of the second time."""
    from mindrlhf.trainer.loop import train

    before = dict(trainer.seen)
    trainer.seen.clear()
    trainer.history.clear()
    trainer.run.resume(checkpoint, trainer)
    trainer.sync()
    restored = digests(trainer)
    train(trainer.run, trainer)
    rollout = f"rollout/{RESUME_FROM + 1}/"
    return {
        "not_restored": [name for name, digest in trainer.digests_then.items() if restored[name] != digest],
        "rollout_again": all(
            np.allclose(array, before[key], rtol=0, atol=1e-5)
            for key, array in trainer.seen.items()
            if key.startswith(rollout)
        ),
        "metrics_again": plain(trainer.history),
    }


def plain(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """Metrics as JSON takes them, without what depends on the clock."""
    return [
        {
            name: float(value)
            for name, value in metrics.items()
            if not name.startswith(("time/", "tokens_per_second"))
        }
        for metrics in history
    ]


def digests(trainer: PPOTrainer) -> dict[str, str]:
    """Model and parameter name -> digest of this rank's shard, optimizer moments and step counts included."""
    found = {"infer": dict(trainer.ppo_model_infer.shards()), "train": dict(trainer.ppo_model_train.shards())}
    steps = {"optimizer": trainer.ppo_update.policy_step, "critic_optimizer": trainer.ppo_update.critic_step}
    if trainer.models.critic is not None:
        found["critic"] = dict(trainer.models.critic.shards())
    for what, step in steps.items():
        if step is not None:
            found[what] = step.optimizer.arrays()
    return {
        f"{what}/{name}": hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]
        for what, arrays in found.items()
        for name, array in arrays.items()
    }


def greedy(trainer: PPOTrainer) -> dict[str, np.ndarray]:
    """The most likely responses to the last prompts, by a generating model with the synced weights."""
    from dataclasses import replace

    from mindrlhf.trainer.builder import build_infer
    from mindrlhf.trainer.rollout import generate_rollout

    job = replace(trainer.job, ppo=replace(trainer.job.ppo, do_sample=False, generation_batch_size=0))
    model = build_infer(job, trainer.ppo_model_infer.groups)
    model.load(dict(trainer.ppo_model_infer.shards()))
    batch = trainer.prompts.next_batch()
    rollout = generate_rollout(model, batch, trainer.exchange, seed=0, iteration=0)
    return {f"greedy/{name}": array for name, array in rollout._asdict().items()}


def skip(trainer: WatchedTrainer) -> dict[str, Any]:
    """An update in which the policy's loss is NaN on the last rank alone; what it changed of the policy."""
    before = digests(trainer)
    step = trainer.ppo_update.policy_step
    accumulate, last_rank = step.accumulate, trainer.runtime.world_size - 1

    def faulty(*arguments: Any, **options: Any) -> Any:
        statistics = accumulate(*arguments, **options)
        if trainer.runtime.rank == last_rank:
            step._losses[-1] = float("nan")
        return statistics

    step.accumulate = faulty  # type: ignore[method-assign]
    rollout = trainer.last_experience.rollout
    result = trainer.ppo_update.run(trainer.last_experience, 0, lambda: None)
    del step.accumulate
    after, skips = digests(trainer), trainer.ppo_update.skips
    report = {
        "changed": [name for name in after if not name.startswith("critic") and after[name] != before[name]],
        "count": result.skipped,
        "rows": [entry["sample_ids"] for entry in skips.report(np.arange(len(rollout.tokens)))[0]],
    }
    skips.end_update(skipped=False)
    return report


def refusal(trainer: PPOTrainer, parameter: str, broken_rank: int) -> str:
    """What ``verify`` says when one element of one rank's shard is off by a bit; nothing before."""

    def shards() -> Iterator[tuple[str, np.ndarray]]:
        for name, array in whole.items():
            if name == parameter and trainer.runtime.rank == broken_rank:
                array = array.copy()
                array.view(np.int32).reshape(-1)[-1] ^= 1
            yield name, array

    trainer.weight_sync.verify(trainer.exchange)
    whole = dict(trainer.ppo_model_infer.shards())
    trainer.ppo_model_infer.load(dict(shards()))
    message = ""
    try:
        trainer.weight_sync.verify(trainer.exchange)
    except MindRLHFError as error:
        message = str(error)
    trainer.weight_sync.sync()
    return message


def main() -> None:
    begin = time.perf_counter()
    world_size = env_world_size()
    if is_scheduler():
        from mindspore.communication import init

        init()
        return
    cases = json.loads(Path(sys.argv[1]).read_text())
    from mindrlhf.configs.load import load_run_config
    from mindrlhf.runtime.device import start_runtime

    context = load_run_config(next(iter(cases.values()))["train"]).context
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault("LOCAL_DEFAULT_PATH", scratch)
        runtime = start_runtime(context, use_parallel=world_size > 1, scratch_dir=scratch)
        results: dict[str, Any] = {"seconds/start": time.perf_counter() - begin}
        for name, case in cases.items():
            results[name] = run_case(name, case, runtime)
        write_results(runtime.rank, results)


if __name__ == "__main__":
    main()
