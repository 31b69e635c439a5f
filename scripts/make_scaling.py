#!/usr/bin/env python
"""Writes docs/scaling.md: memory and traffic of PPO by number of NPUs, computed by the planner.

    python scripts/make_scaling.py

A test compares the smaller part of the table with what this script computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from mindrlhf.configs.keys import JobConfig, ParallelConfig
from mindrlhf.configs.load import load_job
from mindrlhf.planning.job_memory import MemoryPlan, plan_memory
from mindrlhf.planning.traffic import plan_sync, update_traffic
from mindrlhf.utils.files import atomic_file

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "model_configs" / "qwen_ppo"
DOCUMENT = ROOT / "docs" / "scaling.md"
GB = 10**9
WORLD_SIZES = [2**power for power in range(11)]
SHAPES: dict[str, dict[str, Any]] = {
    "7B": {},
    "14B": {
        "hidden_size": 5120,
        "num_layers": 48,
        "num_heads": 40,
        "n_kv_heads": 8,
        "intermediate_size": 13824,
    },
    "32B": {
        "hidden_size": 5120,
        "num_layers": 64,
        "num_heads": 40,
        "n_kv_heads": 8,
        "intermediate_size": 27648,
    },
    "72B": {
        "hidden_size": 8192,
        "num_layers": 80,
        "num_heads": 64,
        "n_kv_heads": 8,
        "intermediate_size": 29568,
    },
}
"""Sizes of Qwen2 and Qwen2.5 models, where they are not those of the 7B YAMLs."""

HEAD = """# Memory and traffic by number of NPUs

Written by `scripts/make_scaling.py`; do not edit by hand. **Computed by the planner (`scripts/plan.py`), not
measured**: no NPU was available, and models of 14B and more have never been built here.

PPO with a separate critic and a reward model of the policy's size, prompts and responses of 4096 tokens; the
7B YAMLs for 8 NPUs with other sizes: bfloat16 weights with float32 masters, layers recomputed, optimizer
states shared out over replicas (`enable_parallel_optimizer`), models at rest in host memory
(`memory_offload`). Training is split over as many ranks as there are key/value heads, generation over half
of them where that fits into 60 GB, so that a sync moves weights. Each replica has at least one row of a
minibatch, which has 16 rows, so above 16 replicas the batch grows with them. Sizes are GB of 10^9 bytes.

- *peak*: of one NPU; *with swap*: when the optimizer's states are in host memory, too (`optimizer.swap`);
  *host*: what a worker then takes there.
- *update*: what an NPU sends in one optimizer step of the policy, in rings: within its model-parallel group
  for the layers, and between replicas for the gradients.
- *sync*: what an NPU receives at most when trained weights go to the generating policy.

| model | NPUs | training | generation | peak | with swap | host | update: layers | update: gradients | sync |
| --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |
"""


@cache
def shipped_job() -> JobConfig:
    """7B on 8 NPUs."""
    generate = CONFIGS / "generate_qwen2_7b_8p.yaml"
    return load_job(
        sft_path_infer=generate,
        sft_path_train=CONFIGS / "finetune_qwen2_7b_8p.yaml",
        reward_path=generate,
        critic_path=generate,
        ppo_config=CONFIGS / "ppo_qwen2_7b.yaml",
    )


def job_of(shape: dict[str, Any], world_size: int, train_mp: int, infer_mp: int, *, swap: bool) -> JobConfig:
    """The 8-NPU job of 7B with other sizes, splits and batches."""
    job = shipped_job()

    def changed(run: Any, mp: int) -> Any:
        split = ParallelConfig(data_parallel=world_size // mp, model_parallel=mp)
        optimizer = {**run.optimizer, "swap": swap} if run.optimizer else run.optimizer
        return replace(run, model=replace(run.model, **shape), parallel=split, optimizer=optimizer)

    replicas = world_size // infer_mp
    rollout = max(job.ppo.rollout_batch_size, job.ppo.num_minibatches * world_size // train_mp)
    generated = min(job.ppo.generation_batch_size, rollout // replicas)
    scored = min(job.ppo.score_batch_size, rollout // replicas)
    ppo = replace(
        job.ppo, rollout_batch_size=rollout, generation_batch_size=generated, score_batch_size=scored
    )
    return JobConfig(
        infer=changed(job.infer, infer_mp),
        reward=changed(job.reward, infer_mp),
        train=changed(job.train, train_mp),
        critic=changed(job.critic, train_mp),
        ppo=ppo,
    )


def row(name: str, shape: dict[str, Any], world_size: int) -> str:
    """One line of the table."""
    heads = shape.get("n_kv_heads", 4)
    train_mp = min(heads, world_size)
    infer_mp = max(train_mp // 2, 1)

    def plan(swap: bool, mp: int) -> MemoryPlan:
        return plan_memory(job_of(shape, world_size, train_mp, mp, swap=swap))

    if plan(True, infer_mp).peak.total > 60 * GB:
        infer_mp = train_mp
    without, swapped = plan(False, infer_mp), plan(True, infer_mp)
    job = without.job
    update = update_traffic(job, job.train, lm_head=True, score_head=False)
    cells = [
        name,
        str(world_size),
        f"dp{world_size // train_mp} mp{train_mp}",
        f"dp{world_size // infer_mp} mp{infer_mp}",
        *(f"{size / GB:.1f}" for size in (without.peak.total, swapped.peak.total, swapped.host)),
        *(f"{size / GB:.1f}" for size in (update.layers, update.gradients)),
        f"{max(plan_sync(job).received) / GB:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def document() -> str:
    """The whole file."""
    return HEAD + "\n".join(_rows()) + "\n"


def _rows() -> Iterator[str]:
    for name, shape in SHAPES.items():
        for world_size in WORLD_SIZES:
            yield row(name, shape, world_size)


if __name__ == "__main__":
    DOCUMENT.parent.mkdir(exist_ok=True)
    with atomic_file(DOCUMENT) as temporary:
        temporary.write_text(document(), encoding="utf-8")
