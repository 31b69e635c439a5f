"""Reading a run: tolerant of absent files, strict about broken lines, which are named."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindrlhf.report.diagnostics import diagnose
from mindrlhf.report.run_data import ReportError, read_run, read_runs, short_names
from tests.unit.report.conftest import plain_line, reward_lines, stage_config, stage_lines

MakeRun = Callable[..., Path]
LINE = '{"iteration": 1, "objective/scores": 0.5}'


def test_metrics_alone_are_enough(make_run: MakeRun) -> None:
    run = read_run(
        make_run("only", metrics=[{"iteration": 1, "a/b": 2.0}, {"iteration": 3, "a/b": 4, "c": None}])
    )
    assert (run.name, run.samples, run.evaluations, run.eval_samples) == ("only", [], [], [])
    assert (run.config, run.state, run.checkpoint) == ({}, {}, None)
    assert run.iterations.tolist() == [1, 3]
    assert run.series("a/b").values.tolist() == [2.0, 4.0]
    assert run.series("c").values.tolist() == []
    assert run.metric_names() == ["iteration", "a/b", "c"]


def test_everything_is_read(whole_run: Path) -> None:
    run = read_run(whole_run)
    assert (len(run.metrics), len(run.samples), len(run.evaluations), len(run.eval_samples)) == (
        60,
        120,
        4,
        24,
    )
    assert run.evaluation_series("eval/scores").iterations.tolist() == [0, 20, 40, 60]
    assert run.checkpoint == "iteration_000060"
    assert run.state["kl_controller"] == {"kl_coef": 0.05}


def test_the_newest_checkpoint_counts(make_run: MakeRun) -> None:
    directory = make_run(state={"iteration": 2})
    older = directory / "iteration_000001"
    older.mkdir()
    (older / "state.json").write_text('{"iteration": 1}')
    (directory / "iteration_000009").mkdir()  # no state.json: not whole
    for name in ("iteration_3", "iteration_000002_backup"):
        (directory / name).mkdir()
        (directory / name / "state.json").write_text('{"iteration": 3}')
    assert read_run(directory).checkpoint == "iteration_000002"


@pytest.mark.parametrize(
    ("config", "value"),
    [
        ({"configuration": {"ppo": {"kl_target": 4.0}}, "kl_target": 1.0}, 4.0),
        ({"ppo": {"kl_target": 5.0}}, 5.0),
        ({"kl_target": 6.0}, 6.0),
        ({"configuration": ["no mapping"]}, None),
        (None, None),
    ],
)
def test_settings_are_found(make_run: MakeRun, config: dict | None, value: float | None) -> None:
    assert read_run(make_run(config=config)).setting("kl_target") == value


def test_nan_is_a_number_of_a_run(make_run: MakeRun) -> None:
    directory = make_run()
    (directory / "metrics.jsonl").write_text('{"iteration": 1, "x": NaN}\n{"iteration": 2, "x": -Infinity}\n')
    values = read_run(directory).series("x").values
    assert math.isnan(values[0])
    assert values[1] == -np.inf


@pytest.mark.parametrize(
    ("file", "broken", "fault"),
    [
        ("metrics.jsonl", '{"iteration": 2', "not JSON"),
        ("metrics.jsonl", "", "not JSON"),
        ("metrics.jsonl", "[1]", "expected a JSON object, found [1]"),
        ("metrics.jsonl", '{"objective/kl": 1}', "no iteration"),
        ("metrics.jsonl", '{"iteration": 1.5}', "iteration is 1.5, not a whole number"),
        ("metrics.jsonl", '{"iteration": true}', "iteration is true, not a whole number"),
        ("metrics.jsonl", '{"iteration": NaN}', "iteration is NaN, not a whole number"),
        ("metrics.jsonl", '{"iteration": 2, "objective/kl": "1"}', 'objective/kl is "1", not a number'),
        ("metrics.jsonl", '{"step": 1.5}', "step is 1.5, not a whole number"),
        ("metrics.jsonl", '{"step": 2}', "step 2 after iteration 1"),
        ("samples.jsonl", '{"iteration": 2, "score": []}', "score is [], not a number"),
        ("samples.jsonl", '{"prompt": "x"}', "no iteration"),
        ("evaluations.jsonl", '{"iteration": 2, "eval/kl": {}}', "eval/kl is {}, not a number"),
        ("eval_samples.jsonl", "nothing", "not JSON"),
        pytest.param("samples.jsonl", "[" * 100_000, "not JSON", id="deep"),
    ],
)
def test_a_broken_line_is_named(make_run: MakeRun, file: str, broken: str, fault: str) -> None:
    directory = make_run()
    (directory / file).write_text(f"{LINE}\n{broken}\n", encoding="utf-8")
    with pytest.raises(ReportError) as caught:
        read_run(directory)
    assert str(caught.value).startswith(f"{directory / file}:2: {fault}")


def test_bytes_that_are_no_text_are_named(make_run: MakeRun) -> None:
    directory = make_run()
    (directory / "samples.jsonl").write_bytes(
        f"{LINE}\n{LINE}\n".encode() + b'{"iteration": 3, "a": "\xff"}\n'
    )
    with pytest.raises(ReportError, match=r"samples\.jsonl:3: not UTF-8"):
        read_run(directory)


def test_the_line_that_is_being_written_is_left_out(
    make_run: MakeRun, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("mindrlhf"), "propagate", True)
    directory = make_run()
    path = directory / "metrics.jsonl"
    path.write_text(f'{LINE}\n{{"iteration": 2, "object')
    assert read_run(directory).iterations.tolist() == [1]
    assert f"{path}:2 is half written" in caplog.text
    path.write_text(f'{LINE}\n{{"iteration": 2}}')  # whole, but for the line end
    assert read_run(directory).iterations.tolist() == [1, 2]
    path.write_text(f'{LINE}\n{{"step": 1}}')  # JSON, and wrong
    with pytest.raises(ReportError, match=r"metrics\.jsonl:2: step 1 after"):
        read_run(directory)


def test_of_two_jobs_the_newest_line_of_each_iteration_counts(make_run: MakeRun) -> None:
    one, other = ([plain_line(n, loss=job) for n in (1, 2, 3, 4)] for job in (1.0, 2.0))
    directory = make_run(
        metrics=[*one[:3], other[1], one[3], other[2]],
        evaluations=[{"iteration": n, "eval/kl": kl} for n, kl in ((4, 1.0), (0, 2.0), (4, 3.0))],
    )
    run = read_run(directory)
    assert (run.mixed_since, run.left_out) == (2, 2)
    assert run.iterations.tolist() == [1, 2, 3, 4]
    assert run.series("loss").values.tolist() == [1.0, 2.0, 2.0, 1.0]
    assert run.evaluation_series("eval/kl").values.tolist() == [2.0, 3.0]
    (finding,) = [finding for finding in diagnose(run) if finding.kind == "mixed"]
    assert finding.text == "Two jobs have written to this directory since iteration 2"
    assert read_run(make_run("alone")).mixed_since is None


def test_line_separators_inside_a_sample_end_no_line(make_run: MakeRun) -> None:
    text = "a\u2028b\x85c\x0bd"
    directory = make_run(samples=[{"iteration": 1, "prompt": text, "response": text}])
    assert read_run(directory).samples[0]["prompt"] == text


def test_evaluations_may_say_more_than_numbers(make_run: MakeRun) -> None:
    lines = [{"iteration": 4, "eval/kl": 1.0, "prompts_digest": "ab"}, {"iteration": 0, "eval/kl": 0.0}]
    assert read_run(make_run(evaluations=lines)).evaluation_series("eval/kl").iterations.tolist() == [0, 4]


@pytest.mark.parametrize("name", ["config.json", "iteration_000002/state.json"])
@pytest.mark.parametrize(("text", "fault"), [("{", "not JSON"), ("[1]", "expected a JSON object")])
def test_a_broken_object_is_named(make_run: MakeRun, name: str, text: str, fault: str) -> None:
    directory = make_run(state={})
    (directory / name).write_text(text)
    with pytest.raises(ReportError) as caught:
        read_run(directory)
    assert str(caught.value).startswith(f"{directory / name}: {fault}")


def test_what_is_no_run_is_refused_with_a_hint(make_run: MakeRun, tmp_path: Path) -> None:
    inside = make_run("job/ppo")
    with pytest.raises(ReportError, match="no such directory"):
        read_run(tmp_path / "absent")
    with pytest.raises(ReportError) as caught:
        read_run(inside.parent)
    assert str(caught.value).endswith(f"Did you mean {inside}?")
    (inside / "metrics.jsonl").write_text("")
    with pytest.raises(ReportError, match="finished no iteration here yet"):
        read_run(inside)
    (inside / "metrics.jsonl").unlink()
    (inside / "config.json").write_text('{"created": "now"}')  # resumed elsewhere, with nothing left to do
    with pytest.raises(ReportError, match=r"here yet; .* or give the directory that it was resumed from"):
        read_run(inside)


def test_a_run_is_given_once(make_run: MakeRun) -> None:
    directory = make_run()
    with pytest.raises(ReportError, match="given twice"):
        read_runs([directory, directory / ".." / directory.name])
    with pytest.raises(ReportError, match="no run directory"):
        read_runs([])


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/r/a"], ["a"]),
        (["/r/a", "/r/b"], ["a", "b"]),
        (["/r/a/ppo", "/r/b/ppo"], ["a/ppo", "b/ppo"]),
        (["/x/a/ppo", "/y/a/ppo", "/y/b"], ["x/a/ppo", "y/a/ppo", "/y/b"]),
    ],
)
def test_names_are_short_and_different(paths: list[str], names: list[str]) -> None:
    assert short_names([Path(path) for path in paths]) == names


def test_lone_surrogates_do_not_end_the_reading(make_run: MakeRun) -> None:
    directory = make_run()
    (directory / "samples.jsonl").write_text('{"iteration": 1, "response": "\\ud800"}\n')
    assert read_run(directory).samples[0]["response"] == json.loads('"\\ud800"')


def test_steps_and_evaluations_are_told_apart(make_run: MakeRun) -> None:
    run = read_run(make_run("sft", metrics=stage_lines([3.0, 2.0, 1.0]), config=stage_config("sft")))
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
        (stage_lines([1.0, 0.9]), stage_config("reward"), "reward"),
        (stage_lines([1.0, 0.9]), {"configuration": [1]}, "sft"),
        ([{"iteration": 1, "step": 4.0}], stage_config("sft"), "ppo"),
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


def test_before_the_first_step_there_is_nothing_to_report(make_run: MakeRun) -> None:
    with pytest.raises(ReportError, match="the run has finished no step here yet"):
        read_run(make_run(metrics=[{"step": 0, "epoch": 0.0, "eval/loss": 3.0}]))


def test_runs_of_one_kind_only(make_run: MakeRun) -> None:
    directories = [make_run("ppo"), make_run("sft", metrics=stage_lines([2.0, 1.0]))]
    with pytest.raises(ReportError, match=r"ppo is a run of PPO, .*sft one of SFT; give runs of one kind"):
        read_runs(directories)
