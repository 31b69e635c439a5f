"""``PPOTrainer`` in one process: two iterations, then the second again from the first one's checkpoint."""

from __future__ import annotations

import json
import signal
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from mindrlhf.checkpoint.shards import load_shard
from mindrlhf.models.qwen2.layouts import EMBEDDING
from mindrlhf.models.score_head import SCORE_HEAD_WEIGHT
from mindrlhf.runtime.signals import StopRequest
from mindrlhf.trainer import scoring
from mindrlhf.trainer.experience import Rollout
from mindrlhf.trainer.loop import train
from mindrlhf.trainer.recipes.rl import PPOTrainer
from mindrlhf.utils.errors import MindRLHFError
from tests.probes import read_columns
from tests.unit.trainer.traced_run import (
    BATCH,
    PROMPT,
    RESPONSE,
    VALID,
    TracedRun,
    json_lines,
    run_two_iterations,
)

TIMES = ("time/", "tokens_per_second")
NUMBERS = {
    "objective/scores": (-0.110128, -0.512206),
    "objective/kl": (0.0, 2.46464),
    "objective/rlhf_reward": (0.0, -0.345142),
    "response/length": (4.5, 4.0),
    "value/explained_var": (-1.5774, -0.665601),
    "policy/approxkl": (1.26491, 0.0672305),
    "policy/clipfrac": (0.472222, 0.40625),
    "loss/policy": (0.038474, -0.13345),
    "loss/value": (0.980177, 0.436598),
    "loss/pretrain": (7.55667, 7.13438),
    "loss/total": (0.832227, 0.56374),
    "value/mean": (0.136223, -0.0615521),
    "grad_norm": (3.99409, 5.44315),
    "grad_norm/critic": (0.564523, 0.404167),
}
"""What this run has always given, by iteration; a change of them is a change of the algorithm."""


