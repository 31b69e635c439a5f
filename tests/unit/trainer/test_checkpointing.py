"""A training state saved and loaded: the next update is the uninterrupted one bit for bit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindrlhf.configs.schema import JobConfig
from mindrlhf.models.train import CriticModel, PPOModelTrain
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layout import Mesh
from mindrlhf.trainer.builder import PPOModels
from mindrlhf.trainer.checkpointing import TrainingCheckpoints
from mindrlhf.trainer.experience import Experience, Rollout, Scores, make_experience
from mindrlhf.trainer.runtime import HostExchange, Runtime
from mindrlhf.trainer.update import PPOUpdate
from mindrlhf.utils.errors import CheckpointError

EXCHANGE = HostExchange(Runtime(0, 1))


def random_experience(job: JobConfig) -> Experience:
    rng = np.random.default_rng(0)
    lengths = np.array([3, 1, 2, 3], np.int32)
    rollout = Rollout(
        tokens=rng.integers(0, 24, (4, 7)).astype(np.int32),
        prompt_lengths=np.array([4, 1, 2, 3], np.int32),
        response_lengths=lengths,
        logprobs=-rng.random((4, 3)).astype(np.float32) - 2.5,
        stopped=(lengths < 3).astype(np.int32),
        sample_ids=np.arange(4),
    )
    scores = Scores(*(rng.standard_normal(shape).astype(np.float32) for shape in ((4, 3), (4, 3), (4,))))
    return make_experience(rollout, scores, 0.1, job.ppo)


@dataclass
class Training:
    """Models, their update and one batch to learn from."""

    models: PPOModels
    update: PPOUpdate
    experience: Experience

    def step(self, iteration: int) -> None:
        self.update.run(self.experience, iteration, lambda: None)

    def optimizers(self) -> list[Any]:
        assert self.update.critic_step is not None
        return [self.update.policy_step.optimizer, self.update.critic_step.optimizer]

    def state(self) -> dict[str, np.ndarray]:
        """Every weight and every moment, copied."""
        assert self.models.critic is not None
        arrays: dict[str, np.ndarray] = {}
        for role, model in (("policy", self.models.train), ("critic", self.models.critic)):
            arrays |= {f"{role}/{name}": array.copy() for name, array in model.shards()}
        for number, optimizer in enumerate(self.optimizers()):
            states = (*optimizer.exp_avg, *optimizer.exp_avg_sq, optimizer.global_step)
            arrays |= {f"{number}/{state.name}": state.asnumpy().copy() for state in states}
        return arrays

    def spoil(self) -> None:
        """Makes weights and moments something else altogether."""
        assert self.models.critic is not None
        for model in (self.models.train, self.models.critic):
            model.load({name: np.full_like(array, 0.5) for name, array in model.shards()})
        for optimizer in self.optimizers():
            for state in (*optimizer.exp_avg, *optimizer.exp_avg_sq, optimizer.global_step):
                state.set_data(state * 0 + 7)


@pytest.fixture(scope="module")
def training(tiny_job: JobConfig) -> Training:
    groups = Groups(Mesh(), 0)
    model, prompt = tiny_job.train.model, tiny_job.ppo.max_prompt_length
    train = PPOModelTrain(
        model, groups, prompt_length=prompt, temperature=1.0, valid_vocab_size=model.vocab_size
    )
    critic = CriticModel(model, groups, prompt_length=prompt)
    rng = np.random.default_rng(1)
    for network in (train, critic):
        network.load(
            {
                name: rng.normal(float("norm" in name), 0.2, layout.shape).astype(np.float32)
                for name, layout in network.layouts.items()
            }
        )
    models = PPOModels(infer=None, train=train, ref=None, reward=None, critic=critic)  # type: ignore[arg-type]
    return Training(models, PPOUpdate(models, tiny_job, EXCHANGE), random_experience(tiny_job))


def save(training: Training, checkpoints: TrainingCheckpoints, iteration: int, **state: Any) -> Path:
    return checkpoints.save(
        iteration, training.models, training.update, {"iteration": iteration, **state}, EXCHANGE
    )


def test_the_update_after_a_load_is_the_uninterrupted_one_bit_for_bit(
    training: Training, tmp_path: Path
) -> None:
    checkpoints = TrainingCheckpoints(tmp_path, rank=0, keep=2)
    training.step(0)
    saved = training.state()
    directory = save(training, checkpoints, 1, note="as given")
    training.step(1)
    uninterrupted = training.state()
    assert any((uninterrupted[name] != saved[name]).any() for name in saved if name.startswith("policy"))
    assert sorted(p.name for p in directory.iterdir()) == [
        *("critic", "critic_optimizer", "policy", "policy_optimizer", "state.json"),
    ]

    training.spoil()
    state = TrainingCheckpoints(tmp_path, rank=0, keep=2).load(directory, training.models, training.update)
    assert state == {"iteration": 1, "note": "as given"}
    loaded = training.state()
    assert loaded.keys() == saved.keys()
    for name, array in saved.items():
        np.testing.assert_array_equal(loaded[name], array, err_msg=name)
    training.step(1)
    for name, array in training.state().items():
        np.testing.assert_array_equal(array, uninterrupted[name], err_msg=name)


def test_older_checkpoints_go_when_a_newer_one_is_whole(training: Training, tmp_path: Path) -> None:
    checkpoints = TrainingCheckpoints(tmp_path, rank=0, keep=2)
    for iteration in (1, 2, 3, 10):
        save(training, checkpoints, iteration)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iteration_000003", "iteration_000010"]


def test_keep_0_keeps_all(training: Training, tmp_path: Path) -> None:
    checkpoints = TrainingCheckpoints(tmp_path, rank=0, keep=0)
    for iteration in (1, 2, 3):
        save(training, checkpoints, iteration)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_half_written_checkpoint_is_never_taken(
    training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = TrainingCheckpoints(tmp_path, rank=0, keep=1)
    whole = save(training, checkpoints, 1)

    def killed(text: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mindrlhf.trainer.checkpointing.json.dumps", killed)
        with pytest.raises(KeyboardInterrupt):
            save(training, checkpoints, 2)
    assert [p.name for p in tmp_path.glob("iteration_*")] == [whole.name], "the older one must stay"
    (left,) = tmp_path.glob(".iteration_*")
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        checkpoints.load(left, training.models, training.update)
    # The next save is not disturbed by what was left, and the same iteration may be saved again.
    (left / "policy" / "rank_9").mkdir()
    assert not (save(training, checkpoints, 2) / "policy" / "rank_9").exists()
    save(training, checkpoints, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iteration_000002"]


def test_a_checkpoint_of_another_model_is_refused_and_says_so(training: Training, tmp_path: Path) -> None:
    directory = save(training, TrainingCheckpoints(tmp_path, rank=0, keep=1), 1)
    (file,) = (directory / "critic" / "rank_0").iterdir()
    file.write_bytes((directory / "policy" / "rank_0" / file.name).read_bytes())
    with pytest.raises(CheckpointError, match=r"score_head\.weight"):
        TrainingCheckpoints(tmp_path, rank=0, keep=1).load(directory, training.models, training.update)


def test_a_directory_that_is_none_is_refused(training: Training, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"state\.json"):
        TrainingCheckpoints(tmp_path, rank=0, keep=1).load(tmp_path, training.models, training.update)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(CheckpointError, match="--save_ckpt_dir"):
        TrainingCheckpoints(file / "below", rank=0, keep=1)


def test_moments_lie_beside_the_weights_they_belong_to(training: Training, tmp_path: Path) -> None:
    from mindrlhf.checkpoint.opening import open_weights

    directory = save(training, TrainingCheckpoints(tmp_path, rank=0, keep=1), 1)
    (file,) = (directory / "policy_optimizer" / "rank_0").iterdir()
    with open_weights(file) as source:
        names = set(source.tensors)
    weights = set(training.models.train.layouts)
    assert names >= {f"adam_m.{name}" for name in weights} | {f"adam_v.{name}" for name in weights}
    assert "global_step" in names
    assert not names & weights
    assert json.loads((directory / "state.json").read_text()) == {"iteration": 1}
