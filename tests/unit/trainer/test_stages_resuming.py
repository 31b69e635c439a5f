"""Stages before PPO that are cut short, stopped and resumed, against ones that were let be; skipped steps."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
import yaml
from mindspore import Tensor

from mindrlhf.checkpoint.load import load_shard
from mindrlhf.checkpoint.source import ArraySource
from mindrlhf.checkpoint.writing import write_weights
from mindrlhf.configs.load import load_run_config
from mindrlhf.data.mindrecord import write_mindrecord
from mindrlhf.data.schema import prompt_schema
from mindrlhf.parallel.layout import Mesh
from mindrlhf.parallel.parameters import parameter_layouts
from mindrlhf.trainer.optimizer import build_optimizer
from mindrlhf.trainer.runtime import Runtime
from mindrlhf.trainer.skipping import SKIPPED_FILE
from mindrlhf.trainer.stages import reward, runner, sft
from mindrlhf.trainer.stages.batches import RowStream
from mindrlhf.trainer.stages.options import RewardOptions, SFTOptions
from mindrlhf.trainer.stages.runner import StageTrainer
from mindrlhf.trainer.train_step import TrainStep
from mindrlhf.utils.errors import CheckpointError, MindRLHFError
from mindrlhf.utils.seeds import random_stream

VOCAB, PAD, ROWS = 32, 2, 20
MODEL = {
    "hidden_size": 16, "num_layers": 1, "num_heads": 4, "n_kv_heads": 2, "intermediate_size": 16,
    "seq_length": 12, "vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": PAD, "eos_token_id": [3],
}  # fmt: skip
STEPS = 12
"""3 epochs of 16 rows, 4 a step."""
CLOCK = ("time/step", "tokens_per_second")
Run = Callable[..., Path]


class Killed(BaseException):
    """Ends a run as a kill does: nobody catches it."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> Path:
    """YAML, weights and pairs of the smallest job."""
    directory = tmp_path_factory.mktemp("stage_files")
    shipped = repo_root / "model_configs" / "qwen_ppo" / "finetune_qwen2_tiny.yaml"
    content = yaml.safe_load(shipped.read_text(encoding="utf-8"))
    content["model"]["model_config"].update(MODEL)
    content["parallel_config"].update(data_parallel=1, model_parallel=1)
    (directory / "finetune.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    rng = np.random.default_rng(0)
    layouts = parameter_layouts(load_run_config(directory / "finetune.yaml").model, Mesh())
    arrays = {name: rng.normal(0, 0.2, layout.shape).astype("f4") for name, layout in layouts.items()}
    write_weights(directory / "weights.ckpt", ArraySource(arrays))
    schema = prompt_schema(6, 12, pairs=True)
    batch = {
        name: np.full((ROWS, column.length), 0 if "mask" in name else PAD, np.int32)
        for name, column in schema.items()
    }
    for row in range(ROWS):
        prompt = [4 + row, *rng.integers(4, VOCAB, row % 4)]
        n = len(prompt)
        batch["prompt_ids"][row, -n:] = prompt
        for ids, mask in (("pretrain_ids", "loss_mask"), ("rejected_ids", "rejected_mask")):
            length = n + int(rng.integers(2, 5))
            batch[ids][row, :length] = [*prompt, *rng.integers(4, VOCAB, length - n)]
            batch[mask][row, n:length] = 1
    write_mindrecord(directory / "pairs.mindrecord", schema, [batch])
    return directory


class Compiled:
    """Model and optimizer step of each stage, made once: compiling is most of what a tiny run takes.

    A run finds them as in a new process: weights from the file, moments 0. Only the length of the schedule is
    always that of the first run.
    """

    def __init__(self) -> None:
        self.stages: dict[type, Any] = {}
        self.optimizers: dict[int, Any] = {}
        self.steps: dict[int, Any] = {}

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module, make, fill in (
            (sft, sft.SFTStage, sft.fill_model),
            (reward, reward.RewardStage, reward.fill_model),
        ):
            monkeypatch.setattr(module, make.__name__, partial(self.stage, make, fill))
        monkeypatch.setattr(runner, "build_optimizer", self.optimizer)
        monkeypatch.setattr(runner, "TrainStep", self.step)

    def stage(self, make: Any, fill: Any, job: Any, *arguments: float) -> Any:
        stage = self.stages.get(make)
        if stage is None:
            stage = self.stages[make] = make(job, *arguments)
        stage.job, stage.data = job, job.data
        roles = ("reward model", "reward") if make is reward.RewardStage else ("policy",)
        fill(stage.model, job.options.load_sft_checkpoint, job.options.seed, 0, *roles)
        return stage

    def optimizer(self, config: Any, parameters: Any, total_steps: int) -> Any:
        key = id(parameters[0])
        if key not in self.optimizers:
            self.optimizers[key] = build_optimizer(config, parameters, total_steps)
        optimizer = self.optimizers[key]
        for state in (*optimizer.exp_avg, *optimizer.exp_avg_sq, optimizer.global_step):
            state.set_data(Tensor(np.zeros(state.shape, np.float32)).astype(state.dtype))
        return optimizer

    def step(self, loss: Any, optimizer: Any, *arguments: Any) -> Any:
        key = id(optimizer)
        if key not in self.steps:
            self.steps[key] = (TrainStep(loss, optimizer, *arguments), loss)
        step, _ = self.steps[key]
        step.discard()
        return step


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return Compiled()


def make_run(files: Path, compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a stage in this process, whose device was chosen by another test perhaps."""
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    monkeypatch.setattr(runner, "start_runtime", lambda *arguments, **options: Runtime(0, 1))
    compiled.patch(monkeypatch)

    def start(stage: str, save: Path, **changes: Any) -> Path:
        given: dict[str, Any] = {
            "config_path": files / "finetune.yaml", "load_sft_checkpoint": files / "weights.ckpt",
            "mind_dataset_dir": files / "pairs.mindrecord", "save_ckpt_dir": save, "use_parallel": False,
            "epochs": 3, "batch_size": 4, "micro_batch_size": 2, "eval_fraction": 0.2, "eval_interval": 5,
            "learning_rate": 1e-2, "watchdog_timeout": 0, "trackers": (),
        }  # fmt: skip
        if stage == "reward":
            return reward.run_reward(
                RewardOptions(**given | {"calibrate": "data", "calibration_samples": 8} | changes)
            )
        return sft.run_sft(SFTOptions(**given | changes))

    return start


@pytest.fixture
def run(files: Path, compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> Run:
    return make_run(files, compiled, monkeypatch)


def lines(save: Path) -> list[dict[str, Any]]:
    text = (save / "metrics.jsonl").read_text(encoding="utf-8")
    read = [json.loads(line) for line in text.splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in read]


def final_weights(save: Path, files: Path, stage: str) -> dict[str, np.ndarray]:
    heads = {"lm_head": False, "score_head": True} if stage == "reward" else {}
    layouts = parameter_layouts(load_run_config(files / "finetune.yaml").model, Mesh(), **heads)
    return load_shard(save / "final", layouts, 0)


def in_step(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], Any]) -> None:
    """Does something at the beginning of an optimizer step, counted from 1."""
    step = StageTrainer.step

    def acting(self: StageTrainer, rows: np.ndarray) -> dict[str, float]:
        if self.steps + 1 == number:
            act()
        return step(self, rows)

    monkeypatch.setattr(StageTrainer, "step", acting)


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
    assert [line["step"] for line in lines(broken)] == list(range(8))
    (broken / ".step_000009.tmp").mkdir()  # the kill may have come while it saved
    run(stage, broken, save_interval=3, resume_training=True)
    expected = lines(straight)
    assert [line["step"] for line in expected] == list(range(STEPS + 1))
    assert [line["step"] for line in expected if "eval/loss" in line] == [0, 5, 10, 12]
    assert lines(broken) == expected
    weights = final_weights(straight, files, stage)
    for name, array in final_weights(broken, files, stage).items():
        np.testing.assert_array_equal(array, weights[name], err_msg=name)
    if stage == "reward":
        reports = [json.loads((save / "reward_model.json").read_text()) for save in (straight, broken)]
        assert reports[0] == reports[1]
        assert reports[0]["before"]["step"] == 0
    assert {path.name for path in broken.iterdir()} == {
        *("step_000009", "step_000012", "final", "config.json", "metrics.jsonl", "curves.png"),
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
    assert lines(second) == lines(first)[7:]
    assert {path.name for path in (first / "step_000006").iterdir()} == {
        *("policy", "policy_optimizer", "random", "state.json", "config.json", "manifest.json")
    }
    state = json.loads((first / "step_000006" / "state.json").read_text())
    assert (state["step"], state["rows"]) == (6, {"epoch": 1, "cursor": 8})
    run("sft", first, epochs=4, resume_training=True, save_interval=6, keep_checkpoints=0)
    assert [line["step"] for line in lines(first)] == list(range(17))
    assert not list(first.glob("left_*"))
    # From an older one: the newer ones are set aside, their lines go.
    run("sft", first, resume_from=first / "step_000006", save_interval=0)
    assert sorted(path.name for path in first.glob("left_*")) == ["left_step_000012", "left_step_000016"]
    assert lines(first)[-1]["step"] == 12


def test_a_finished_run_without_checkpoints_is_not_trained_anew(run: Run, tmp_path: Path) -> None:
    run("sft", tmp_path, epochs=1)
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


REFUSED = [
    ({"seed": 7}, "options.seed: 1 in the checkpoint, 7 now"),
    ({"batch_size": 8}, "plan.batch_size: 4 in the checkpoint, 8 now"),
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
    assert "plan.config.model.theta: 1000000.0 in the checkpoint, 500000.0 now" in str(caught.value)
    assert "plan.config.model.rms_norm_eps: 1e-06 in the checkpoint, 0.0001 now" in str(caught.value)
    with pytest.raises(CheckpointError, match="stage: sft in the checkpoint, reward now"):
        run("reward", tmp_path / "save", resume_from=checkpoint)


def test_batches_go_on_where_they_were() -> None:
    rows = np.arange(100, 111)
    stream = RowStream(rows, 4, seed=5)
    drawn = [stream.next_batch() for _ in range(5)]
    for epoch in range(2):
        order = random_stream("stage", 5, epoch).permutation(rows)
        np.testing.assert_array_equal(drawn[2 * epoch], order[:4])
        np.testing.assert_array_equal(drawn[2 * epoch + 1], order[4:8])  # 3 rows wait for the next epoch
    for number in range(5):
        again = RowStream(rows, 4, seed=5)
        for _ in range(number):
            again.next_batch()
        other = RowStream(rows, 4, seed=5)
        other.load_state_dict(json.loads(json.dumps(again.state_dict())))
        np.testing.assert_array_equal(other.next_batch(), drawn[number])


def spoil(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Makes the loss of the second micro-batch infinite in some steps."""
    step = StageTrainer.step

    def spoilt(self: StageTrainer, rows: np.ndarray) -> dict[str, float]:
        inputs, calls = self.stage.inputs, []

        def scaled(part: np.ndarray, inverse_count: np.ndarray) -> tuple[np.ndarray, ...]:
            calls.append(part)
            return inputs(part, inverse_count * np.float32(np.inf if len(calls) == 2 else 1))

        if self.steps + 1 in steps:
            self.stage.inputs = scaled  # type: ignore[method-assign]
        try:
            return step(self, rows)
        finally:
            self.stage.inputs = inputs  # type: ignore[method-assign]

    monkeypatch.setattr(StageTrainer, "step", spoilt)


def test_a_step_that_is_not_finite_is_skipped_and_its_samples_are_named(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, straight = tmp_path / "save", tmp_path / "straight"
    run("sft", straight, epochs=1)
    spoil(monkeypatch, {3})
    run("sft", save, epochs=1)
    metrics = lines(save)
    assert [line.get("update/skipped") for line in metrics] == [None, 0, 0, 1, 0]
    assert metrics[:3] == lines(straight)[:3]
    assert metrics[3]["lr"] == 0
    assert "grad_norm" not in metrics[3]
    (skipped,) = [json.loads(line) for line in (save / SKIPPED_FILE).read_text().splitlines()]
    train_rows = np.unique([row for batch in batches_of(save) for row in batch])
    third = RowStream(train_rows, 4, seed=1)
    batch = [third.next_batch() for _ in range(3)][-1]
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
    with pytest.raises(MindRLHFError, match=r"2 updates in a row were skipped .* last in step 5") as caught:
        run("sft", tmp_path, max_skipped_updates=2)
    assert f"saved in {tmp_path / 'step_000005'}" in str(caught.value)
    assert not (tmp_path / "final").exists()
    layouts = parameter_layouts(load_run_config(files / "finetune.yaml").model, Mesh())
    saved = load_shard(tmp_path / "step_000005" / "policy", layouts, 0)
    assert all(np.isfinite(array).all() for array in saved.values())
    assert run("sft", tmp_path, max_skipped_updates=2, resume_training=True) == tmp_path / "final"
    assert [line["step"] for line in lines(tmp_path)] == list(range(STEPS + 1))
