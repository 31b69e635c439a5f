#!/usr/bin/env python
"""How fast one PPO iteration is, and how much memory it takes: PPOTrainer itself on random weights.

    python scripts/benchmark/ppo_iteration.py --model default

One process, prompts of --prompt tokens, responses that always have --response tokens, one rollout, a
separate critic and a reward model of the policy's size, a reference, one AdamW step of policy and of critic
over the whole batch. ``scoring`` includes rewards and advantages; an iteration is all of it, the drawing of
prompts and the records too. Figures are medians of the steps after the warm-up.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from common import model_config, random_shards
from results import (
    BATCH,
    CLIP_RANGE,
    COLUMNS,
    GAMMA,
    KL_COEF,
    LAMBDA,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    MODELS,
    TEMPERATURE,
    VALUE_CLIP_RANGE,
    VALUE_COEF,
    Steps,
    append_json,
    memory_gib,
    progress,
    row,
    table,
)

DTYPES = ("float32", "bfloat16")

if TYPE_CHECKING:
    from mindrlhf.configs.keys import JobConfig
    from mindrlhf.trainer.recipes.rl import PPOTrainer


def parse_args() -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="default", help="sizes by name (default: default)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the operands of products (default: float32)"
    )
    parser.add_argument("--layers", type=int, default=0, help="0: the model's (default)")
    parser.add_argument("--batch", type=int, default=0, help="sequences; 0: the model's (default)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt (default: 64)")
    parser.add_argument("--response", type=int, default=64, help="tokens of a response (default: 64)")
    parser.add_argument("--micro_batch", type=int, default=0, help="rows per backward pass; 0: all (default)")
    parser.add_argument("--score_batch", type=int, default=0, help="rows per scoring pass; 0: all (default)")
    parser.add_argument("--decode_steps", type=int, default=8, help="tokens per decode call (default: 8)")
    parser.add_argument("--steps", type=int, default=5, help="steps that count (default: 5)")
    parser.add_argument("--warm_up", type=int, default=2, help="steps before them (default: 2)")
    parser.add_argument("--json", type=Path, help="append the run to this file as one line of JSON")
    return parser.parse_args()


def build_job(args: argparse.Namespace) -> JobConfig:
    """The job that the flags describe."""
    from mindrlhf.configs.keys import ContextConfig, JobConfig, ParallelConfig, PPOConfig, RunConfig

    changes = {"num_layers": args.layers} if args.layers else {}
    run = RunConfig(
        path=Path("benchmark"),
        context=ContextConfig(),
        parallel=ParallelConfig(),
        model=model_config(
            args.model, seq_length=args.prompt + args.response, matmul_dtype=args.dtype, **changes
        ),
        optimizer={"type": "AdamW", "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0},
        lr_schedule={
            "type": "ConstantWarmUpLR",
            "learning_rate": LEARNING_RATE,
            "warmup_steps": 0,
            "total_steps": -1,
        },
    )
    ppo = PPOConfig(
        total_iterations=args.warm_up + args.steps,
        log_samples=0,
        rollout_batch_size=args.batch or BATCH[args.model],
        micro_batch_size=args.micro_batch,
        score_batch_size=args.score_batch,
        ppo_epochs=1,
        num_minibatches=1,
        max_prompt_length=args.prompt,
        max_response_length=args.response,
        stop_token_ids=(),
        temperature=TEMPERATURE,
        decode_steps_per_call=args.decode_steps,
        kl_coef=KL_COEF,
        gamma=GAMMA,
        lam=LAMBDA,
        cliprange=CLIP_RANGE,
        cliprange_value=VALUE_CLIP_RANGE,
        vf_coef=VALUE_COEF,
        max_grad_norm=MAX_GRAD_NORM,
    )
    return JobConfig(infer=run, train=run, reward=run, critic=run, ppo=ppo)


def write_inputs(job: JobConfig, directory: Path) -> tuple[Path, Path]:
    """Random weights and random prompts without padding, as files; their paths."""
    from mindrlhf.checkpoint.sources import ArraySource
    from mindrlhf.checkpoint.weight_files import write_weights
    from mindrlhf.data.columns import LOSS_MASK, PRETRAIN_IDS, PROMPT_IDS, prompt_schema
    from mindrlhf.data.mindrecord import write_mindrecord
    from mindrlhf.models.qwen2.layouts import parameter_layouts
    from mindrlhf.parallel.layout import Mesh

    weights, data = directory / "policy.safetensors", directory / "prompts.mindrecord"
    model, rows, columns = job.train.model, 4 * job.ppo.rollout_batch_size, job.ppo.max_prompt_length
    write_weights(weights, ArraySource(random_shards(parameter_layouts(model, Mesh()))))
    prompts = np.random.default_rng(1).integers(1, model.vocab_size, (rows, columns)).astype(np.int32)
    sequences = np.zeros((rows, job.ppo.max_length), np.int32)
    batch = {PROMPT_IDS: prompts, PRETRAIN_IDS: sequences.copy(), LOSS_MASK: sequences}
    batch[PRETRAIN_IDS][:, :columns] = prompts
    write_mindrecord(data, prompt_schema(columns, job.ppo.max_length), [batch])
    return weights, data


def build_trainer(job: JobConfig, directory: Path, inputs: tuple[Path, Path]) -> PPOTrainer:
    """The trainer, its models loaded; ``inputs`` are the paths of weights and prompts."""
    from mindrlhf.runtime.device import start_runtime
    from mindrlhf.runtime.host_exchange import HostExchange
    from mindrlhf.runtime.launching import scratch_directory
    from mindrlhf.trainer.recipes.ppo_job import open_checkpoints
    from mindrlhf.trainer.recipes.rl import DataPaths, PPOTrainer
    from mindrlhf.trainer.run import Run
    from mindrlhf.trainer.weight_paths import WeightPaths

    runtime = start_runtime(job.train.context, use_parallel=False, scratch_dir=scratch_directory())
    weights, data = inputs
    run = Run(open_checkpoints(job, directory / "save", HostExchange(runtime)))
    trainer = PPOTrainer(job, WeightPaths(train=weights), DataPaths(data), run)
    run.begin(trainer)
    return trainer


def timed_step(trainer: PPOTrainer) -> dict[str, float]:
    """Seconds of one iteration and its phases."""
    start = time.perf_counter()
    with trainer.run.timed_step(trainer):
        result = trainer.step(trainer.run.step)
    trainer.run.record(trainer, result)
    whole = time.perf_counter() - start
    phases = trainer.timer.seconds
    return {
        "iteration": whole,
        "rollout": phases["rollout"],
        "scoring": phases["score"],
        "training": phases["train"],
        "sync": phases["sync"],
    }


def measure(args: argparse.Namespace) -> Steps:
    """All steps of one run."""
    job = build_job(args)
    steps = Steps(
        system="MindRLHF",
        model=args.model,
        dtype=args.dtype,
        batch=job.ppo.rollout_batch_size,
        prompt=args.prompt,
        response=args.response,
        layers=job.train.model.num_layers,
        warm_up=args.warm_up,
    )
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mindrlhf_") as directory:
        trainer = build_trainer(job, Path(directory), write_inputs(job, Path(directory)))
        steps.notes["build_seconds"] = time.perf_counter() - start
        steps.notes["built_gib"] = memory_gib("VmRSS")
        print(f"models built in {steps.notes['build_seconds']:.1f} s", flush=True)
        for _ in range(args.warm_up + args.steps):
            steps.seconds.append(timed_step(trainer))
            steps.notes.setdefault("peak_gib_first_step", memory_gib())
            progress(steps)
    steps.peak_gib = memory_gib()
    steps.notes["resident_gib"] = memory_gib("VmRSS")
    return steps


def main() -> None:
    """Measure, print, record."""
    args = parse_args()
    os.environ.setdefault("GLOG_v", "3")
    os.environ.setdefault("MINDRLHF_LOG", "ERROR")
    steps = measure(args)
    print(table(COLUMNS, [row(steps)]))
    if args.json:
        append_json(args.json, steps)


if __name__ == "__main__":
    main()