@pytest.fixture(scope="module")
def run(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> TracedRun:
    return run_two_iterations(repo_root, tmp_path_factory.mktemp("ppo"))


def response_mask(rollout: Rollout) -> np.ndarray:
    return np.arange(RESPONSE) < rollout.response_lengths[:, None]


def kl_by_response(run: TracedRun, iteration: int) -> np.ndarray:
    scored = run.trace.scored[iteration]
    kl = scored.rollout.logprobs - scored.ref_logprobs
    return np.where(response_mask(scored.rollout), kl, 0).sum(axis=1)


def worst_ratio(run: TracedRun, iteration: int) -> float:
    rollout, logprobs = run.trace.rollouts[iteration], run.trace.logprobs[iteration]
    ratio = np.exp(logprobs.astype(np.float64) - rollout.logprobs)
    return float(np.abs(ratio - 1)[response_mask(rollout)].max())


def test_ratio_is_one_before_the_first_update(run: TracedRun) -> None:
    assert len(set(run.trace.rollouts[0].prompt_lengths.tolist())) > 1, "prompts must differ in their padding"
    assert run.trace.logprobs[0][response_mask(run.trace.rollouts[0])].std() > 0.5
    assert worst_ratio(run, 0) < 1e-4
    assert run.metrics[0]["objective/kl"] == pytest.approx(0, abs=1e-4), "nor is there any KL"


def test_infer_equals_train_after_the_sync(run: TracedRun) -> None:
    assert np.abs(kl_by_response(run, 1)).max() > 0.1, "the policy must have left the reference"
    assert worst_ratio(run, 1) < 1e-4
    assert run.differences == []


def test_rollouts_are_whole(run: TracedRun) -> None:
    stops = set(range(0, VALID, 5))
    for batch, rollout in zip(run.trace.batches, run.trace.rollouts, strict=True):
        np.testing.assert_array_equal(rollout.tokens[:, :PROMPT], batch.prompt_ids)
        responses = rollout.tokens[:, PROMPT:]
        for response, length, stopped in zip(
            responses, rollout.response_lengths, rollout.stopped, strict=True
        ):
            assert (response[:length] < VALID).all()
            assert (response[length:] == run.trainer.config.pad_token_id).all()
            assert not stops & set(response[: length - 1].tolist())
            assert (int(response[length - 1]) in stops) == bool(stopped)
            assert stopped or length == RESPONSE
        assert (rollout.logprobs[~response_mask(rollout)] == 0).all()
    lengths = np.concatenate([rollout.response_lengths for rollout in run.trace.rollouts])
    assert lengths.min() < RESPONSE, "some response must have stopped"


def test_each_iteration_has_new_prompts(run: TracedRun) -> None:
    ids = [set(batch.sample_ids.tolist()) for batch in run.trace.batches]
    assert run.prompt_rows >= 2 * BATCH
    assert [len(part) for part in ids] == [BATCH, BATCH]
    assert not ids[0] & ids[1]


def test_metrics_of_both_iterations(run: TracedRun) -> None:
    assert [line["iteration"] for line in run.metrics] == [1, 2]
    assert [line["episode"] for line in run.metrics] == [BATCH, 2 * BATCH]
    for number, (line, rollout) in enumerate(zip(run.metrics, run.trace.rollouts, strict=True)):
        assert all(np.isfinite(value) for value in line.values())
        assert line["response/length"] == rollout.response_lengths.mean()
        assert line["objective/kl"] == pytest.approx(kl_by_response(run, number).mean(), rel=1e-5, abs=1e-6)
        assert line["value/error"] > 0
        assert line["grad_norm"] > 0
        assert line["grad_norm/critic"] > 0
        assert line["loss/pretrain"] > 1
        assert line["policy/steps"] == 4
        phases = sum(line[f"time/{phase}"] for phase in ("rollout", "score", "train", "sync"))
        assert 0 < phases < line["time/iteration"]
        tokens = rollout.response_lengths.sum()
        assert line["tokens_per_second"] == pytest.approx(tokens / line["time/iteration"])
        assert line["tokens_per_second/rollout"] == pytest.approx(tokens / line["time/rollout"])
    # The cosine over 8 steps, without warm-up: 0.1 of 8 steps is none. Steps are counted from 0.
    angles = np.pi * np.array([3, 7]) / 8
    expected = 1e-5 + (5e-3 - 1e-5) * 0.5 * (1 + np.cos(angles))
    np.testing.assert_allclose([line["lr"] for line in run.metrics], expected, rtol=1e-4)


def test_the_numbers_of_both_iterations_are_what_they_were(run: TracedRun) -> None:
    for name, numbers in NUMBERS.items():
        found = [line[name] for line in run.metrics]
        np.testing.assert_allclose(found, numbers, rtol=1e-3, atol=1e-4, err_msg=name)


def test_adaptive_kl_coefficient_is_adapted_once_an_iteration(run: TracedRun) -> None:
    first, second = (line["objective/kl_coef"] for line in run.metrics)
    assert first == 0.02
    assert second == pytest.approx(0.02 * (1 - 0.2 * BATCH / 10_000), rel=1e-9)  # KL was 0: e = -0.2


def test_samples_are_text(run: TracedRun) -> None:
    assert [sample["iteration"] for sample in run.samples] == [1, 1, 2, 2]
    for sample, iteration, row in zip(run.samples, (0, 0, 1, 1), (0, BATCH - 1) * 2, strict=True):
        rollout = run.trace.rollouts[iteration]
        assert sample["sample_id"] == rollout.sample_ids[row]
        end = PROMPT + rollout.response_lengths[row]
        assert run.trainer.tokenizer is not None
        assert sample["response"] == run.trainer.tokenizer.decode(rollout.tokens[row, PROMPT:end].tolist())
        assert "<|im_start|>user" in sample["prompt"]
        assert np.isfinite(sample["score"])


def test_what_a_run_leaves_behind(run: TracedRun) -> None:
    assert sorted(path.name for path in run.save.iterdir()) == [
        *("config.json", "curves.png", "iteration_000001", "iteration_000002"),
        *("metrics.jsonl", "samples.jsonl", "tensorboard"),
    ]
    recorded = json.loads((run.save / "config.json").read_text())
    assert recorded["configuration"]["ppo"]["total_iterations"] == 2
    assert recorded["versions"]["mindspore"]
    assert run.last == run.save / "iteration_000002"
    assert run.console.total == 2
    state = json.loads((run.last / "state.json").read_text())
    assert state["step"] == 2
    assert state["parts"]["rewards"]["scores"]["count"] == 2 * BATCH
    texts = state["parts"]["pretraining"]
    drawn = texts["epoch"] * texts["rows"] + texts["cursor"]
    assert drawn == 2 * 4 * 2, "two texts in each of 4 steps"
    saved = load_shard(run.last / "policy", run.trainer.ppo_model_train.layouts, 0)
    start = load_shard(run.model, run.trainer.ppo_model_train.layouts, 0)
    for name, array in saved.items():
        assert (array != start[name]).any(), f"{name} was not trained"


def test_phases_end_when_all_their_work_is_done(run: TracedRun) -> None:
    names = [name for name, *_ in run.phases]
    assert names == ["load", *["rollout", "score", "train", "sync", "save"] * 2]
    expected = {
        "rollout": (BATCH * RESPONSE, "tokens"),
        "score": (3 * (BATCH // (run.trainer.config.score_batch_size or BATCH)), "passes"),
        "train": (4, "minibatches"),
        "sync": (len(dict(run.trainer.ppo_model_infer.shards())), "parameters"),
    }
    for name, total, unit, done in run.phases:
        if name in expected:
            assert (total, unit) == expected[name]
            assert done == total, name


def tensorboard_steps(directory: Path) -> dict[str, list[int]]:
    """Tag -> steps of its points, as they were written; a START drops those from its step on."""
    found: dict[str, list[int]] = {}
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.session_log.status == SessionLog.START:
                found = {tag: [step for step in steps if step < event.step] for tag, steps in found.items()}
            for value in event.summary.value:
                found.setdefault(value.tag, []).append(event.step)
    return found


def test_tensorboard_has_all_metrics_and_distributions(run: TracedRun) -> None:
    steps = tensorboard_steps(run.save / "tensorboard")
    expected = {name for name in run.metrics[0] if name != "iteration"} | {"samples/text_summary"}
    expected |= {f"distribution/{name}" for name in ("scores", "kl", "length", "ratio")}
    assert set(steps) == expected
    assert all(each == [1, 2] for each in steps.values())


def test_experience_files_hold_what_was_learnt_from(run: TracedRun) -> None:
    for number, (rollout, experience) in enumerate(
        zip(run.trace.rollouts, run.trace.experiences, strict=True), start=1
    ):
        file = run.experience / f"experience_iteration_{number:06d}.mindrecord"
        found = read_columns(file, ["tokens", "logprobs", "advantages"])
        np.testing.assert_array_equal(found["tokens"], rollout.tokens)
        np.testing.assert_array_equal(found["logprobs"], rollout.logprobs)
        np.testing.assert_array_equal(found["advantages"], experience.advantages)


def test_reward_model_and_critic_start_from_the_policy_with_heads_of_their_own(run: TracedRun) -> None:
    models = run.trainer.models
    assert models.critic is not None
    reward, critic = dict(models.reward.shards()), dict(models.critic.shards())
    start = load_shard(run.model, models.ref.layouts, 0)
    np.testing.assert_array_equal(reward[EMBEDDING], start[EMBEDDING])
    np.testing.assert_array_equal(dict(models.ref.shards())[EMBEDDING], start[EMBEDDING])
    assert np.abs(reward[SCORE_HEAD_WEIGHT]).max() > 0
    assert (critic[SCORE_HEAD_WEIGHT] != reward[SCORE_HEAD_WEIGHT]).any()


def test_resumed_iteration_equals_the_uninterrupted_one(run: TracedRun) -> None:
    """Last of all, since it trains the module's models again.

    State comes back to the bit (test_checkpoints.py), but MindSpore's CPU kernels repeat a forward pass
    only to about 1e-6 (seen with one thread too), so what is computed from it has a tolerance. Moments or
    steps that were lost would move weights by 1e-3.
    """
    trainer, trace, job = run.trainer, run.trace, run.run
    finished = {name: array.copy() for name, array in trainer.ppo_model_train.shards()}
    trainer.ppo_model_train.load({name: array * 0 + 0.1 for name, array in finished.items()})
    trainer.sync()

    job.resume(run.save / "iteration_000001", trainer)
    assert job.step == 1
    assert sorted(path.name for path in run.save.glob("*iteration_*")) == [
        *("iteration_000001", "left_iteration_000002"),
    ]
    job.stop.receive(signal.SIGTERM)
    assert not train(job, trainer)
    assert job.last_checkpoint == run.save / "iteration_000001", "what is saved already is not saved again"
    job.stop = StopRequest()
    assert train(job, trainer)

    np.testing.assert_array_equal(trace.batches[2].sample_ids, trace.batches[1].sample_ids)
    np.testing.assert_array_equal(trace.rollouts[2].tokens, trace.rollouts[1].tokens)
    again = json_lines(run.save / "metrics.jsonl")
    assert [line["iteration"] for line in again] == [1, 2]
    assert again[0] == run.metrics[0]
    assert again[1].keys() == run.metrics[1].keys()
    for name, value in run.metrics[1].items():
        if not name.startswith(TIMES):
            assert again[1][name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    for name, array in trainer.ppo_model_train.shards():
        np.testing.assert_allclose(array, finished[name], atol=1e-4, rtol=0, err_msg=name)
    assert [sample["iteration"] for sample in json_lines(run.save / "samples.jsonl")] == [1, 1, 2, 2]
    assert len(list((run.save / "tensorboard").iterdir())) > 1, "a resumed run adds a file"
    assert all(each == [1, 2] for each in tensorboard_steps(run.save / "tensorboard").values())


def test_rewards_that_are_not_finite_cost_an_iteration_each_and_then_the_job(
    run: TracedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the last of all: weights, moments and controllers stay, and the state is saved."""
    trainer, job = run.trainer, run.run
    reward_scores = scoring._reward_scores

    def broken(*args: Any) -> np.ndarray:
        scores = reward_scores(*args)
        scores[1] = np.nan
        return scores

    before, shaper = state_of(trainer), json.dumps(trainer.reward_shaper.state_dict())
    start = job.step
    monkeypatch.setattr(scoring, "_reward_scores", broken)
    for skipped in (1, 2, 3):
        with job.timed_step(trainer):
            result = trainer.step(job.step)
        assert all(np.isfinite(value) for value in result.metrics.values())
        assert (result.metrics["update/skipped"], result.metrics["policy/steps"]) == (1, 0)
        if skipped < 3:
            job.record(trainer, result)
    saved = run.save / f"iteration_{start + 3:06d}"
    with pytest.raises(MindRLHFError, match=f"3 updates in a row .*{saved.name}"):
        job.record(trainer, result)
    for name, array in state_of(trainer).items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)
    assert json.dumps(trainer.reward_shaper.state_dict()) == shaper
    bad_samples = [[batch.sample_ids[1]] for batch in run.trace.batches[-3:]]
    lines = json_lines(run.save / "skipped_updates.jsonl")
    assert [(line["iteration"], line["sample_ids"]) for line in lines] == [
        (start + number, ids) for number, ids in enumerate(bad_samples, start=1)
    ]
    assert [line["iteration"] for line in json_lines(run.save / "metrics.jsonl")] == list(range(1, start + 4))
    state = json.loads((saved / "state.json").read_text())
    assert state["step"] == start + 3
    # A resumed run draws other prompts than those that it stopped at.
    trainer.prompts.load_state_dict(state["parts"]["prompts"])
    assert not set(trainer.prompts.next_batch().sample_ids) & set(run.trace.batches[-1].sample_ids)


def state_of(trainer: PPOTrainer) -> dict[str, np.ndarray]:
    """Weights, moments and step counts of policy and critic."""
    found = {f"infer/{name}": array.copy() for name, array in trainer.ppo_model_infer.shards()}
    for model, step in (
        (trainer.models.train, trainer.ppo_update.policy_step),
        (trainer.models.critic, trainer.ppo_update.critic_step),
    ):
        assert model is not None
        assert step is not None
        for name, array in model.shards():
            found[f"{type(model).__name__}/{name}"] = array.copy()
        for key, array in step.optimizer.arrays().items():
            found[f"{type(model).__name__}/{key}"] = array.copy()
    return found
