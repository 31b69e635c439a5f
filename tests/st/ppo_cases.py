"""The runs of test_ppo.py: which layouts, what workers are told, and what they report."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ITERATIONS = 3
SPLIT, REPLICATED = "model.layers.0.attention.wq.weight", "model.norm_out.weight"


@dataclass(frozen=True)
class Case:
    """One run: layouts as (dp, mp), and what else is done with it."""

    infer: tuple[int, int]
    train: tuple[int, int]
    critic: str
    overrides: tuple[str, ...] = ()
    greedy: bool = False
    resume: bool = False
    resume_other: str = ""  # a case of fewer workers, whose checkpoint is gone on from, too
    broken: dict[str, tuple[str, int]] = field(default_factory=dict)
    offload: bool = False
    splits_rows: bool = False

    @property
    def name(self) -> str:
        layouts = (f"dp{dp}mp{mp}" for dp, mp in (self.infer, self.train))
        return "_".join((*layouts, self.critic))

    @property
    def world_size(self) -> int:
        return self.infer[0] * self.infer[1]

    @property
    def reference(self) -> str:
        """The run in one process that this one must equal."""
        return f"dp1mp1_dp1mp1_{self.critic}"


# What is off by default and has a sum over ranks or a state of its own; with a shared critic only, so that
# the other cases run what is on by default.
EXTRAS = ("entropy_coef=0.02", "ptx_coef=0.5", "scale_rewards=True", "center_rewards=True", "score_clip=1.5")

BOTH = {SPLIT: (SPLIT, 2), REPLICATED: (REPLICATED, 2)}

# How a batch is cut into passes differs on purpose: that may not matter either.
CASES = {
    case.name: case
    for case in (
        Case((1, 1), (1, 1), "shared"),
        Case((1, 1), (1, 1), "separate"),
        Case((1, 1), (1, 1), "none", ("advantage=reinforce",)),
        Case((2, 1), (1, 2), "none", ("advantage=reinforce", "micro_batch_size=2")),
        Case((2, 1), (1, 2), "shared", ("micro_batch_size=2",), broken={REPLICATED: (REPLICATED, 1)}),
        Case(
            *((1, 2), (2, 1), "separate", ("score_batch_size=2",)),
            greedy=True,
            broken={SPLIT: (SPLIT, 1)},
            offload=True,
        ),
        Case(
            *((1, 4), (2, 2), "shared", ("generation_batch_size=4",)),
            resume=True,
            resume_other="dp2mp1_dp1mp2_shared",
            broken=BOTH,
            offload=True,
            splits_rows=True,
        ),
    )
}

# Sums of differences that are zero but for rounding have no digits of their own.
ABSOLUTE = {
    "objective/kl": 1e-5,
    "eval/kl": 1e-5,
    "objective/non_score_reward": 1e-6,
    "objective/rlhf_reward": 1e-6,
    "policy/ratio_var": 1e-6,
    "policy/approxkl": 1e-7,
    "loss/policy": 1e-5,
}
RELATIVE = 1e-4


@dataclass(frozen=True)
class Run:
    """What the ranks reported of one case."""

    reports: list[dict[str, Any]]
    arrays: list[dict[str, np.ndarray]]

    @property
    def metrics(self) -> list[dict[str, float]]:
        return self.reports[0]["metrics"]


def write_cases(path: Path, world_size: int, inputs: Any, others: Path | None = None) -> Path:
    """The JSON file that ``worker_ppo.py`` reads; ``others`` has the results of jobs before."""
    cases = {}
    for name, case in CASES.items():
        if case.world_size != world_size:
            continue
        savers = {"offload": case.offload, "splits_rows": case.splits_rows}
        infer = inputs.yaml("generate", *case.infer, **savers)
        train = inputs.yaml("finetune", *case.train, **savers)
        cases[name] = {
            "infer": str(infer),
            "train": str(train),
            "reward": str(infer),
            "critic": str(train),
            "ppo": str(inputs.ppo),
            "overrides": [
                f"total_iterations={ITERATIONS}",
                f"critic={case.critic}",
                *(EXTRAS if case.critic == "shared" else ()),
                *case.overrides,
            ],
            "data": str(inputs.data),
            "held_out": str(inputs.held_out),
            "weights": {
                "infer": str(inputs.stale),
                "train": str(inputs.policy),
                "ref": str(inputs.policy),
                "reward": str(inputs.reward),
            },
            "greedy": case.greedy,
            "resume": case.resume,
            "resume_other": str(others / case.resume_other) if others and case.resume_other else "",
            "break": case.broken,
        }
    path.write_text(json.dumps(cases))
    return path


def collect(reports: list[dict[str, Any]]) -> dict[str, Run]:
    """The reports of a job by case, with the arrays that lie beside them."""
    directory = reports[0]["directory"]
    return {
        name: Run(
            [report[name] for report in reports],
            [dict(np.load(directory / f"{name}_rank{rank}.npz")) for rank in range(len(reports))],
        )
        for name in CASES
        if name in reports[0]
    }


def assert_metrics_close(actual: dict[str, float], expected: dict[str, float], relative: float) -> None:
    assert actual.keys() == expected.keys()
    far = {
        name: (actual[name], value)
        for name, value in expected.items()
        if not np.isclose(actual[name], value, rtol=relative, atol=ABSOLUTE.get(name, 1e-7))
    }
    assert far == {}


def whole_policy(run: Run, case: Case, inputs: Any) -> dict[str, np.ndarray]:
    """Full tensors of the last checkpoint, by each of its model-parallel ranks' files."""
    from mindrlhf.checkpoint.shards import merge_shards

    directory = Path(run.reports[0]["last"]) / "policy"
    whole = directory / "whole.safetensors"
    merge_shards(directory, policy_layouts(inputs, case.train, case.critic), whole)
    return read_whole(whole, policy_layouts(inputs, (1, 1), case.critic))


def initial_policy(inputs: Any) -> dict[str, np.ndarray]:
    return read_whole(inputs.policy, policy_layouts(inputs, (1, 1), "separate"))


def read_whole(path: Path, layouts: dict[str, Any]) -> dict[str, np.ndarray]:
    from mindrlhf.checkpoint.shards import load_shard

    return load_shard(path, layouts, 0)


def policy_layouts(inputs: Any, mesh: tuple[int, int], critic: str) -> dict[str, Any]:
    from mindrlhf.configs.load import load_run_config
    from mindrlhf.models.qwen2.layouts import parameter_layouts
    from mindrlhf.parallel.layout import Mesh

    model = load_run_config(inputs.yaml("finetune", *mesh)).model
    return parameter_layouts(model, Mesh(*mesh), score_head=critic == "shared")
