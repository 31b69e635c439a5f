"""The PPO run that ``test_rl.py`` looks at from all sides, and its trace."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np

from mindrlhf.configs.load import load_job
from mindrlhf.data.preprocess import PreprocessOptions, preprocess
from mindrlhf.data.prompts import PromptBatch
from mindrlhf.data.tokenizer_loading import load_tokenizer
from mindrlhf.runtime.device import Runtime
from mindrlhf.runtime.host_exchange import HostExchange
from mindrlhf.runtime.signals import StopRequest
from mindrlhf.trainer.console.state import RunState
from mindrlhf.trainer.experience import Experience, Rollout, ScoredRollout
from mindrlhf.trainer.loop import train
from mindrlhf.trainer.recipes.ppo_job import open_checkpoints
from mindrlhf.trainer.recipes.rl import DataPaths, PPOTrainer
from mindrlhf.trainer.run import Observers, Run
from mindrlhf.trainer.trackers.tensorboard import TensorBoardTracker
from mindrlhf.trainer.trackers.tracker import Trackers
from mindrlhf.trainer.update import UpdateResult
from mindrlhf.trainer.weight_paths import WeightPaths
from tests.probes import policy_logprobs

PROMPT, RESPONSE, BATCH, VALID = 32, 5, 4, 1024
# Smaller than the tiny YAMLs, so that graphs compile fast, with more rows than the tokenizer has ids.
SMALLER = {
    "vocab_size: 1024": "vocab_size: 1152",
    "hidden_size: 64": "hidden_size: 32",
    "num_layers: 2": "num_layers: 1",
    "num_heads: 8": "num_heads: 4",
    "intermediate_size: 176": "intermediate_size: 48",
    "initializer_range: 0.02": "initializer_range: 0.2",
    "learning_rate: 1.e-4": "learning_rate: 5.e-3",
}
OVERRIDES = [
    *("seed=5", "total_iterations=2", "save_interval=1", "keep_checkpoints=2", "log_samples=2"),
    *(f"rollout_batch_size={BATCH}", "ppo_epochs=2", "num_minibatches=2", "kl_controller=adaptive"),
    *(f"max_prompt_length={PROMPT}", f"max_response_length={RESPONSE}", "decode_steps_per_call=2"),
    # One in five of the tokenizer's ids ends a response.
    *(f"valid_vocab_size={VALID}", "temperature=0.8", f"stop_token_ids={list(range(0, VALID, 5))}"),
    # What has a state of its own must come back when a run is resumed.
    *("scale_rewards=True", "center_rewards=True", "ptx_coef=0.1", "entropy_coef=0.01"),
]


@dataclass
class Trace:
    """What a trainer drew and learnt from, and what the trained policy says of it."""

    trainer: PPOTrainer
    batches: list[PromptBatch] = field(default_factory=list)
    logprobs: list[np.ndarray] = field(default_factory=list)
    scored: list[ScoredRollout] = field(default_factory=list)
    experiences: list[Experience] = field(default_factory=list)

    def __post_init__(self) -> None:
        trainer = self.trainer
        draw, score, learn = trainer.rollout, trainer.score, trainer.update

        def rollout(batch: PromptBatch, iteration: int) -> Rollout:
            made = draw(batch, iteration)
            self.batches.append(batch)
            self.logprobs.append(
                policy_logprobs(trainer.ppo_model_train, made, trainer.exchange, rows_per_pass=0)
            )
            return made

        def scored(made: Rollout) -> ScoredRollout:
            self.scored.append(score(made))
            return self.scored[-1]

        def update(experience: Experience, iteration: int) -> UpdateResult:
            self.experiences.append(experience)
            return learn(experience, iteration)

        trainer.rollout, trainer.score, trainer.update = rollout, scored, update  # type: ignore[method-assign]

    @property
    def rollouts(self) -> list[Rollout]:
        return [scored.rollout for scored in self.scored]


@dataclass
class Phases:
    """Listens to phases: name, total, unit and what was done of each, in order."""

    heard: list[tuple[str, int | None, str, int]] = field(default_factory=list)

    def phase_started(self, name: str, total: int | None, unit: str) -> None:
        self.heard.append((name, total, unit, 0))

    def phase_advanced(self, done: int) -> None:
        name, total, unit, before = self.heard[-1]
        self.heard[-1] = (name, total, unit, before + done)

    def phase_ended(self, name: str) -> None:
        assert self.heard[-1][0] == name


@dataclass
class TracedRun:
    """The first two iterations, and what they left."""

    run: Run
    trainer: PPOTrainer
    trace: Trace
    model: Path
    save: Path
    experience: Path
    last: Path | None
    metrics: list[dict[str, float]]
    samples: list[dict[str, Any]]
    differences: list[str]
    prompt_rows: int
    phases: list[tuple[str, int | None, str, int]]
    console: RunState


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]


def smaller_configs(configs: Path, directory: Path) -> dict[str, Path]:
    paths = {}
    for name in ("generate", "finetune"):
        text = (configs / f"{name}_qwen2_tiny.yaml").read_text(encoding="utf-8")
        for old, new in SMALLER.items():
            text = text.replace(old, new)
        paths[name] = directory / f"{name}.yaml"
        paths[name].write_text(text, encoding="utf-8")
    return paths


def run_two_iterations(repo_root: Path, directory: Path) -> TracedRun:
    """Preprocesses prompts, trains, and notes what the trainer did; the generating model starts stale."""
    configs = repo_root / "model_configs" / "qwen_ppo"
    paths = smaller_configs(configs, directory)
    script = repo_root / "scripts" / "make_demo_inputs.py"
    command = [script, "--output_dir", directory / "demo", "--rows", "80", "--config", paths["generate"]]
    subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True)
    tokenizer = load_tokenizer(directory / "demo" / "tokenizer")
    data = directory / "data.mindrecord"
    summary = preprocess(
        tokenizer,
        PreprocessOptions(directory / "demo" / "cvalues_demo.jsonl", data, PROMPT, 128),
    )
    job = load_job(
        sft_path_infer=paths["generate"],
        sft_path_train=paths["finetune"],
        reward_path=paths["generate"],
        critic_path=paths["generate"],
        ppo_config=configs / "ppo_qwen2_tiny.yaml",
        overrides=OVERRIDES,
        world_size=1,
        single_process=True,
    )
    # Not start_runtime: it sets the device, which MindSpore refuses once other tests have computed.
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    phases, console, save = Phases(), RunState("PPO", "iteration"), directory / "save"
    run = Run(
        open_checkpoints(job, save, HostExchange(Runtime(rank=0, world_size=1))),
        observers=Observers(StopRequest(), console, Trackers([console, TensorBoardTracker()])),
        listeners=[phases],
        experience_file=directory / "experience.mindrecord",
    )
    trainer = PPOTrainer(
        job,
        WeightPaths(train=directory / "demo" / "hf_model"),
        DataPaths(data),
        run,
        tokenizer=tokenizer,
        verify_sync=True,
        keeps_experience=True,
    )
    # As if the infer checkpoint were another one: the trainer must not begin with two policies.
    trainer.ppo_model_infer.load({name: 1.5 * array for name, array in trainer.ppo_model_infer.shards()})
    trace = Trace(trainer)
    assert train(run, trainer), "all steps are done"
    return TracedRun(
        run,
        trainer,
        trace,
        directory / "demo" / "hf_model",
        save,
        directory,
        run.last_checkpoint,
        json_lines(save / "metrics.jsonl"),
        json_lines(save / "samples.jsonl"),
        trainer.weight_sync.differences(),
        summary.counts.rows,
        list(phases.heard),
        console,
    )
