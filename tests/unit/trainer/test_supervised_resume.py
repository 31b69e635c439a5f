"""SFT and reward modelling cut short, stopped and resumed, against runs that were let be; skipped steps."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mindrlhf.checkpoint.hf_config import model_config_from_hf, read_hf_config
from mindrlhf.checkpoint.shards import load_shard
from mindrlhf.configs.load import load_run_config
from mindrlhf.models.qwen2.layouts import parameter_layouts
from mindrlhf.parallel.layout import Mesh
from mindrlhf.trainer.recipes.supervised import SupervisedTrainer
from mindrlhf.trainer.train_step import MicroBatch
from mindrlhf.utils.errors import CheckpointError, MindRLHFError
from mindrlhf.utils.files import job_lock
from mindrlhf.utils.result_files import SKIPPED_FILE
from mindrlhf.utils.seeds import random_stream
from tests.unit.trainer.stage_runs import (
    PAD,
    STEPS,
    VOCAB,
    Compiled,
    Run,
    evaluations,
    lines,
    make_run,
    write_files,
)


class Killed(BaseException):
    """Ends a run as a kill does: nobody catches it."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> Path:
    return write_files(tmp_path_factory.mktemp("stage_files"), repo_root)


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return Compiled()


@pytest.fixture
def run(files: Path, compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> Run:
    return make_run(files, compiled, monkeypatch)


def final_weights(save: Path, stage: str) -> dict[str, np.ndarray]:
    """Read with the sizes and heads that the directory itself states."""
    config = read_hf_config(save / "final")
    reward = {"reward": "Qwen2ForSequenceClassification"}
    assert config["architectures"] == [reward.get(stage, "Qwen2ForCausalLM")]
    heads = {"lm_head": False, "score_head": True} if stage == "reward" else {}
    return load_shard(
        save / "final", parameter_layouts(model_config_from_hf(config, "x"), Mesh(), **heads), 0
    )


def in_step(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], Any]) -> None:
    """Does something at the beginning of an optimizer step, counted from 1."""
    step = SupervisedTrainer.step

    def acting(self: SupervisedTrainer, done: int) -> Any:
        if done + 1 == number:
            act()
        return step(self, done)

    monkeypatch.setattr(SupervisedTrainer, "step", acting)


