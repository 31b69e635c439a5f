"""What a page is made from: curves, samples that fit, summaries, settings, the catalogue of metrics."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mindrlhf.report.catalogue import GROUPS, groups_of
from mindrlhf.report.payload import make_payload
from mindrlhf.report.reading import Series, read_runs
from mindrlhf.report.settings import flatten, sections_of
from mindrlhf.report.summary import summarize
from mindrlhf.report.thinning import fit_samples, stretches_of
from tests.unit.report.conftest import CONFIG, synthetic_samples

MakeRun = Callable[..., Path]


def test_payload_holds_the_curves(make_run: MakeRun) -> None:
    lines = [
        {"iteration": 1, "objective/kl": 0.1234567891, "off": 0.0, "late": None, "time/rollout": 3.0,
         "time/train": 4.0, "time/iteration": 8.0},
        {"iteration": 2, "objective/kl": float("nan"), "off": 0.0, "late": 5, "time/rollout": 2.0,
         "time/train": 4.0, "time/iteration": 5.0},
    ]  # fmt: skip
    evaluations = [{"iteration": 0, "eval/kl": float("nan")}, {"iteration": 2, "eval/kl": 1.5, "prompts": 8}]
    (run,) = runs = read_runs([make_run(metrics=lines, evaluations=evaluations)])
    data = make_payload(runs, [[]])
    (found,) = data["runs"]
    assert (found["first"], found["last"]) == ([1, 2], [1, 2])
    assert found["curves"]["objective/kl"] == {"mean": [0.123457, None], "broken": [2]}
    assert found["curves"]["late"] == {"mean": [None, 5.0]}
    assert "off" not in found["curves"]
    assert found["phases"] == ["time/rollout", "time/train", "time/other"]
    assert found["curves"]["time/other"] == {"mean": [1.0, 0.0]}  # 8 - 7, and never below 0
    assert found["evaluations"] == {"eval/kl": {"x": [2], "y": [1.5]}}
    assert [group["title"] for group in data["groups"]] == ["Goal", "Speed", "Other"]
    assert len(run.metrics) == 2


def test_long_curves_become_stretches() -> None:
    stretches = stretches_of(np.array([1, 2, 4, 5, 9, 10, 11]), most=3)
    assert (stretches.first.tolist(), stretches.last.tolist()) == ([1, 5, 11], [4, 10, 11])
    values = Series(np.array([1, 2, 4, 5, 10, 11]), np.array([1.0, 2, 6, np.inf, 7, 8]))
    assert stretches.curve(values) == {
        "mean": [3.0, 7.0, 8.0],
        "low": [1.0, 7.0, 8.0],
        "high": [6.0, 7.0, 8.0],
        "broken": [5],
    }
    whole = stretches_of(np.arange(600))
    assert whole.first.tolist() == whole.last.tolist() == list(range(600))
    assert len(stretches_of(np.arange(601)).first) == 301


def test_samples_that_do_not_fit_are_cut_and_thinned() -> None:
    samples = synthetic_samples(300, each=2)
    assert fit_samples(samples, 10**9) == (samples, 8000)
    kept, longest = fit_samples(samples, 60_000)
    assert longest == 1000
    assert sum(len(json.dumps(sample, ensure_ascii=False).encode()) for sample in kept) < 90_000
    assert 100 < len(kept) < 300
    assert (kept[0], kept[-1]) == (samples[0], samples[-1])
    ranked = sorted(samples, key=lambda sample: sample["score"])
    assert all(sample in kept for sample in ranked[:50] + ranked[-50:])
    assert [sample["iteration"] for sample in kept] == sorted(sample["iteration"] for sample in kept)
    (long,), longest = fit_samples([{"iteration": 1, "prompt": [1, 2], "response": "x" * 9000}], 10**9)
    assert (longest, long["prompt"]) == (8000, "[1, 2]")
    assert long["response"] == "x" * 8000 + " … [1000 more characters]"
    assert fit_samples([], 10)[0] == []


def test_summary_by_hand() -> None:
    series = Series(np.array([1, 2, 3, 4]), np.array([np.nan, 3.0, 5.0, 4.0]))
    assert summarize(series, 1) == (3.0, 4.0, 5.0, 3, 3.0, 5.0)
    assert summarize(series, -1) == (3.0, 4.0, 3.0, 2, 3.0, 5.0)
    assert summarize(series) == (3.0, 4.0, None, None, 3.0, 5.0)
    assert summarize(Series(np.array([1]), np.array([np.nan]))) is None


def test_settings_are_flat(make_run: MakeRun) -> None:
    assert flatten({"a": {"b": 1, "c": [1, 2]}, "d": None}) == {"a.b": "1", "a.c": "[1, 2]", "d": "none"}
    (run,) = read_runs([make_run(config=CONFIG | {"extra": 1}, state={"iteration": 2})])
    sections = sections_of(run)
    assert list(sections) == [
        "PPO",
        "Versions",
        "Machine",
        "train",
        "Other",
        "Newest checkpoint: iteration_000002",
    ]
    assert sections["Machine"]["memory"] == "23.5 GiB"
    assert sections["Versions"]["git.revision"] == CONFIG["git"]["revision"]
    assert sections["train"]["optimizer.learning_rate"] == "1e-06"


def test_metrics_have_one_place_each() -> None:
    metrics = [chart.metric for _, charts in GROUPS for chart in charts]
    assert len(metrics) == len(set(metrics))
    groups = dict(groups_of(["iteration", "lr", "time/rollout", "new/metric"]))
    assert {title: [chart.metric for chart in charts] for title, charts in groups.items()} == {
        "Optimizer": ["lr"],
        "Other": ["new/metric"],
    }


def test_catalogue_knows_the_metrics_of_the_trainer(repo_root: Path) -> None:
    source = (repo_root / "mindrlhf/trainer/metrics.py").read_text(encoding="utf-8")
    written = set(re.findall(r'^\s+"([\w/]+)":', source, re.M))
    assert len(written) > 20
    assert "Other" not in dict(groups_of(written))
