"""The training loop around a recipe without models: what happens when, and what a run does about it."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindrlhf.runtime.device import Runtime
from mindrlhf.runtime.host_exchange import HostExchange
from mindrlhf.trainer import run as run_module
from mindrlhf.trainer.checkpoints import Trained, TrainingCheckpoints
from mindrlhf.trainer.loop import train
from mindrlhf.trainer.recipe import EvaluationResult, HeldOut, Schedule, StepResult
from mindrlhf.trainer.resume import choose_checkpoint
from mindrlhf.trainer.run import Run, observed
from mindrlhf.trainer.shown_metrics import ShownMetrics
from mindrlhf.trainer.trackers.tracker import Tracker
from mindrlhf.utils.errors import CheckpointError, MindRLHFError, RewardError
from mindrlhf.utils.files import check_unlocked, job_lock


class Counter:
    """The state of a recipe."""

    def __init__(self) -> None:
        self.value = 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value = state["value"]


@dataclass
class Counting:
    """A recipe that counts; each step adds its number to a sum, and notes what it is asked for."""

    run: Run
    schedule: Schedule
    held_out: HeldOut | None = None
    shown: ShownMetrics = field(default_factory=ShownMetrics)
    trained: list[Trained] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    stop_in: int = -1
    fail_in: int = -1
    no_reward: str = ""
    """``step N`` or ``evaluation N``, steps done before it: its reward function fails."""

    def __post_init__(self) -> None:
        self.sum = Counter()
        self.stateful = {"sum": self.sum}

    def begin(self) -> None:
        self.asked.append("begin")

    def step(self, step: int) -> StepResult:
        self.asked.append(f"step {step}")
        with self.run.timer.phase("work"):
            self.sum.value += step
            if self.no_reward == f"step {step}":
                raise RewardError("no score")
        if step == self.stop_in:
            self.run.stop.receive(signal.SIGTERM)
        failure = "it cannot go on" if step == self.fail_in else ""
        skipped = [{"minibatch": 0, "model": "both", "cause": "x", "sample_ids": [1]}] if failure else []
        return StepResult({"sum": self.sum.value}, tokens=10, skipped=skipped, failure=failure)

    def evaluate(self) -> EvaluationResult:
        self.asked.append("evaluate")
        if self.no_reward == f"evaluation {self.run.step}":
            raise RewardError("no score")
        return EvaluationResult({"eval/sum": self.sum.value})


RECIPE = ("held_out", "stop_in", "fail_in", "no_reward")
HELD_OUT = HeldOut("digest", 3, "rows")


def checkpoints(directory: Path, fixed: Mapping[str, Any] | None = None) -> TrainingCheckpoints:
    exchange = HostExchange(Runtime(0, 1))
    return TrainingCheckpoints(
        directory, "step", exchange, keep=0, configuration={"stage": "x"}, fixed=fixed or {"seed": 1}
    )


def counting(directory: Path, total: int = 5, **options: Any) -> Counting:
    recipe = {name: options.pop(name) for name in RECIPE if name in options}
    saved = checkpoints(directory)
    named = options.pop("resume_from", None)
    resume = choose_checkpoint(saved, named and directory / named, resume_training=named is None)
    run = Run(saved, resume=resume, rewinds=True)
    return Counting(run, Schedule(total=total, **options), **recipe)


def lines(directory: Path, name: str) -> list[dict[str, Any]]:
    path = directory / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_order_of_a_whole_run(tmp_path: Path) -> None:
    recipe = counting(tmp_path, eval_interval=2, save_interval=3, held_out=HELD_OUT)
    assert train(recipe.run, recipe)
    assert recipe.asked == [
        *("begin", "evaluate", "step 0", "step 1", "evaluate", "step 2", "step 3", "evaluate", "step 4"),
        "evaluate",
    ]
    metrics = lines(tmp_path, "metrics")
    assert [(line["step"], line["sum"]) for line in metrics] == [(1, 0), (2, 1), (3, 3), (4, 6), (5, 10)]
    assert {"time/work", "time/step", "tokens_per_second"} < metrics[0].keys()
    evaluations = lines(tmp_path, "evaluations")
    assert [(line["step"], line["eval/sum"], line["rows"]) for line in evaluations] == [
        *((0, 0, 3), (2, 1, 3), (4, 6, 3), (5, 10, 3)),
    ]
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_000003", "step_000005"]
    assert recipe.run.last_checkpoint == tmp_path / "step_000005"


def test_without_held_out_data_and_without_a_last_checkpoint(tmp_path: Path) -> None:
    recipe = counting(tmp_path, total=2, eval_interval=1, save_at_end=False)
    assert train(recipe.run, recipe)
    assert recipe.asked == ["begin", "step 0", "step 1"]
    assert recipe.run.last_checkpoint is None
    assert not list(tmp_path.glob("step_*"))


def test_a_stopped_run_is_saved_and_continues_as_if_nothing_had_been(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    whole = counting(straight, eval_interval=2, held_out=HELD_OUT)
    train(whole.run, whole)
    first = counting(broken, eval_interval=2, held_out=HELD_OUT, stop_in=2)
    assert not train(first.run, first)
    assert first.asked[-1] == "step 2", "a stop comes before an evaluation"
    assert first.run.last_checkpoint == broken / "step_000003"
    second = counting(broken, eval_interval=2, held_out=HELD_OUT)
    assert train(second.run, second)
    assert second.asked == ["begin", "step 3", "evaluate", "step 4", "evaluate"]
    for name in ("metrics", "evaluations"):
        one, other = (
            [{key: line[key] for key in line if "sum" in key or key == "step"} for line in lines(place, name)]
            for place in (straight, broken)
        )
        assert one == other
    third = counting(broken, total=4, eval_interval=2, held_out=HELD_OUT)
    before = {path: path.read_bytes() for path in broken.glob("*.jsonl")}
    assert train(third.run, third)
    assert before == {path: path.read_bytes() for path in before}, "later results stay"
    assert third.asked == ["begin"]
    assert "WARNING 5 steps are done, --epochs asks for 4: nothing is left to do" in capsys.readouterr().err


def test_results_without_a_checkpoint_are_set_aside_and_never_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = counting(tmp_path, total=3, save_at_end=False)
    train(first.run, first)
    second = counting(tmp_path, total=2)
    train(second.run, second)
    assert [line["step"] for line in lines(tmp_path, "metrics")] == [1, 2]
    assert [line["step"] for line in lines(tmp_path, "left_metrics")] == [1, 2, 3]
    assert "metrics.jsonl has no checkpoint to it: it is now left_metrics.jsonl" in caplog.text


def test_the_directory_is_locked_until_the_trackers_have_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Flushing(Tracker):
        def close(self) -> None:
            with pytest.raises(MindRLHFError, match="in use"):
                check_unlocked(tmp_path)

    monkeypatch.setattr(run_module, "make_trackers", lambda names: [Flushing()])
    with observed("test", "step", 0, ()) as observers:
        observers.resources.enter_context(job_lock(tmp_path))
        assert len(observers.trackers.names) == 2
    check_unlocked(tmp_path)


def test_a_failure_is_recorded_and_saved_before_it_ends_the_run(tmp_path: Path) -> None:
    recipe = counting(tmp_path, fail_in=1)
    with pytest.raises(MindRLHFError, match=r"training fails in step 2: it cannot go on\. .*step_000002"):
        train(recipe.run, recipe)
    assert [line["step"] for line in lines(tmp_path, "metrics")] == [1, 2]
    assert [line["step"] for line in lines(tmp_path, "skipped_updates")] == [2]
    again = counting(tmp_path, total=3)
    assert train(again.run, again)
    assert again.asked == ["begin", "step 2"]
    assert [line["step"] for line in lines(tmp_path, "skipped_updates")] == [2]


def test_a_failure_in_the_last_step_says_that_resuming_alone_trains_nothing(tmp_path: Path) -> None:
    recipe = counting(tmp_path, total=2, fail_in=1)
    with pytest.raises(MindRLHFError, match="It was the last step: to train on, raise their number"):
        train(recipe.run, recipe)


def test_rewards_that_fail_cost_no_whole_step(tmp_path: Path) -> None:
    recipe = counting(tmp_path, no_reward="step 2")
    with pytest.raises(
        RewardError, match=r"no score\. The state after step 2 is saved in .*step_000002: fix"
    ):
        train(recipe.run, recipe)
    again = counting(tmp_path, held_out=HELD_OUT, eval_interval=3, no_reward="evaluation 3")
    with pytest.raises(RewardError, match="after step 3"):  # in the evaluation
        train(again.run, again)
    last = counting(tmp_path)
    assert train(last.run, last)
    assert [line["sum"] for line in lines(tmp_path, "metrics")] == [0, 1, 3, 6, 10]
    at_once = counting(tmp_path / "new", no_reward="step 0")
    with pytest.raises(RewardError, match=r"^no score$"):
        train(at_once.run, at_once)
    assert not list((tmp_path / "new").glob("step_*"))


def test_evaluations_of_other_data_are_not_mixed(tmp_path: Path) -> None:
    recipe = counting(tmp_path, total=1, held_out=HELD_OUT)
    train(recipe.run, recipe)
    (tmp_path / "step_000002").mkdir()  # not whole, and newer: a refused run must leave even that alone
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "sum": 1}\n')
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    other = counting(tmp_path, total=2, held_out=HELD_OUT._replace(digest="other"), resume_from="step_000001")
    with pytest.raises(MindRLHFError, match="are of other held-out data"):
        train(other.run, other)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_run_that_has_saved_its_state_saves_it_at_the_end_too(tmp_path: Path) -> None:
    """Or resuming a finished run would start from the older state and repeat what is done."""
    first = counting(tmp_path, total=3, save_at_end=False, stop_in=0)
    assert not train(first.run, first)
    second = counting(tmp_path, total=3, save_at_end=False)
    assert train(second.run, second)
    third = counting(tmp_path, total=3, save_at_end=False)
    assert train(third.run, third)
    assert third.asked == ["begin"]


def test_results_that_cannot_be_written_end_the_run_with_one_line(tmp_path: Path) -> None:
    recipe = counting(tmp_path, total=3, save_interval=1)
    full = tmp_path / "metrics.jsonl"
    full.symlink_to("/dev/full")
    with pytest.raises(MindRLHFError, match=rf"cannot write {full}: No space left on device; .*resume"):
        train(recipe.run, recipe)


def test_other_ranks_do_what_the_main_rank_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 has no records: whether an evaluation is due, it hears from rank 0."""
    exchange = HostExchange(Runtime(1, 2))
    answers = {"due": np.array([[1], [0]], np.int32), "not due": np.zeros((2, 1), np.int32)}
    saved = checkpoints(tmp_path)
    saved.exchange = exchange
    run = Run(saved)
    assert run.recorder is None
    recipe = Counting(run, Schedule(total=3), held_out=HELD_OUT)
    for answer, expected in (("due", True), ("not due", False)):
        monkeypatch.setattr(exchange, "every_rank", lambda array, answer=answer: answers[answer])
        assert run.evaluation_due(recipe) is expected


def test_a_checkpoint_of_another_job_is_refused(tmp_path: Path) -> None:
    recipe = counting(tmp_path, total=1)
    train(recipe.run, recipe)
    with pytest.raises(CheckpointError, match="seed: 1 in the checkpoint, 2 now"):
        choose_checkpoint(checkpoints(tmp_path, {"seed": 2}), None, resume_training=True)
