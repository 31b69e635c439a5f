"""Runs of sft.py and reward_model.py: read, drawn, summed up and warned about; made up here by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindrlhf.report.catalogue import STAGE_GROUPS
from mindrlhf.report.page import render
from mindrlhf.report.payload import make_payload
from mindrlhf.report.reading import ReportError, Series, read_run, read_runs
from mindrlhf.report.stage_diagnostics import (
    accuracy_near_chance,
    diagnose_stage,
    held_out_loss_rising,
    no_gain,
)
from mindrlhf.report.summary import rows_of, summary_of

MakeRun = Callable[..., Path]


def stage_lines(held_out: Sequence[float], every: int = 2, **more: float) -> list[dict[str, Any]]:
    """Metrics of SFT with an evaluation before training and every ``every`` steps."""
    lines: list[dict[str, Any]] = [{"step": 0, "epoch": 0.0, "eval/loss": held_out[0]}]
    for step in range(1, every * (len(held_out) - 1) + 1):
        line = {
            "step": step, "epoch": step / 4, "loss/train": 3.0 / step, "lr": 1e-5, "grad_norm": 2.0,
            "update/skipped": 0.0, "time/step": 0.5, "tokens_per_second": 100.0, **more,
        }  # fmt: skip
        if step % every == 0:
            line["eval/loss"] = held_out[step // every]
        lines.append(line)
    return lines


def reward_lines(accuracy: float) -> list[dict[str, Any]]:
    lines = stage_lines([0.7, 0.6, 0.5], **{"train/accuracy": 0.8, "train/margin": 1.5})
    for line in lines:
        if "eval/loss" in line:
            line |= {
                "eval/accuracy": accuracy,
                "eval/margin": 0.4,
                "eval/scores": -0.2,
                "eval/scores_std": 2.0,
            }
    return lines


def configuration(stage: str, held_out: int = 100) -> dict[str, Any]:
    return {
        "created": "2026-11-23T07:30:15+00:00",
        "machine": {"cpu_count": 2},
        "configuration": {
            "stage": stage,
            "options": {"seed": 1, "learning_rate": 1e-5},
            "plan": {"epochs": 3, "config": {"optimizer": {"type": "AdamW"}}},
            "rows": {"train": 900, "held_out": held_out},
        },
    }


def series(values: Sequence[float], first: int = 0, step: int = 10) -> Series:
    return Series(np.arange(first, first + step * len(values), step), np.array(values, dtype=np.float64))


def test_steps_and_evaluations_are_told_apart(make_run: MakeRun) -> None:
    run = read_run(make_run("sft", metrics=stage_lines([3.0, 2.0, 1.0]), config=configuration("sft")))
    assert run.kind == "sft"
    assert run.iterations.tolist() == [1, 2, 3, 4]
    assert run.evaluation_series("eval/loss").iterations.tolist() == [0, 2, 4]
    assert run.evaluation_series("eval/loss").values.tolist() == [3.0, 2.0, 1.0]
    assert run.series("time/iteration").values.tolist() == [0.5] * 4
    assert not [name for name in run.metric_names() if name.startswith("eval/") or name == "step"]


@pytest.mark.parametrize(
    ("lines", "config", "kind"),
    [
        (stage_lines([1.0, 0.9]), None, "sft"),
        (reward_lines(0.8), None, "reward"),
        (stage_lines([1.0, 0.9]), configuration("reward"), "reward"),
        (stage_lines([1.0, 0.9]), {"configuration": [1]}, "sft"),
        ([{"iteration": 1, "step": 4.0}], configuration("sft"), "ppo"),
    ],
)
def test_the_kind_is_found(make_run: MakeRun, lines: Any, config: Any, kind: str) -> None:
    assert read_run(make_run(metrics=lines, config=config)).kind == kind


def test_the_newest_checkpoint_of_a_stage_counts(make_run: MakeRun) -> None:
    directory = make_run(metrics=stage_lines([3.0, 2.0]))
    for name in ("step_000002", "step_000010", "iteration_000099"):
        (directory / name).mkdir()
        (directory / name / "state.json").write_text(json.dumps({"step": int(name[-6:])}))
    run = read_run(directory)
    assert (run.checkpoint, run.state) == ("step_000010", {"step": 10})


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        ('{"step": 1.5}', "step is 1.5, not a whole number"),
        ('{"step": 1}', "step 1 after step 1"),
        ('{"iteration": 2}', "iteration 2 after step 1"),
        ('{"step": 2, "loss/train": "x"}', 'loss/train is "x", not a number'),
    ],
)
def test_a_broken_line_is_named(make_run: MakeRun, broken: str, fault: str) -> None:
    directory = make_run()
    (directory / "metrics.jsonl").write_text(f'{{"step": 1, "loss/train": 1.0}}\n{broken}\n')
    with pytest.raises(ReportError) as caught:
        read_run(directory)
    assert str(caught.value).startswith(f"{directory / 'metrics.jsonl'}:2: {fault}")


def test_before_the_first_step_there_is_nothing_to_report(make_run: MakeRun) -> None:
    with pytest.raises(ReportError, match="the run has finished no step yet"):
        read_run(make_run(metrics=[{"step": 0, "epoch": 0.0, "eval/loss": 3.0}]))


def test_runs_of_one_kind_only(make_run: MakeRun) -> None:
    directories = [make_run("ppo"), make_run("sft", metrics=stage_lines([2.0, 1.0]))]
    with pytest.raises(ReportError, match=r"ppo is a run of PPO, .*sft one of SFT; give runs of one kind"):
        read_runs(directories)


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_the_page_of_a_stage(make_run: MakeRun, kind: str) -> None:
    lines = reward_lines(0.8) if kind == "reward" else stage_lines([3.0, 2.0, 1.0])
    for line in lines:
        if kind == "sft" and "eval/loss" in line:
            line["eval/perplexity"] = math.exp(line["eval/loss"])
    runs = read_runs([make_run("mine", metrics=lines, config=configuration(kind))])
    text = render(runs)
    for part in ("4 steps", "Flags", "learning_rate", "cpu_count", "Nothing to warn about."):
        assert part in text
    assert {"sft": "MindRLHF · SFT", "reward": "MindRLHF · Reward model"}[kind] in text
    assert 'id="sample-view"' not in text
    page = make_payload(runs, [diagnose_stage(runs[0])])
    assert page["unit"] == "step"
    groups = {group["title"]: [chart["metric"] for chart in group["charts"]] for group in page["groups"]}
    assert groups["Optimizer"] == ["lr", "grad_norm"]  # nothing was skipped
    assert groups["Speed"] == ["tokens_per_second", "time/iteration"]
    assert "Other" not in groups
    wanted = {
        "sft": ["loss/train", "eval/perplexity"],
        "reward": ["loss/train", "train/accuracy", "train/margin", "eval/scores", "eval/scores_std"],
    }
    assert groups["Goal"] == wanted[kind]
    assert page["runs"][0]["evaluations"]["eval/loss"]["x"] == [0, 2, 4]
    shown = [row.metric for row in rows_of(kind) if summary_of(runs[0], row)]
    assert shown[0] == {"sft": "eval/loss", "reward": "eval/accuracy"}[kind]


def test_catalogue_knows_the_metrics_of_the_stages(repo_root: Path) -> None:
    """What the trainer draws itself has a place here, too."""
    for kind, file in (("sft", "sft.py"), ("reward", "reward.py")):
        source = (repo_root / "mindrlhf/trainer/stages" / file).read_text(encoding="utf-8")
        charts = [chart for _, group in STAGE_GROUPS[kind] for chart in group]
        known = {chart.metric for chart in charts} | {chart.evaluation for chart in charts}
        for name in ("loss/train", "train/accuracy", "train/margin", "eval/loss", "eval/perplexity",
                     "eval/accuracy", "eval/margin", "eval/scores", "eval/scores_std"):  # fmt: skip
            assert (f'"{name}"' in source) <= (name in known), (kind, name)


def test_overfitting_by_hand() -> None:
    """From 3 down to 1 and up to 1.3: 15 % of the fall; up to 1.1 is 5 %."""
    found = held_out_loss_rising(series([3.0, 1.5, 1.0, 1.2, 1.3]))
    assert found is not None
    assert found.text == "Held-out loss rising since step 20: overfitting"
    assert found.detail == "Lowest 1 after step 20, last 1.3."
    for values in ([3.0, 1.0, 1.1], [3.0, 2.0, 1.0], [1.0, 1.3], [1.0, 1.0, 1.0], []):
        assert held_out_loss_rising(series(values)) is None


def test_no_gain_by_hand() -> None:
    found = no_gain(series([2.0, math.nan, 1.0, 2.5]))
    assert found is not None
    assert found.text == "Held-out loss no lower than after step 0"
    assert found.detail == "First 2, last 2.5."
    assert no_gain(series([2.0, 2.5, 1.9])) is None
    assert no_gain(series([2.0])) is None


def test_accuracy_near_chance_by_hand() -> None:
    """100 pairs: the standard error is 0.05, so 0.59 is chance and 0.61 is not; 2500 pairs make it 0.01."""
    found = accuracy_near_chance(series([0.4, 0.59]), 100)
    assert found is not None
    assert found.text == "Held-out accuracy no better than chance at step 10"
    assert found.detail == "0.59 on 100 pairs; the standard error of a coin is 0.05."
    assert accuracy_near_chance(series([0.4, 0.61]), 100) is None
    assert accuracy_near_chance(series([0.4, 0.59]), 2500) is None
    assert accuracy_near_chance(series([0.4]), 100) is None, "before training"
    assert accuracy_near_chance(series([0.4, 0.5]), None) is None


def test_findings_of_runs(make_run: MakeRun) -> None:
    def kinds(name: str, lines: list[dict[str, Any]], stage: str = "sft", held_out: int = 100) -> list[str]:
        run = read_run(make_run(name, metrics=lines, config=configuration(stage, held_out)))
        return [found.kind for found in diagnose_stage(run)]

    assert kinds("good", stage_lines([3.0, 2.0, 1.0])) == []
    assert kinds("chance", reward_lines(0.55), "reward") == ["chance"]
    assert kinds("enough", reward_lines(0.55), "reward", 900) == []
    assert kinds("nan", stage_lines([3.0, math.nan, 2.0])) == ["nan"]
    alone = [line for line in stage_lines([3.0, 2.0]) if line["step"]]
    for line in alone:
        line.pop("eval/loss", None)
    assert kinds("alone", alone) == ["not_held_out"]
    skipped = stage_lines([3.0, 2.0, 1.0])
    skipped[2]["update/skipped"] = skipped[3]["update/skipped"] = 1.0
    run = read_run(make_run("skipped", metrics=skipped))
    (found,) = diagnose_stage(run)
    assert found.text == "2 update(s) skipped since step 2"
    assert found.detail == "In 2 of 4 steps, last in 3."
