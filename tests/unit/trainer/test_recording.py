"""What a finished iteration leaves, the folder of a run, and when its curves are drawn."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindrlhf.cli.ppo import build_parser as ppo_parser
from mindrlhf.cli.sft import build_parser as sft_parser
from mindrlhf.configs.options import run_directory
from mindrlhf.configs.schema import PPOConfig
from mindrlhf.trainer import records as records_module
from mindrlhf.trainer.curves import CURVES
from mindrlhf.trainer.experience import Rollout, Scores, make_experience
from mindrlhf.trainer.losses import POLICY_STATISTICS, RATIO_EDGES
from mindrlhf.trainer.metrics import ratio_histogram
from mindrlhf.trainer.recorder import RedrawTimer, RunRecords
from mindrlhf.trainer.recording import IterationResults, histograms, record_iteration, start_records
from mindrlhf.trainer.trackers.base import Histogram, RunStart, Tracker
from mindrlhf.trainer.trackers.group import Trackers
from mindrlhf.trainer.update import UpdateResult

METRICS = {
    **{name: 0.5 for name, _ in CURVES},
    **{"response/eos_rate": 0.5, "policy/ratio": 1.0, "tokens_per_second": 9.0, "time/iteration": 2.0},
}
CONFIG = PPOConfig(total_iterations=5, log_samples=1)


def results() -> IterationResults:
    rollout = Rollout.of(
        tokens=np.arange(10, dtype=np.int32).reshape(2, 5),
        prompt_lengths=np.array([2, 1], np.int32),
        response_lengths=np.array([1, 3], np.int32),
        logprobs=np.array([[-1, 0, 0], [-2, -3, -1]], np.float32),
        stopped=np.array([0, 1], np.int32),
        sample_ids=np.array([7, 8]),
    )
    scores = Scores(
        ref_logprobs=np.array([[-2, 5, 5], [-2, -2, -4]], np.float32),
        values=np.zeros((2, 3), np.float32),
        scores=np.array([1, 4], np.float32),
    )
    # Two minibatches of 3 and 1 tokens; two ratios are above the edges from 0.7 on, one is above the last.
    above = np.zeros((2, len(RATIO_EDGES)), np.float32)
    above[0] = [3, 2, 2, *[2] * (len(RATIO_EDGES) - 4), 1]
    above[1, :7] = 1
    sums = np.array([[0, 0, 0, 3.5, 5.25, 0], [0, 0, 0, 1.0, 1.0, 0]], np.float32)
    update = UpdateResult(
        tokens=np.array([3.0, 1.0]),
        policy=np.concatenate([sums, above], axis=1),
        value=np.zeros((2, 4), np.float32),
        grad_norm=np.ones(2),
        critic_grad_norm=np.ones(2),
        learning_rate=1e-3,
    )
    return IterationResults(rollout, scores, make_experience(rollout, scores, 0.5, CONFIG), update)


class Noting(Tracker):
    """Notes what it is told."""

    def __init__(self, shows_metrics: bool = False) -> None:
        self.shows_metrics = shows_metrics
        self.heard: list[tuple[Any, ...]] = []

    def start(self, run: RunStart) -> None:
        self.heard.append(("start", run.first_step, run.is_resumed))

    def scalars(self, step: int, values: Any) -> None:
        self.heard.append(("scalars", step, dict(values)))

    def histograms(self, step: int, values: Any) -> None:
        self.heard.append(("histograms", step, sorted(values)))

    def samples(self, step: int, name: str, samples: Any) -> None:
        self.heard.append(("samples", step, name, list(samples)))


def test_an_iteration_goes_to_files_and_trackers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noting = Noting()
    records = RunRecords(tmp_path, Trackers([noting]))
    start_records(records, {"ppo": {"seed": 1}}, 0)
    record_iteration(records, {"iteration": 1, **METRICS}, results(), CONFIG, None)
    sample = {
        "iteration": 1, "sample_id": 7, "prompt": [0, 1], "response": [2], "score": 1.0, "kl": 1.0,
    }  # fmt: skip
    assert noting.heard == [
        ("start", 0, False),
        ("scalars", 1, METRICS),
        ("samples", 1, "samples", [sample]),
        ("histograms", 1, [f"distribution/{name}" for name in ("kl", "length", "ratio", "scores")]),
    ]
    assert json.loads((tmp_path / "samples.jsonl").read_text()) == sample
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["configuration"] == {"ppo": {"seed": 1}}
    assert set(config) == {"created", "versions", "git", "machine", "configuration"}
    assert capsys.readouterr().err.startswith("INFO iteration 1/5  score +0.5000")


def test_no_log_line_where_the_console_shows_the_iteration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = RunRecords(tmp_path, Trackers([Noting(shows_metrics=True)]))
    record_iteration(records, {"iteration": 1, **METRICS}, results(), CONFIG, None)
    assert capsys.readouterr().err == ""


def test_trackers_of_a_resumed_run_begin_behind_what_stays(tmp_path: Path) -> None:
    RunRecords(tmp_path).add_metrics({"iteration": 1, **METRICS})
    noting = Noting()
    resumed = RunRecords(tmp_path, Trackers([noting]))
    resumed.rewind(1)
    start_records(resumed, {}, 1)
    # A run that was killed before its first checkpoint begins anew; old events of trackers are void.
    resumed.rewind(-1)
    start_records(resumed, {}, 0)
    assert noting.heard == [("start", 2, True), ("start", 0, False)]


def test_histograms() -> None:
    found = histograms(results())
    for name, total in {"scores": 5, "kl": 1 + (0 - 1 + 3), "length": 4}.items():
        part = found[f"distribution/{name}"]
        assert part.counts.sum() == 2
        assert part.sum == pytest.approx(total)


def test_ratios_are_counted_in_their_bins() -> None:
    found = ratio_histogram(results().update)
    assert found.edges.tolist() == [0, *RATIO_EDGES, 4]
    counts = dict(zip(found.edges[1:].tolist(), found.counts.tolist(), strict=True))
    # Of 3 tokens one is in 0.5 .. 0.7, one in 1.4 .. 2, one above 2; the other one in 0.99 .. 1.01.
    assert {edge: count for edge, count in counts.items() if count} == {0.7: 1, 1.01: 1, 2: 1, 4: 1}
    assert (found.sum, found.sum_squares) == (4.5, 6.25)
    nothing = results().update._replace(tokens=np.zeros(0), policy=np.zeros((0, len(POLICY_STATISTICS))))
    assert ratio_histogram(nothing).counts.sum() == 0, "an update that was skipped"


def test_histogram_of_nothing_finite() -> None:
    assert Histogram.of(np.full(3, np.nan)).counts.sum() == 0


def test_curves_are_drawn_while_it_runs_for_a_small_share_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(records_module.time, "monotonic", lambda: now[0])
    drawn: list[float] = []

    def plot(self: RunRecords) -> None:
        drawn.append(now[0])
        now[0] += 2.0

    monkeypatch.setattr(RunRecords, "plot", plot)
    records = RunRecords(tmp_path)
    while now[0] < 400:
        now[0] += 10
        records.redraw()
    # After 30 s; then, since a picture takes 2 s, every 100 s.
    assert drawn == [30, 132, 234, 336]
    assert RedrawTimer.share == 0.02


def test_curves_that_cannot_be_drawn_are_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(RedrawTimer, "least_seconds", 0.0)

    def plot(self: RunRecords) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunRecords, "plot", plot)
    RunRecords(tmp_path).redraw()
    assert "WARNING curves.png could not be drawn: OSError" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a", "smollm2-seed_1", "0.5B+lr=1e-5", "运行"])
def test_run_names(name: str) -> None:
    assert run_directory(name) == Path("runs") / name


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/tmp/x", "-x", ".hidden", "a b", "x\n", "a" * 101])
def test_what_is_no_run_name(name: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no name of a run"):
        run_directory(name)


PPO_FLAGS = [
    *("--sft_path_infer", "a", "--sft_path_train", "b", "--reward_path", "c", "--critic_path", "d"),
]
SFT_FLAGS = ["--sft_path", "a", "--load_sft_checkpoint", "b", "--mind_dataset_dir", "c"]


def test_run_name_is_another_spelling_of_the_directory_of_results(capsys: pytest.CaptureFixture[str]) -> None:
    for parser, flags in ((ppo_parser(), PPO_FLAGS), (sft_parser(), SFT_FLAGS)):
        assert parser.parse_args([*flags, "--run_name", "x"]).save_ckpt_dir == Path("runs/x")
        assert parser.parse_args([*flags, "--save_ckpt_dir", "y"]).save_ckpt_dir == Path("y")
        assert "run_name" not in parser.parse_args([*flags, "--run_name", "x"])
        with pytest.raises(SystemExit):
            parser.parse_args([*flags, "--run_name", "x", "--save_ckpt_dir", "y"])
        assert "not allowed with argument" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            parser.parse_args([*flags, "--run_name", "../x"])
        assert "is no name of a run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sft_parser().parse_args(SFT_FLAGS)
    assert "one of the arguments --save_ckpt_dir --run_name is required" in capsys.readouterr().err


def test_trackers_flag(capsys: pytest.CaptureFixture[str]) -> None:
    for parser, flags in ((ppo_parser(), PPO_FLAGS), (sft_parser(), [*SFT_FLAGS, "--run_name", "x"])):
        assert parser.parse_args(flags).trackers == ("tensorboard",)
        assert parser.parse_args([*flags, "--trackers", "wandb,swanlab"]).trackers == ("wandb", "swanlab")
        assert parser.parse_args([*flags, "--trackers", "none"]).trackers == ()
        with pytest.raises(SystemExit):
            parser.parse_args([*flags, "--trackers", "mlflow"])
        assert "no tracker 'mlflow'" in capsys.readouterr().err