def kill() -> None:
    raise Killed


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_killed_and_resumed_equals_straight_to_the_last_digit(
    run: Run, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Killed in step 8, checkpoints after 3 and 6: steps 7 and 8 come again, the evaluation after 5 not."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    run(stage, straight)
    with monkeypatch.context() as patch:
        in_step(patch, 8, kill)
        with pytest.raises(Killed):
            run(stage, broken, save_interval=3, resume_training=True)
    assert [line["step"] for line in lines(broken)] == list(range(1, 8))
    (broken / ".step_000009.tmp").mkdir()  # the kill may have come while it saved
    run(stage, broken, save_interval=3, resume_training=True)
    expected = lines(straight)
    assert [line["step"] for line in expected] == list(range(1, STEPS + 1))
    assert lines(broken) == expected
    assert [line["step"] for line in evaluations(straight)] == [0, 5, 10, 12]
    assert evaluations(broken) == evaluations(straight)
    weights = final_weights(straight, stage)
    for name, array in final_weights(broken, stage).items():
        np.testing.assert_array_equal(array, weights[name], err_msg=name)
    if stage == "reward":
        reports = [json.loads((save / "reward_model.json").read_text()) for save in (straight, broken)]
        assert reports[0] == reports[1]
        assert reports[0]["before"]["step"] == 0
    assert {path.name for path in broken.iterdir()} == {
        *("step_000009", "step_000012", "final", "config.json", "metrics.jsonl", "curves.png"),
        "evaluations.jsonl",
        *(["reward_model.json"] if stage == "reward" else []),
    }


def test_sigterm_saves_at_the_next_step_and_returns(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, straight = tmp_path / "save", tmp_path / "straight"
    with monkeypatch.context() as patch:
        in_step(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run("sft", save) == save
    assert not (save / "final").exists()
    (checkpoint,) = save.glob("step_*")
    number = int(checkpoint.name[-6:])
    assert number in (4, 5), "the thread that hears of the signal may be a step late"
    assert lines(save)[-1]["step"] == number
    assert run("sft", save, resume_training=True) == save / "final"
    run("sft", straight)
    assert lines(save) == lines(straight)


def test_sigint_saves_and_interrupts(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        time.sleep(0.5)  # MindSpore takes SIGINT while it compiles; the thread has taken it back by then
        os.kill(os.getpid(), signal.SIGINT)

    in_step(monkeypatch, 2, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run("sft", tmp_path / "save")
    assert len(list((tmp_path / "save").glob("step_00000[23]"))) == 1


def test_from_a_named_checkpoint_into_another_directory(
    run: Run, files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What has changed is said; more epochs are trained on top; newer checkpoints are set aside."""
    first, second = tmp_path / "first", tmp_path / "second"
    run("sft", first, save_interval=6, keep_checkpoints=0)
    caplog.set_level("INFO")
    run("sft", second, resume_from=first / "step_000006", keep_checkpoints=1)
    (said,) = [line for line in caplog.messages if "configuration has changed" in line]
    assert said.endswith(
        "options.keep_checkpoints: 0 in the checkpoint, 1 now; "
        "options.save_interval: 6 in the checkpoint, 0 now"
    )
    assert [line["step"] for line in lines(second)] == list(range(7, 13))
    assert lines(second) == lines(first)[6:]
    assert [line["step"] for line in evaluations(second)] == [6, 10, 12], "its first evaluation is its start"
    assert {path.name for path in (first / "step_000006").iterdir()} == {
        *("policy", "policy_optimizer", "random", "state.json", "config.json", "manifest.json")
    }
    state = json.loads((first / "step_000006" / "state.json").read_text())
    rows = {"epoch": 1, "cursor": 8, "rows": 16, "seed": 1, "shuffle": True}
    assert (state["step"], state["parts"]) == (6, {"rows": rows})
    run("sft", first, epochs=4, resume_training=True, save_interval=6, keep_checkpoints=0)
    assert [line["step"] for line in lines(first)] == list(range(1, 17))
    assert not list(first.glob("left_*"))
    # From an older one: the newer ones are set aside, their lines go.
    run("sft", first, resume_from=first / "step_000006", save_interval=0)
    assert sorted(path.name for path in first.glob("left_*")) == ["left_step_000012", "left_step_000016"]
    assert lines(first)[-1]["step"] == 12


def test_a_finished_run_without_checkpoints_is_not_trained_anew(run: Run, tmp_path: Path) -> None:
    run("sft", tmp_path, epochs=1)
    for name in ("step_notes.txt", "step_12"):  # no checkpoints
        (tmp_path / name).mkdir()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(MindRLHFError, match=r"has finished \(final\) and no checkpoint"):
        run("sft", tmp_path, epochs=1, resume_training=True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.fixture(scope="module")
def checkpoint(files: Path, compiled: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """After 4 of 4 steps, of SFT."""
    directory = tmp_path_factory.mktemp("stage_checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        make_run(files, compiled, patch)("sft", directory, epochs=1, save_interval=4)
    return directory / "step_000004"


def test_other_weights_are_said_and_stay_in_the_record(
    run: Run, files: Path, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / "other.ckpt"
    weights = bytearray((files / "weights.ckpt").read_bytes())
    weights[-1] ^= 1
    other.write_bytes(weights)
    save = tmp_path / "save"
    run("sft", save, epochs=1, save_interval=4, resume_from=checkpoint, load_sft_checkpoint=other)
    (said,) = [line for line in caplog.messages if "what the run learns from has changed" in line]
    change = said.partition("checkpoint: ")[2]
    assert change.startswith("inputs.load_sft_checkpoint.digest: ")
    for place in (save, save / "step_000004"):
        (resumption,) = json.loads((place / "config.json").read_text())["resumptions"]
        assert (resumption["from"], resumption["changes"][-1]) == (str(checkpoint), change)


REFUSED = [
    ({"seed": 7}, "seed: 1 in the checkpoint, 7 now"),
    ({"batch_size": 8}, "batch_size: 4 in the checkpoint, 8 now"),
    ({"eval_fraction": 0.5}, "rows.train: 16 in the checkpoint, 10 now"),
]


@pytest.mark.parametrize(("changes", "says"), REFUSED)
def test_another_order_of_the_data_is_refused(
    run: Run, checkpoint: Path, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(CheckpointError, match="cannot be resumed by this job") as caught:
        run("sft", tmp_path, resume_from=checkpoint, **changes)
    assert f"\n  - {says}" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_another_model_or_stage_is_refused(run: Run, files: Path, checkpoint: Path, tmp_path: Path) -> None:
    content = yaml.safe_load((files / "finetune.yaml").read_text(encoding="utf-8"))
    content["model"]["model_config"]["theta"] = 5e5
    content["model"]["model_config"]["rms_norm_eps"] = 1e-4
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(CheckpointError, match="2 difference") as caught:
        run("sft", tmp_path / "save", resume_from=checkpoint, config_path=tmp_path / "other.yaml")
    assert "model.theta: 1000000.0 in the checkpoint, 500000.0 now" in str(caught.value)
    assert "model.rms_norm_eps: 1e-06 in the checkpoint, 0.0001 now" in str(caught.value)
    with pytest.raises(CheckpointError, match="recipe: sft in the checkpoint, reward now"):
        run("reward", tmp_path / "save", resume_from=checkpoint)


@pytest.mark.parametrize("name", ["metrics.jsonl", "final"])
def test_results_of_an_earlier_run_are_left_alone(run: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(MindRLHFError, match=f"holds the results of an earlier run .{name}"):
        run("sft", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("resumes", [False, True])
def test_a_directory_in_use_is_refused_before_anything_is_touched(
    run: Run, tmp_path: Path, resumes: bool
) -> None:
    (tmp_path / ".step_000001.tmp").mkdir()  # the living job is writing it
    with job_lock(tmp_path) as ends:
        held = sorted(path.name for path in tmp_path.iterdir())
        for told in ("", ", which has received SIGTERM and is ending"):
            with pytest.raises(
                MindRLHFError, match=rf"is in use by process {os.getpid()} on .*:\d\d{told}; wait"
            ):
                run("sft", tmp_path, resume_training=resumes)
            ends("SIGTERM")
        assert sorted(path.name for path in tmp_path.iterdir()) == held == [".lock", ".step_000001.tmp"]
    assert run("sft", tmp_path, epochs=1, resume_training=True) == tmp_path / "final"
    assert not (tmp_path / ".lock").exists()


def spoil(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Makes the loss of the second micro-batch infinite in some steps."""
    step = SupervisedTrainer.step

    def spoilt(self: SupervisedTrainer, done: int) -> Any:
        micro_batch, calls = self.micro_batch, []

        def scaled(part: np.ndarray, inverse_count: np.ndarray) -> MicroBatch:
            calls.append(part)
            return micro_batch(part, inverse_count * np.float32(np.inf if len(calls) == 2 else 1))

        if done + 1 in steps:
            self.micro_batch = scaled  # type: ignore[method-assign]
        try:
            return step(self, done)
        finally:
            self.micro_batch = micro_batch  # type: ignore[method-assign]

    monkeypatch.setattr(SupervisedTrainer, "step", spoilt)


def test_a_step_that_is_not_finite_is_skipped_and_its_samples_are_named(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, straight = tmp_path / "save", tmp_path / "straight"
    run("sft", straight, epochs=1)
    spoil(monkeypatch, {3})
    run("sft", save, epochs=1)
    metrics = lines(save)
    assert [line["update/skipped"] for line in metrics] == [0, 0, 1, 0]
    assert metrics[:2] == lines(straight)[:2]
    assert metrics[2]["lr"] == 0
    assert "grad_norm" not in metrics[2]
    (skipped,) = [json.loads(line) for line in (save / SKIPPED_FILE).read_text().splitlines()]
    train_rows = np.unique([row for batch in batches_of(save) for row in batch])
    batch = random_stream("stage", 1, 0).permutation(train_rows)[8:12]
    assert skipped == {
        "step": 3, "minibatch": 1, "model": "policy", "cause": "loss not finite (gradient norm nan)",
        "grad_norm": "nan", "sample_ids": batch[2:].tolist(), "whole_minibatch": False,
    }  # fmt: skip


def batches_of(save: Path) -> list[list[int]]:
    """The rows to train on, as the split gives them."""
    from mindrlhf.data.sequences import SequenceData

    options = json.loads((save / "config.json").read_text())["configuration"]["options"]
    data = SequenceData(
        options["mind_dataset_dir"], pad_token_id=PAD, vocab_size=VOCAB, max_length=12, pairs=False
    )
    return [data.split(options["eval_fraction"], options["max_eval_prompts"], options["seed"])[0].tolist()]


def test_too_many_in_a_row_stop_with_the_state_of_before(
    run: Run, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 2, 4 and 5: two in a row are too many; a fresh job of 3 steps has had the same two updates."""
    spoil(monkeypatch, {2, 4, 5})
    with pytest.raises(MindRLHFError, match=r"in step 5: 2 updates in a row were skipped") as caught:
        run("sft", tmp_path, max_skipped_updates=2)
    assert f"saved in {tmp_path / 'step_000005'}" in str(caught.value)
    assert not (tmp_path / "final").exists()
    layouts = parameter_layouts(load_run_config(files / "finetune.yaml").model, Mesh())
    saved = load_shard(tmp_path / "step_000005" / "policy", layouts, 0)
    assert all(np.isfinite(array).all() for array in saved.values())
    assert run("sft", tmp_path, max_skipped_updates=2, resume_training=True) == tmp_path / "final"
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, STEPS + 1))
    skipped = [json.loads(line)["step"] for line in (tmp_path / SKIPPED_FILE).read_text().splitlines()]
    assert skipped == [2, 4, 5], "and those of a run that was resumed stay, once"
