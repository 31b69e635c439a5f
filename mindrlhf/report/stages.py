"""Runs of ``sft.py`` and ``reward_model.py``, brought into the form that the rest of the report knows.

A stage before PPO counts optimizer steps in place of iterations and has its evaluations in ``metrics.jsonl``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Line = dict[str, Any]

PPO, SFT, REWARD = "ppo", "sft", "reward"
TITLES = {PPO: "PPO", SFT: "SFT", REWARD: "Reward model"}
"""What kind of run it is, for people."""

_EVALUATION = "eval/"
_PLAIN = ("iteration", "epoch")


def counts_steps(line: Mapping[str, Any]) -> bool:
    """Whether a line of ``metrics.jsonl`` is of a stage before PPO."""
    return "step" in line and "iteration" not in line


def unit_of(kind: str) -> str:
    """What a run of a kind counts."""
    return "iteration" if kind == PPO else "step"


def kind_of(lines: Sequence[Line], config: Mapping[str, Any]) -> str:
    """The kind of a run, from ``config.json`` where that says it, else from its metrics."""
    if not any(map(counts_steps, lines)):
        return PPO
    configuration = config.get("configuration")
    stage = configuration.get("stage") if isinstance(configuration, Mapping) else None
    if stage in (SFT, REWARD):
        return str(stage)
    return REWARD if any("train/accuracy" in line or "eval/accuracy" in line for line in lines) else SFT


def split_lines(lines: Sequence[Line]) -> tuple[list[Line], list[Line]]:
    """Metrics and evaluations of a stage, with its steps for iterations.

    Args:
        lines: of ``metrics.jsonl``. That of step 0 has an evaluation only.
    """
    renamed = [
        {{"step": "iteration", "time/step": "time/iteration"}.get(name, name): line[name] for name in line}
        for line in lines
    ]
    metrics = [{name: line[name] for name in line if not name.startswith(_EVALUATION)} for line in renamed]
    evaluations = [
        {name: line[name] for name in line if name == "iteration" or name.startswith(_EVALUATION)}
        for line in renamed
    ]
    return (
        [line for line in metrics if any(name not in _PLAIN for name in line)],
        [line for line in evaluations if len(line) > 1],
    )
