"""The recorder: every file that a run leaves for people, rewound as one, and what trackers hear."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindrlhf.configs.keys import PPOConfig
from mindrlhf.trainer import recorder as recorder_module
from mindrlhf.trainer.recipe import EvaluationResult, HeldOut, Schedule, StepResult
from mindrlhf.trainer.recorder import Recorder, RedrawTimer, check_results, write_experience
from mindrlhf.trainer.samples import choose_rows
from mindrlhf.trainer.shown_metrics import ppo_metrics
from mindrlhf.trainer.trackers.tracker import Histogram, RunStart, Tracker, Trackers
from mindrlhf.utils.errors import MindRLHFError
from mindrlhf.utils.provenance import provenance, write_provenance
from tests.probes import read_columns

SHOWN = ppo_metrics(PPOConfig())
EVALUATED = {f"eval/{name}": 0.5 for name in ("scores", "scores_std", "kl", "length", "eos_rate")}
HELD_OUT = HeldOut("x", 8, "prompts")
SCHEDULE = Schedule(total=5)
TIMES = {"time/iteration": 2.0, "tokens_per_second": 9.0}


def recorder(directory: Path, *trackers: Tracker, experience: Path | None = None) -> Recorder:
    made = Recorder(directory, "iteration", Trackers(trackers), experience)
    made._shown = SHOWN
    directory.mkdir(exist_ok=True)  # as begin() does, which not every test calls
    return made


def metrics(iteration: int) -> dict[str, float]:
    names = [curve.metric for curve in SHOWN.curves if not curve.metric.startswith("eval/")]
    return {"iteration": iteration, **{name: np.float32(iteration / 4) for name in names}}


def evaluation(iteration: int) -> dict[str, Any]:
    return {"iteration": iteration, **EVALUATED, "prompts": 8, "held_out_digest": "x", "seconds": 1.5}


def evaluate(records: Recorder, iteration: int, *samples: dict[str, Any]) -> None:
    records.add_evaluation(iteration, EvaluationResult(EVALUATED, samples), HELD_OUT, 1.5)


def test_metrics_and_samples_are_json_lines(tmp_path: Path) -> None:
    records = recorder(tmp_path / "run")
    for iteration in (1, 2):
        records.add_metrics(metrics(iteration))
    records.add_samples(
        [{"iteration": 1, "sample_id": np.int64(7), "response": "你好\n", "score": np.float32(0.5)}]
    )
    records.add_samples([])
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [metrics(1), metrics(2)]
    text = (tmp_path / "run" / "samples.jsonl").read_text(encoding="utf-8")
    assert json.loads(text) == {"iteration": 1, "sample_id": 7, "response": "你好\n", "score": 0.5}
    assert "你好" in text, "people read this file"


def test_curves_are_a_png(tmp_path: Path) -> None:
    records = recorder(tmp_path)
    assert records.plot() is None
    records.add_metrics(metrics(1))
    picture = records.plot()
    assert picture == tmp_path / "curves.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_evaluations_get_curves_of_their_own(tmp_path: Path) -> None:
    records = recorder(tmp_path)
    records.add_metrics(metrics(1))
    evaluate(records, 0)
    evaluate(records, 1)
    picture = records.plot()
    assert picture is not None
    assert int.from_bytes(picture.read_bytes()[20:24], "big") == 12 * 110, "four rows high, not two"


def test_evaluations_are_kept_with_their_samples_and_rewound(tmp_path: Path) -> None:
    records = recorder(tmp_path)
    for iteration in (0, 2, 4):
        evaluate(records, iteration, *({"sample_id": np.int64(row), "response": "\u2028"} for row in (1, 5)))
    # Killed after the first sample of the evaluation after iteration 3.
    with (tmp_path / "eval_samples.jsonl").open("a") as file:
        file.write('{"iteration": 3, "sample_id": 1}\n')

    resumed = recorder(tmp_path)
    resumed.rewind(3)

    assert resumed.evaluations == [evaluation(0), evaluation(2)]
    assert [(line["iteration"], line["sample_id"]) for line in resumed.eval_samples] == [
        (0, 1),
        (0, 5),
        (2, 1),
        (2, 5),
    ]
    for name, lines in (("evaluations", resumed.evaluations), ("eval_samples", resumed.eval_samples)):
        text = (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8")
        assert [json.loads(line) for line in text.split("\n")[:-1]] == lines
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval_samples.jsonl", "evaluations.jsonl"]


def test_a_directory_with_an_evaluation_is_used(tmp_path: Path) -> None:
    evaluate(recorder(tmp_path), 0)
    with pytest.raises(MindRLHFError, match=r"earlier run \(evaluations.jsonl\)"):
        check_results(tmp_path, "iteration", "ppo", continues=False)


def test_a_resumed_run_drops_the_lines_after_its_checkpoint_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = recorder(tmp_path)
    for iteration in (1, 2, 3):
        first.add_metrics(metrics(iteration))
        # U+2028 and U+0085 are line ends to str.splitlines, but not to JSON lines.
        first.add_samples([{"iteration": iteration, "response": f"{iteration}\u2028\u0085"}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "objec')  # killed while writing

    resumed = recorder(tmp_path)
    caplog.set_level("INFO")
    resumed.rewind(2)
    resumed.add_metrics(metrics(3))
    said = [
        f"{tmp_path / name}.jsonl: 1 line(s) after iteration 2 dropped" for name in ("samples", "metrics")
    ]
    assert caplog.messages == said

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [1, 2, 3]
    assert [line["iteration"] for line in resumed.metrics] == [1, 2, 3], "the curves begin at the beginning"
    samples = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    assert [json.loads(line)["response"] for line in samples] == ["1\u2028\u0085", "2\u2028\u0085"]


def test_damaged_lines_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n{"iter\n{"iteration": 2}\n')
    records = recorder(tmp_path)
    records.rewind(2)
    assert records.metrics == [{"iteration": 1}, {"iteration": 2}]
    assert f"{tmp_path / 'metrics.jsonl'}: 1 damaged line(s) are left out from here on" in caplog.text


def test_an_evaluation_without_a_result_is_damaged_and_due_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "evaluations.jsonl").write_text('{"iteration": 2, "held_out_digest": "x"}\n')
    records = recorder(tmp_path)
    records.rewind(2)
    assert records.lacks_evaluation(2, is_time=True)
    assert f"{tmp_path / 'evaluations.jsonl'}: 1 damaged line(s) are left out" in caplog.text


def test_a_used_directory_is_refused(tmp_path: Path) -> None:
    check_results(tmp_path, "iteration", "ppo", continues=False)
    check_results(tmp_path / "not there yet", "iteration", "ppo", continues=False)
    recorder(tmp_path).add_metrics(metrics(1))
    (tmp_path / "copied" / "iteration_000007").mkdir(parents=True)
    for used, name in ((tmp_path, "metrics.jsonl"), (tmp_path / "copied", "iteration_000007")):
        with pytest.raises(MindRLHFError, match=f"earlier run .{name}.*--resume_from"):
            check_results(used, "iteration", "ppo", continues=False)


@pytest.mark.parametrize(
    ("configuration", "fault"),
    [
        ({"ppo": {}}, None),
        ({"stage": "sft"}, r"holds the results of sft \(metrics.jsonl\), which ppo cannot continue"),
        (None, "holds the results of a run without its config.json"),
        ({}, "holds a config.json that is not of a run"),
    ],
)
def test_results_of_another_kind_are_not_continued(
    tmp_path: Path, configuration: dict[str, Any] | None, fault: str | None
) -> None:
    recorder(tmp_path).add_metrics(metrics(1))
    if configuration:
        write_provenance(tmp_path, provenance(configuration))
    elif configuration is not None:
        (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(MindRLHFError, match=fault) if fault else contextlib.nullcontext():
        check_results(tmp_path, "iteration", "ppo", continues=True)


def step_result(**changes: Any) -> StepResult:
    given: dict[str, Any] = {
        "metrics": {"objective/scores": 0.5, "policy/ratio": 1.0},
        "tokens": 18,
        "samples": [{"sample_id": np.int64(7), "response": [2], "score": 1.0}],
        "histograms": {"distribution/scores": Histogram.of(np.array([1.0, 2.0]))},
    }
    return StepResult(**given | changes)


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


def test_a_step_goes_to_files_and_trackers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noting = Noting()
    records = recorder(tmp_path, noting)
    records.begin({"ppo": {"seed": 1}}, 0, SHOWN)  # the content of config.json, whatever that is
    records.add_step(1, step_result(), TIMES, SCHEDULE)
    sample = {"iteration": 1, "sample_id": 7, "response": [2], "score": 1.0}
    assert noting.heard == [
        ("start", 0, False),
        ("scalars", 1, {"objective/scores": 0.5, "policy/ratio": 1.0, **TIMES}),
        ("samples", 1, "samples", [sample]),
        ("histograms", 1, ["distribution/scores"]),
    ]
    assert json.loads((tmp_path / "samples.jsonl").read_text()) == sample
    assert json.loads((tmp_path / "config.json").read_text()) == {"ppo": {"seed": 1}}
    said = capsys.readouterr().err
    assert said == "INFO iteration 1/5  score +0.5000  ratio 1.0000  9 tok/s  2.0 s\n"


def test_not_every_step_of_many_is_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in range(1, 8):
        recorder(tmp_path).add_step(step, step_result(), TIMES, Schedule(total=7, log_interval=3))
    logged = [line.split("/")[0] for line in capsys.readouterr().err.splitlines()]
    assert logged == ["INFO iteration 3", "INFO iteration 6", "INFO iteration 7"]


def test_no_log_line_where_the_console_shows_the_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder(tmp_path, Noting(shows_metrics=True)).add_step(1, step_result(), TIMES, SCHEDULE)
    assert capsys.readouterr().err == ""


def test_trackers_of_a_resumed_run_begin_behind_what_stays(tmp_path: Path) -> None:
    recorder(tmp_path).add_metrics(metrics(1))
    noting = Noting()
    resumed = recorder(tmp_path, noting)
    resumed.rewind(1)
    resumed.begin({}, 1, SHOWN)
    # A run that was killed before its first checkpoint begins anew; old events of trackers are void.
    resumed.rewind(-1)
    resumed.begin({}, 0, SHOWN)
    assert noting.heard == [("start", 2, True), ("start", 0, False)]


def test_skipped_updates_are_rewound_with_everything_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    skipped = {"minibatch": 2, "model": "policy", "cause": "loss not finite", "sample_ids": [40, 41]}
    first = recorder(tmp_path)
    for step in (1, 2, 3):
        first.add_step(step, step_result(skipped=[skipped]), TIMES, SCHEDULE)
    said = "WARNING update skipped: iteration 3, minibatch 2, policy: loss not finite; samples 40, 41"
    assert said in capsys.readouterr().err
    resumed = recorder(tmp_path)
    resumed.rewind(1)
    resumed.add_step(2, step_result(skipped=[skipped]), TIMES, SCHEDULE)
    for name in ("skipped_updates", "metrics", "samples"):
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line)["iteration"] for line in lines] == [1, 2], name


def test_when_an_evaluation_is_due(tmp_path: Path) -> None:
    records = recorder(tmp_path)
    assert records.lacks_evaluation(3, is_time=False), "the first of all"
    evaluate(records, 3)
    assert not records.lacks_evaluation(3, is_time=True), "it is recorded already"
    assert not records.lacks_evaluation(4, is_time=False)
    assert records.lacks_evaluation(4, is_time=True)
    assert records.has_other_evaluations(HELD_OUT._replace(digest="y"), 3)
    assert not records.has_other_evaluations(HELD_OUT._replace(digest="y"), 2), "it will be dropped"
    assert not records.has_other_evaluations(HELD_OUT, 3)


def test_curves_without_values_are_left_out(tmp_path: Path) -> None:
    records = recorder(tmp_path)
    records.add_metrics({"iteration": 1, "objective/scores": 1.0, "loss/policy": 2.0})
    picture = records.plot()
    assert picture is not None
    assert int.from_bytes(picture.read_bytes()[20:24], "big") == 3 * 110, "one row of curves"


def test_curves_are_drawn_while_it_runs_for_a_small_share_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(recorder_module.time, "monotonic", lambda: now[0])
    drawn: list[float] = []

    def plot(self: Recorder) -> None:
        drawn.append(now[0])
        now[0] += 2.0

    monkeypatch.setattr(Recorder, "plot", plot)
    records = recorder(tmp_path)
    while now[0] < 400:
        now[0] += 10
        records._redraw()
    # After 30 s; then, since a picture takes 2 s, every 100 s.
    assert drawn == [30, 132, 234, 336]
    assert RedrawTimer.share == 0.02


def test_curves_that_cannot_be_drawn_are_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(RedrawTimer, "least_seconds", 0.0)

    def plot(self: Recorder) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Recorder, "plot", plot)
    recorder(tmp_path)._redraw()
    assert "WARNING curves.png could not be drawn: OSError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("count", "wanted", "rows"), [(8, 2, [0, 7]), (8, 3, [0, 4, 7]), (2, 5, [0, 1]), (4, 1, [0]), (4, 0, [])]
)
def test_sample_rows_are_spread_evenly(count: int, wanted: int, rows: list[int]) -> None:
    assert choose_rows(count, wanted) == rows


def test_experience_comes_back_from_its_mindrecord(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    columns = {
        "tokens": rng.integers(0, 50, (3, 6)).astype(np.int32),
        "sample_id": np.array([[11], [5], [2**40]]),
        "advantages": rng.standard_normal((3, 2)).astype(np.float32),
    }
    records = recorder(tmp_path, experience=tmp_path / "data.mindrecord")
    for _ in range(2):  # a run that is repeated replaces its own file
        records.add_step(3, step_result(experience=columns), TIMES, SCHEDULE)
    found = read_columns(tmp_path / "data_iteration_000003.mindrecord", list(columns))
    for name, array in columns.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
        assert found[name].dtype == array.dtype
    assert write_experience(tmp_path / "bare", "step", 1, columns).name == "bare_step_000001.mindrecord"


def test_a_summary_that_cannot_be_written_does_not_cost_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recorder_module, "draw_curves", full)
    records = recorder(tmp_path)
    records.add_metrics(metrics(1))
    records.finish()
    assert "WARNING the last summary could not be written: OSError" in capsys.readouterr().err
