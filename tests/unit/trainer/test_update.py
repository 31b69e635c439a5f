"""Which optimizer steps an iteration takes: critic warm-up, early stop by KL, the loss that is mixed in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindrlhf.configs.keys import JobConfig
from mindrlhf.data.mindrecord import Column, write_mindrecord
from mindrlhf.models.networks import CriticModel, PPOModelTrain
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layout import Mesh
from mindrlhf.runtime.device import Runtime
from mindrlhf.runtime.host_exchange import HostExchange
from mindrlhf.trainer.builder import PPOModels
from mindrlhf.trainer.experience import Experience, Rollout
from mindrlhf.trainer.metrics import update_metrics
from mindrlhf.trainer.pretraining import PretrainStream
from mindrlhf.trainer.skipped_updates import SkippedUpdate
from mindrlhf.trainer.update import PPOUpdate, UpdateResult, minibatches

GROUPS = Groups(Mesh(), 0)
RESPONSE_LENGTHS = np.array([3, 1, 2, 3])
IDS = np.array([40, 41, 42, 43])
FIELDS = ("old_values", "advantages", "returns")
STEPS = 4  # 2 epochs of 2 minibatches


def texts(path: Path) -> PretrainStream:
    ids = np.random.default_rng(3).integers(0, 24, (6, 8)).astype(np.int32)
    write_mindrecord(
        path,
        {name: Column("int32", 8) for name in ("pretrain_ids", "loss_mask")},
        [{"pretrain_ids": ids, "loss_mask": np.ones_like(ids)}],
    )
    return PretrainStream(path, batch_size=2, max_length=16, vocab_size=24, seed=0)


def drawn(stream: PretrainStream) -> int:
    """Texts that have been drawn."""
    state = stream.state_dict()
    return state["epoch"] * state["rows"] + state["cursor"]


@dataclass
class Training:
    """Models, their update, and experience; :meth:`run` starts from the same weights every time."""

    models: PPOModels
    update: PPOUpdate
    experience: Experience
    start: dict[str, dict[str, np.ndarray]]

    def run(self, iteration: int = 0, **changes: Any) -> tuple[UpdateResult, dict[str, np.ndarray]]:
        """One iteration; its result, and all weights after it by role and name."""
        trained = self.trained()
        for role, (model, step) in trained.items():
            model.load(self.start[role])
            step.optimizer.load({key: np.zeros(shape) for key, shape in step.optimizer.shapes().items()})
        original = self.update.config
        self.update.config = replace(original, **changes)
        try:
            result = self.update.run(self.experience, iteration, lambda: None)
        finally:
            self.update.config = original
        weights = {
            f"{role}/{name}": array.copy()
            for role, (model, _) in trained.items()
            for name, array in model.shards()
        }
        return result, weights

    def trained(self) -> dict[str, Any]:
        found = {"policy": (self.models.train, self.update.policy_step)}
        if self.models.critic is not None:
            found["critic"] = (self.models.critic, self.update.critic_step)
        return found

    def steps_counted(self) -> dict[str, int]:
        return {
            role: int(step.optimizer.state.array("global_step")[0])
            for role, (_, step) in self.trained().items()
        }

    def moved(self, weights: dict[str, np.ndarray], role: str) -> list[str]:
        return [
            name for name, array in self.start[role].items() if (weights[f"{role}/{name}"] != array).any()
        ]


@pytest.fixture(scope="module")
def training(tiny_job: JobConfig, tmp_path_factory: pytest.TempPathFactory) -> Training:
    config = replace(tiny_job.ppo, ppo_epochs=2, ptx_coef=0.5)
    # Gradients of key biases nearly cancel where rotary positions turn slowly, down to 5e-7 here. With an eps
    # that is not far above them, AdamW would scale their rounding to 1e-6 of a weight.
    run = replace(tiny_job.train, optimizer={**tiny_job.train.optimizer, "eps": 1e-4})
    job = replace(tiny_job, train=run, critic=run, ppo=config)
    train = PPOModelTrain(job.train.model, GROUPS, prompt_length=4, temperature=1.0, valid_vocab_size=24)
    critic = CriticModel(job.critic.model, GROUPS, prompt_length=4)
    rng = np.random.default_rng(0)
    start = {
        role: {name: rng.normal(0, 0.3, p.shape).astype(np.float32) for name, p in model.parameters.items()}
        for role, model in (("policy", train), ("critic", critic))
    }
    rollout = Rollout.of(
        tokens=rng.integers(0, 24, (4, 7)).astype(np.int32),
        prompt_lengths=np.array([4, 2, 3, 1]),
        response_lengths=RESPONSE_LENGTHS,
        logprobs=np.zeros((4, 3), np.float32),
        stopped=np.ones(4, np.int32),
        sample_ids=IDS,
    )
    mask = rollout.mask.astype(np.float32)
    train.load(start["policy"])
    rollout = rollout._replace(logprobs=mask * train(*rollout.inputs)[0])
    numbers = {name: mask * rng.normal(0, 1, mask.shape).astype(np.float32) for name in FIELDS}
    models = PPOModels(infer=None, train=train, ref=None, reward=None, critic=critic)  # type: ignore[arg-type]
    update = PPOUpdate(
        models,
        job,
        HostExchange(Runtime(0, 1)),
        texts(tmp_path_factory.mktemp("texts") / "texts.mindrecord"),
    )
    update.pretraining, update.texts = None, update.pretraining  # type: ignore[attr-defined]
    return Training(models, update, Experience(rollout, **numbers), start)


def counts(result: UpdateResult) -> list[int]:
    """Minibatches that were counted, seen by policy and critic, and steps of policy and critic."""
    seen = (result.policy["ratio"], result.value["value"])
    return [len(each) for each in (result.tokens, *seen, result.grad_norm, result.critic_grad_norm)]


def assert_same_weights(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> None:
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, atol=1e-6, err_msg=name)


def of_critic(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array for name, array in weights.items() if name.startswith("critic/")}


def assert_same(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray], count: int) -> None:
    """Equal sums of the first minibatches."""
    assert found.keys() == wanted.keys()
    for name, sums in found.items():
        np.testing.assert_allclose(sums[:count], wanted[name][:count], atol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def whole(training: Training) -> tuple[UpdateResult, dict[str, np.ndarray]]:
    return training.run()


def test_all_steps_by_default(training: Training, whole: tuple[UpdateResult, dict[str, np.ndarray]]) -> None:
    result, weights = whole
    assert counts(result) == [STEPS, STEPS, STEPS, STEPS, STEPS]
    assert result.pretrain_loss.size == 0
    for role in ("policy", "critic"):
        assert training.moved(weights, role) == list(training.start[role])
    assert update_metrics(result, training.update.config)["policy/steps"] == STEPS


def test_only_the_critic_learns_while_it_warms_up(
    training: Training, whole: tuple[UpdateResult, dict[str, np.ndarray]]
) -> None:
    result, weights = training.run(iteration=0, critic_warmup_iterations=1)
    assert training.moved(weights, "policy") == []
    assert training.steps_counted() == {"policy": 0, "critic": STEPS}
    # The critic learns as it does without a warm-up: it has its own backbone.
    assert_same_weights(weights, of_critic(whole[1]))
    metrics = update_metrics(result, training.update.config)
    assert all(np.isfinite(value) for value in metrics.values())
    assert (metrics["policy/steps"], metrics["lr"], metrics["grad_norm"]) == (0, 0, 0)
    assert metrics["policy/ratio"] == pytest.approx(1, abs=1e-6)
    assert metrics["policy/entropy"] > 0
    assert metrics["grad_norm/critic"] > 0


def test_after_the_warm_up_both_learn(training: Training) -> None:
    _, weights = training.run(iteration=1, critic_warmup_iterations=1)
    assert training.moved(weights, "policy") == list(training.start["policy"])


def test_steps_end_before_the_minibatch_that_is_too_far(
    training: Training, whole: tuple[UpdateResult, dict[str, np.ndarray]]
) -> None:
    approxkl = whole[0].policy["approxkl"] / whole[0].tokens
    assert approxkl[0] < 1e-8
    assert approxkl[2] > approxkl[1] > 1e-4, "the case must be one in which the policy moves away"
    # 1.5 times the target lies between the approxkl of the second and the third minibatch.
    target = (approxkl[1] + approxkl[2]) / 2 / 1.5
    result, weights = training.run(target_kl=target)
    assert training.steps_counted() == {"policy": 2, "critic": 2}
    assert counts(result) == [3, 3, 2, 2, 2]
    assert_same(result.policy, whole[0].policy, 3)
    assert_same(result.value, whole[0].value, 2)
    # Two steps and nothing of a third: what one epoch gives.
    _, one_epoch = training.run(ppo_epochs=1)
    assert_same_weights(weights, one_epoch)
    metrics = update_metrics(result, training.update.config)
    assert metrics["policy/steps"] == 2
    assert metrics["policy/approxkl"] == pytest.approx(
        (approxkl[:3] * result.tokens).sum() / result.tokens.sum(), rel=1e-4
    )
    assert metrics["value/mean"] == pytest.approx(result.value["value"].sum() / result.tokens[:2].sum())


def test_the_margin_is_one_and_a_half(
    training: Training, whole: tuple[UpdateResult, dict[str, np.ndarray]]
) -> None:
    largest = (whole[0].policy["approxkl"] / whole[0].tokens).max()
    training.run(target_kl=largest / 1.5 * 1.01)
    assert training.steps_counted()["policy"] == STEPS
    training.run(target_kl=largest / 1.5 * 0.99)
    assert training.steps_counted()["policy"] < STEPS


def test_the_first_minibatch_is_always_learnt_from(training: Training) -> None:
    result, _ = training.run(target_kl=1e-30)
    assert training.steps_counted()["policy"] == 1
    assert len(result.grad_norm) == 1


def test_texts_are_learnt_in_the_same_steps(
    training: Training, whole: tuple[UpdateResult, dict[str, np.ndarray]]
) -> None:
    texts_ = training.update.texts  # type: ignore[attr-defined]
    training.update.pretraining = texts_
    try:
        result, weights = training.run()
        assert drawn(texts_) == 2 * STEPS
        stopped, _ = training.run(target_kl=1e-30)
        assert drawn(texts_) == 2 * STEPS + 2, "a step that is not taken draws nothing"
        training.run(critic_warmup_iterations=1)
        assert drawn(texts_) == 2 * STEPS + 2
    finally:
        training.update.pretraining = None
    assert training.steps_counted()["critic"] == STEPS
    assert (result.pretrain_loss.shape, stopped.pretrain_loss.shape) == ((STEPS,), (1,))
    # The first minibatch's losses are those of the same weights; the gradient has another part.
    assert_same(result.policy, whole[0].policy, 1)
    assert abs(result.grad_norm[0] - whole[0].grad_norm[0]) > 1e-3
    assert any(
        (weights[name] != array).any() for name, array in whole[1].items() if name.startswith("policy/")
    )
    metrics = update_metrics(result, training.update.config)
    plain = update_metrics(result._replace(pretrain_loss=np.zeros(0)), training.update.config)
    assert metrics["loss/pretrain"] == pytest.approx(result.pretrain_loss.mean())
    assert metrics["loss/total"] - plain["loss/total"] == pytest.approx(0.5 * metrics["loss/pretrain"])


def broken(experience: Experience, row: int, field: str, value: float) -> Experience:
    """Experience with one number that is not finite."""
    array = getattr(experience, field).copy()
    array[row, 0] = value
    return experience._replace(**{field: array})


def test_an_update_that_is_not_finite_is_skipped_and_the_others_are_not(training: Training) -> None:
    """One advantage is NaN: the policy learns from the minibatches without it, the critic from all."""
    rows = [part.tolist() for part in minibatches(4, training.update.config, 0)]
    good, whole_run = training.experience, training.run()
    training.experience = broken(good, 3, "advantages", float("nan"))
    try:
        result, weights = training.run()
    finally:
        training.experience = good
    bad = [number for number, part in enumerate(rows, start=1) if 3 in part]
    assert len(bad) == 2, "once an epoch"
    assert training.steps_counted() == {"policy": 2, "critic": STEPS}
    assert result.skipped == 2
    skipped, failure = training.update.skips.report(IDS)
    assert failure == ""
    assert [(one["minibatch"], one["model"]) for one in skipped] == [(number, "policy") for number in bad]
    for one in skipped:
        # Not cut into micro-batches, so that the minibatch is all that can be told.
        assert sorted(one["sample_ids"]) == sorted(IDS[rows[one["minibatch"] - 1]])
        assert one["whole_minibatch"]
        assert one["cause"].startswith("loss not finite")
    # A minibatch without finite sums has no entry, and the others are what the metrics are of.
    assert counts(result) == [2, 2, 2, 2, STEPS]
    metrics = update_metrics(result, training.update.config)
    assert all(np.isfinite(value) for value in metrics.values())
    assert (metrics["policy/steps"], metrics["update/skipped"]) == (2, 2)
    assert_same_weights(weights, of_critic(whole_run[1]))
    assert update_metrics(whole_run[0], training.update.config)["update/skipped"] == 0


def test_micro_batches_tell_whose_sample_it_was(training: Training) -> None:
    good = training.experience
    training.experience = broken(good, 2, "returns", float("inf"))
    try:
        result, _ = training.run(micro_batch_size=1)
    finally:
        training.experience = good
    skipped, _ = training.update.skips.report(IDS)
    assert [(one["model"], one["sample_ids"], one["whole_minibatch"]) for one in skipped] == [
        ("critic", [42], False)
    ] * 2
    assert training.steps_counted() == {"policy": STEPS, "critic": 2}
    assert len(result.critic_grad_norm) == result.skipped == 2


def test_too_many_in_a_row_end_the_iteration(training: Training) -> None:
    """Three by default; an update that is taken starts the count anew."""
    good = training.experience
    for row in range(4):
        training.experience = broken(training.experience, row, "advantages", float("nan"))
    try:
        result, weights = training.run(target_kl=1e-30)  # NaN is not a KL that is too large
        assert training.update.skips.are_too_many
        assert result.skipped == 3
        assert training.moved(weights, "policy") == []
        assert training.steps_counted() == {"policy": 0, "critic": 3}
        metrics = update_metrics(result, training.update.config)
        assert all(np.isfinite(value) for value in metrics.values())
    finally:
        training.experience = good
        _, failure = training.update.skips.report(IDS)
    assert failure.startswith("3 updates in a row were skipped")
    training.run()
    assert training.update.skips.in_a_row == 0
    assert not training.update.skips.are_too_many


def test_a_rollout_with_a_fault_is_one_skipped_update(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = SkippedUpdate("both", "reward", np.array([2]))
    monkeypatch.setattr(training, "experience", training.experience._replace(fault=fault))
    result, weights = training.run()
    assert training.moved(weights, "policy") == training.moved(weights, "critic") == []
    assert (result.skipped, counts(result)) == (1, [0, 0, 0, 0, 0])
    assert [one["sample_ids"] for one in training.update.skips.report(IDS)[0]] == [[42]]
    metrics = update_metrics(result, training.update.config)
    assert all(np.isfinite(value) for value in metrics.values())
    monkeypatch.undo()
    training.run()
    assert training.update.skips.in_a_row == 0


def test_the_policy_learns_the_same_with_and_without_a_separate_critic(
    training: Training, whole: tuple[UpdateResult, dict[str, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "models", replace(training.models, critic=None))
    monkeypatch.setattr(training.update, "critic_step", None)
    monkeypatch.setattr(training, "experience", training.experience._replace(old_values=None))
    result, weights = training.run()
    assert (dict(result.value), len(result.critic_grad_norm), result.skipped) == ({}, 0, 0)
    assert_same(result.policy, whole[0].policy, STEPS)
    assert_same_weights(whole[1], weights)
    with_critic = update_metrics(whole[0], training.update.config)
    metrics = update_metrics(result, training.update.config)
    assert with_critic.keys() - metrics.keys() == {
        *("loss/value", "value/clipfrac", "value/error", "value/mean", "grad_norm/critic")
    }
    vf = training.update.config.vf_coef
    assert metrics["loss/total"] == pytest.approx(
        with_critic["loss/total"] - vf * with_critic["loss/value"], abs=1e-5
    )
