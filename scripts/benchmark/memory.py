#!/usr/bin/env python
"""Memory that PPO takes, phase by phase, beside the plan of scripts/plan.py.

    python scripts/benchmark/memory.py --model default large

Each model runs in its own process, so that none sees what another has left: random weights are read
from a file, then the whole trainer runs two iterations (rollout, score, train, sync) and saves. What is
compared is the resident set's high-water mark of each phase, which Linux lets a process reset
(``/proc/self/clear_refs``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from common import BATCH, MODELS, model_config, random_shards

from mindrlhf.checkpoint.sources import ArraySource
from mindrlhf.checkpoint.weight_files import write_weights
from mindrlhf.configs.keys import (
    ContextConfig,
    JobConfig,
    ModelConfig,
    ParallelConfig,
    PPOConfig,
    RunConfig,
)
from mindrlhf.configs.load import load_job
from mindrlhf.models.qwen2.layouts import parameter_layouts
from mindrlhf.parallel.layout import Mesh
from mindrlhf.planning.job_memory import plan_memory

ROOT = Path(__file__).resolve().parents[2]
YAMLS = ROOT / "model_configs/qwen_ppo"
QUICK_START = "quickstart"
PROMPT, RESPONSE = 64, 64
OPTIMIZER = {"type": "AdamW", "betas": [0.9, 0.95], "eps": 1e-5, "weight_decay": 0.1}
TRAINER_PHASES = {"scoring": "score", "training": "train"}
"""The plan's names of phases -> the trainer's, where they differ."""
FIRST_TIME = ("rollout", "scoring")
TOLERANCE = 0.15
SCHEDULE = {"type": "ConstantWarmUpLR", "learning_rate": 1e-6, "warmup_steps": 0, "total_steps": -1}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--model", nargs="+", choices=[*MODELS, QUICK_START], default=["default", "large"],
        help="sizes by name, or the quick start's YAMLs (default: default large)",
    )  # fmt: skip
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
        help="override a PPO hyper-parameter; may be repeated",
    )  # fmt: skip
    parser.add_argument("--iterations", type=int, default=2, help="of PPO (default: 2)")
    parser.add_argument("--worker", metavar="DIRECTORY", help=argparse.SUPPRESS)
    return parser.parse_args()


def job_of(name: str, overrides: Sequence[str], iterations: int) -> JobConfig:
    """One process; all models of the same sizes, and a separate critic, except for the quick start."""
    if name == QUICK_START:
        generate = YAMLS / "generate_smollm2_135m.yaml"
        return load_job(
            sft_path_infer=generate,
            reward_path=generate,
            critic_path=generate,
            sft_path_train=YAMLS / "finetune_smollm2_135m.yaml",
            ppo_config=YAMLS / "ppo_smollm2_135m.yaml",
            overrides=[f"total_iterations={iterations}", *overrides],
            single_process=True,
        )
    run = RunConfig(
        path=Path(name),
        context=ContextConfig(),
        parallel=ParallelConfig(),
        model=model_config(name, seq_length=PROMPT + RESPONSE),
        optimizer=OPTIMIZER,
        lr_schedule=SCHEDULE,
    )
    ppo = PPOConfig(
        total_iterations=iterations,
        rollout_batch_size=BATCH[name],
        ppo_epochs=1,
        num_minibatches=1,
        max_prompt_length=PROMPT,
        max_response_length=RESPONSE,
        stop_token_ids=(run.model.vocab_size - 1,),
    )
    changes = {key: json.loads(value) for key, _, value in (text.partition("=") for text in overrides)}
    return JobConfig(infer=run, train=run, reward=run, critic=run, ppo=replace(ppo, **changes))


def write_random_weights(path: Path, model: ModelConfig) -> None:
    write_weights(path, ArraySource(random_shards(parameter_layouts(model, Mesh()))))


class HighWater:
    """Listens to the trainer's phases and keeps the resident set's peaks of each, in bytes."""

    def __init__(self) -> None:
        self.bytes: dict[str, list[int]] = {}
        self.reset()

    def reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def take(self, name: str) -> None:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        (peak,) = (int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
        self.bytes.setdefault(name, []).append(peak)
        self.reset()

    def phase_started(self, name: str, total: int | None, unit: str) -> None:
        self.take("between")

    def phase_advanced(self, done: int) -> None:
        pass

    def phase_ended(self, name: str) -> None:
        self.take(name)


def run_worker(directory: Path, job: JobConfig) -> None:
    """Runs PPO in this process and leaves the peaks in ``directory/peaks.json``."""
    from mindrlhf.data.columns import prompt_schema
    from mindrlhf.data.mindrecord import write_mindrecord
    from mindrlhf.runtime.device import start_runtime
    from mindrlhf.runtime.host_exchange import HostExchange
    from mindrlhf.trainer.loop import train
    from mindrlhf.trainer.recipes import rl
    from mindrlhf.trainer.recipes.ppo_job import open_checkpoints
    from mindrlhf.trainer.recipes.rl import DataPaths, PPOTrainer
    from mindrlhf.trainer.run import Run
    from mindrlhf.trainer.weight_paths import WeightPaths

    peaks = HighWater()
    rows, columns = job.ppo.rollout_batch_size, job.ppo.max_prompt_length
    ids = np.random.default_rng(1).integers(1, 1000, (rows, columns)).astype(np.int32)
    blank = np.zeros_like(ids)
    write_mindrecord(
        directory / "prompts.mindrecord",
        prompt_schema(columns, columns),
        [{"prompt_ids": ids, "pretrain_ids": ids, "loss_mask": blank}],
    )
    runtime = start_runtime(job.train.context, use_parallel=False, scratch_dir=str(directory))
    weights = WeightPaths(train=directory / "weights.ckpt")
    shared = job.ppo.critic == "shared"
    run = Run(open_checkpoints(job, directory / "run", HostExchange(runtime)), listeners=[peaks])
    # The quick start's reward is a function; what it computes does not matter here.
    rl.function_scores = lambda *arguments: np.full(rows, 0.5, np.float32)
    trainer = PPOTrainer(
        job,
        weights if shared else replace(weights, reward=weights.train, critic=weights.train),
        DataPaths(directory / "prompts.mindrecord"),
        run,
        tokenizer=_no_tokenizer() if shared else None,
        reward_function=(lambda prompts, responses: []) if shared else None,
    )
    train(run, trainer)
    peaks.take("between")
    (directory / "peaks.json").write_text(json.dumps(peaks.bytes), encoding="utf-8")


def _no_tokenizer() -> Any:
    return SimpleNamespace(decode=lambda ids, **_: str(len(ids)))


def measure(name: str, args: argparse.Namespace) -> dict[str, list[int]]:
    """Peak bytes of each phase, one per iteration, of a fresh process."""
    with tempfile.TemporaryDirectory(prefix="mindrlhf-memory-") as scratch:
        directory = Path(scratch)
        job = job_of(name, args.overrides, args.iterations)
        write_random_weights(directory / "weights.ckpt", job.train.model)
        environment = dict.fromkeys(("LOCAL_DEFAULT_PATH", "LOG_MF_PATH", "MS_OM_PATH"), scratch)
        command = [sys.executable, __file__, "--worker", scratch, "--model", name]
        command += ["--iterations", str(args.iterations)]
        command += [part for override in args.overrides for part in ("--set", override)]
        subprocess.run(
            command, check=True, env=os.environ | environment | {"GLOG_v": "3"}, stdout=subprocess.DEVNULL
        )
        peaks: dict[str, list[int]] = json.loads((directory / "peaks.json").read_text(encoding="utf-8"))
    return peaks


def compare(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measured and planned bytes of each phase of a model."""
    job = job_of(name, args.overrides, args.iterations)
    plan = plan_memory(job, with_reward_model=job.ppo.critic == "separate")
    peaks = measure(name, args)
    rows = []
    for phase in plan.phases:
        seen = peaks[TRAINER_PHASES.get(phase.name, phase.name)]
        measured = seen[0] if phase.name in FIRST_TIME else max(seen)
        rows.append({"model": name, "phase": phase.name, "measured": measured, "planned": phase.total})
    whole = max(max(seen) for seen in peaks.values())
    rows.append({"model": name, "phase": "peak of all", "measured": whole, "planned": plan.peak.total})
    return rows


def main() -> int:
    args = parse_args()
    if args.worker:
        run_worker(Path(args.worker), job_of(args.model[0], args.overrides, args.iterations))
        return 0
    print(f"{'model':<12}{'phase':<14}{'measured GB':>12}{'planned GB':>12}{'ratio':>8}")
    good = True
    for name in args.model:
        for row in compare(name, args):
            ratio = row["planned"] / row["measured"]
            good &= abs(ratio - 1) <= TOLERANCE
            sizes = f"{row['measured'] / 1e9:>12.2f}{row['planned'] / 1e9:>12.2f}"
            print(f"{row['model']:<12}{row['phase']:<14}{sizes}{ratio:>8.2f}")
    print(f"all within {TOLERANCE:.0%}" if good else f"NOT all within {TOLERANCE:.0%}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
