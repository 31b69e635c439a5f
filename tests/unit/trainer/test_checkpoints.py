"""A training state saved and loaded, bit for bit.

That the next iteration is then the uninterrupted one is shown in test_rl.py.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import ops

from mindrlhf.checkpoint.hf_config import check_described, check_language_model
from mindrlhf.checkpoint.manifest import read_manifest
from mindrlhf.configs.keys import JobConfig
from mindrlhf.models.networks import CriticModel, PPOModelTrain
from mindrlhf.models.pieces import Gradients
from mindrlhf.models.score_head import SCORE_HEAD
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layout import Mesh
from mindrlhf.runtime.device import Runtime
from mindrlhf.runtime.host_exchange import HostExchange
from mindrlhf.trainer.builder import PPOModels
from mindrlhf.trainer.checkpoints import Trained, TrainingCheckpoints, read_state
from mindrlhf.trainer.recipes.ppo_job import fixed_settings
from mindrlhf.trainer.recipes.rl import trained_models
from mindrlhf.trainer.resume import find_faults, newest_whole
from mindrlhf.trainer.update import PPOUpdate
from mindrlhf.utils.errors import CheckpointError
from mindrlhf.utils.result_files import checkpoint_numbers

EXCHANGE = HostExchange(Runtime(0, 1))


@dataclass
class Training:
    """Models and their update."""

    models: PPOModels
    update: PPOUpdate
    job: JobConfig

    def checkpoints(self, directory: Path, keep: int = 1) -> TrainingCheckpoints:
        fixed = fixed_settings(self.job)
        return TrainingCheckpoints(
            directory, "iteration", EXCHANGE, keep=keep, configuration=self.job, fixed=fixed
        )

    def trained(self) -> list[Trained]:
        return trained_models(self.models, self.update)

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
            arrays |= {f"{number}/{key}": array.copy() for key, array in optimizer.arrays().items()}
        return arrays

    def fill(self, seed: int) -> None:
        """Random weights and moments, and ``seed`` steps done."""
        rng = np.random.default_rng(seed)
        assert self.models.critic is not None
        for model in (self.models.train, self.models.critic):
            model.load({name: rng.standard_normal(array.shape) for name, array in model.shards()})
        for optimizer in self.optimizers():
            moments = {key: abs(rng.standard_normal(shape)) for key, shape in optimizer.shapes().items()}
            optimizer.load(moments | {"global_step": np.array([seed])})


def training_of(job: JobConfig) -> Training:
    groups = Groups(Mesh(), 0)
    model, prompt = job.train.model, job.ppo.max_prompt_length
    train = PPOModelTrain(
        model, groups, prompt_length=prompt, temperature=1.0, valid_vocab_size=model.vocab_size
    )
    critic = CriticModel(model, groups, prompt_length=prompt)
    models = PPOModels(infer=None, train=train, ref=None, reward=None, critic=critic)  # type: ignore[arg-type]
    training = Training(models, PPOUpdate(models, job, EXCHANGE), job)
    training.fill(0)
    return training


@pytest.fixture(scope="module")
def training(tiny_job: JobConfig) -> Training:
    return training_of(tiny_job)


class Note:
    """A part of the state."""

    def __init__(self, text: str = "") -> None:
        self.text = text

    def state_dict(self) -> dict[str, Any]:
        return {"text": self.text}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.text = state["text"]


def save(training: Training, checkpoints: TrainingCheckpoints, iteration: int, **parts: Note) -> Path:
    return checkpoints.save(iteration, training.trained(), parts)


def assert_equal(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_all_weights_and_moments_come_back_bit_for_bit(training: Training, tmp_path: Path) -> None:
    training.fill(3)
    saved = training.state()
    directory = save(training, training.checkpoints(tmp_path, 2), 1, note=Note("as given"))
    assert sorted(path.name for path in directory.iterdir()) == [
        *("config.json", "critic", "critic_optimizer", "manifest.json", "policy", "policy_optimizer"),
        *("random", "state.json"),
    ]
    assert find_faults(directory, EXCHANGE) == []
    assert len(read_manifest(directory)) == 4 + 1 + 2 + 2, "everything but the manifest itself"
    check_described(directory / "critic", training.models.train.config)
    check_language_model(directory / "policy")
    with pytest.raises(CheckpointError, match="critic holds a reward model or a critic"):
        check_language_model(directory / "critic")
    training.fill(4)
    spoilt = training.state()
    assert all((spoilt[name] != array).any() for name, array in saved.items())

    note = Note()
    assert training.checkpoints(tmp_path, 2).load(directory, training.trained(), {"note": note}) == 1
    assert note.text == "as given"
    assert_equal(training.state(), saved)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_masters_of_weights_in_fewer_bits_come_back_and_are_gone_on_with(
    tiny_job: JobConfig, tmp_path: Path, dtype: str
) -> None:
    def step(training: Training) -> dict[str, np.ndarray]:
        for _, model, optimizer in training.trained():
            gradients = Gradients()
            for name, parameter in model.parameters.items():
                gradients.add((name,), (ops.ones(parameter.shape, ms.float32),))
            optimizer.step(gradients, 1.0)
        return training.state()

    run = replace(tiny_job.train, model=replace(tiny_job.train.model, param_init_type=dtype))
    whole, resumed = (training_of(replace(tiny_job, train=run, critic=run)) for _ in range(2))
    whole.fill(3)
    saved = step(whole)
    masters = {name for name in saved if "/master." in name}
    assert len(masters) == sum(
        name not in SCORE_HEAD for _, model, _ in whole.trained() for name in model.layouts
    )
    directory = save(whole, whole.checkpoints(tmp_path), 1)
    resumed.checkpoints(tmp_path).load(directory, resumed.trained(), {})
    assert_equal(resumed.state(), saved)
    wanted = step(whole)
    assert all(np.isfinite(wanted[name]).all() and (wanted[name] != saved[name]).any() for name in masters)
    assert_equal(step(resumed), wanted)


def test_older_checkpoints_go_when_a_newer_one_is_whole(training: Training, tmp_path: Path) -> None:
    checkpoints = training.checkpoints(tmp_path, 2)
    for iteration in (1, 2, 3, 10):
        save(training, checkpoints, iteration)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iteration_000003", "iteration_000010"]


def test_keep_0_keeps_all(training: Training, tmp_path: Path) -> None:
    checkpoints = training.checkpoints(tmp_path, 0)
    for iteration in (1, 2, 3):
        save(training, checkpoints, iteration)
    assert len(list(tmp_path.iterdir())) == 3


def test_only_names_of_our_own_form_are_checkpoints(training: Training, tmp_path: Path) -> None:
    checkpoints = training.checkpoints(tmp_path, 1)
    save(training, checkpoints, 3)
    foreign = (
        "iteration_3",
        "iteration_0000009",
        "iteration_" + 19 * "9",
        "iteration_00000\N{BENGALI DIGIT FIVE}",
    )
    for name in (*foreign, "iteration_99999999999"):
        (tmp_path / name).mkdir()
    assert checkpoint_numbers(tmp_path, "iteration") == [99999999999, 3]
    (tmp_path / "iteration_99999999999").rmdir()
    save(training, checkpoints, 4)
    assert {path.name for path in tmp_path.iterdir()} == {*foreign, "iteration_000004"}


def test_a_checkpoint_moved_behind_a_link_is_read_replaced_and_pruned_as_a_link(
    training: Training, tmp_path: Path
) -> None:
    save_dir, disk = tmp_path / "save", tmp_path / "disk"
    checkpoints = training.checkpoints(save_dir, 2)
    for iteration in (1, 2):
        moved = save(training, checkpoints, iteration).rename(
            disk.mkdir(exist_ok=True) or disk / f"{iteration}"
        )
        (save_dir / f"iteration_{iteration:06d}").symlink_to(moved)
    chosen = newest_whole(save_dir, EXCHANGE, "iteration")
    assert chosen is not None
    resumed = training.checkpoints(save_dir, 2)
    assert resumed.load(chosen, training.trained(), {}) == 2
    assert resumed.has_own
    assert not save(training, resumed, 2).is_symlink()
    save(training, resumed, 3)
    assert sorted(path.name for path in save_dir.iterdir()) == ["iteration_000002", "iteration_000003"]
    assert [find_faults(disk / name, EXCHANGE) for name in ("1", "2")] == [[], []], "as they were moved"


def test_what_cannot_be_pruned_is_a_warning(
    training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = training.checkpoints(tmp_path, 1)
    save(training, checkpoints, 1)

    def busy(path: Path) -> None:
        if path.name == ".iteration_000001.tmp":
            raise OSError(16, "Device or resource busy")

    monkeypatch.setattr("mindrlhf.trainer.checkpoints.remove", busy)
    assert save(training, checkpoints, 2) == tmp_path / "iteration_000002"
    assert ".iteration_000001.tmp cannot be removed (Device or resource busy)" in caplog.text


# Each step of a save, and whether the new checkpoint is there when the process ends in it.
STEPS = {
    "random": ("mindrlhf.trainer.checkpoints.generator_states", False),
    "write_manifest": ("mindrlhf.trainer.checkpoints.write_manifest", False),
    "sync": ("mindrlhf.trainer.checkpoints.sync_to_disk", False),
    "remove_old": ("mindrlhf.trainer.checkpoints.checkpoint_numbers", True),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_half_written_checkpoint_is_never_taken(
    training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    checkpoints = training.checkpoints(tmp_path, 1)
    save(training, checkpoints, 1)

    def killed(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt  # not caught anywhere, as a kill

    name, is_there = STEPS[step]
    with monkeypatch.context() as patch:
        patch.setattr(name, killed)
        with pytest.raises(KeyboardInterrupt):
            save(training, checkpoints, 2)
    assert (tmp_path / "iteration_000001").exists(), "the older one must stay"
    newest = newest_whole(tmp_path, EXCHANGE, "iteration")
    assert newest == tmp_path / f"iteration_{2 if is_there else 1:06d}"
    if not is_there:
        (left,) = tmp_path.glob(".iteration_*")
        assert find_faults(left, EXCHANGE) != [] or step == "sync", "all is written before the last sync"
        (left / "policy" / "rank_9").mkdir(parents=True)
    # The next save is not disturbed by what was left, and the same iteration may be saved again.
    assert not (save(training, checkpoints, 2) / "policy" / "rank_9").exists()
    save(training, checkpoints, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iteration_000002"]


def test_a_full_disk_leaves_the_older_checkpoint_and_nothing_else(
    training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = training.checkpoints(tmp_path, 1)
    whole = save(training, checkpoints, 1)

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    for name in (
        "mindrlhf.checkpoint.weight_files.encode_ckpt",
        "mindrlhf.trainer.checkpoints.write_manifest",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(name, full)
            with pytest.raises(CheckpointError, match=r"cannot write .*No space left on device"):
                save(training, checkpoints, 2)
        assert list(tmp_path.iterdir()) == [whole]
    assert checkpoints.find(1) == whole
    assert checkpoints.find(2) is None


def test_when_another_rank_cannot_write_this_one_stops_too(training: Training, tmp_path: Path) -> None:
    class Exchange(HostExchange):
        """The second of two ranks says that it has failed, as soon as it is asked."""

        def every_rank(self, array: np.ndarray) -> np.ndarray:
            return np.stack([array, np.ones_like(array)])

    checkpoints = training.checkpoints(tmp_path)
    checkpoints.exchange = Exchange(Runtime(0, 1))
    with pytest.raises(CheckpointError, match=r"rank 1 cannot write .*its log says why"):
        save(training, checkpoints, 1)
    assert list(tmp_path.iterdir()) == []


def test_random_generators_go_on_where_they_were(training: Training, tmp_path: Path) -> None:
    """A reward function may draw from them; nothing of ours does."""
    random.seed(1)
    np.random.seed(2)
    random.gauss(0, 1)
    np.random.standard_normal(3)  # leaves half a pair in each generator
    directory = save(training, training.checkpoints(tmp_path), 1)
    drawn = [random.gauss(0, 1), random.random(), *np.random.standard_normal(3), np.random.randint(1 << 30)]
    training.checkpoints(tmp_path).load(directory, training.trained(), {})
    again = [random.gauss(0, 1), random.random(), *np.random.standard_normal(3), np.random.randint(1 << 30)]
    assert again == drawn


def test_newer_checkpoints_are_set_aside_not_lost(training: Training, tmp_path: Path) -> None:
    checkpoints = training.checkpoints(tmp_path, 0)
    for iteration in (1, 2, 3):
        save(training, checkpoints, iteration)
    checkpoints.set_newer_aside(1)
    names = ["iteration_000001", "left_iteration_000002", "left_iteration_000003"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert find_faults(tmp_path / "left_iteration_000003", EXCHANGE) == []
    assert newest_whole(tmp_path, EXCHANGE, "iteration") == tmp_path / "iteration_000001"
    save(training, checkpoints, 2)
    checkpoints.set_newer_aside(1)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "left_2_iteration_000002"])


def test_a_checkpoint_of_another_model_is_refused_and_says_so(training: Training, tmp_path: Path) -> None:
    directory = save(training, training.checkpoints(tmp_path, 1), 1)
    (file,) = (directory / "critic" / "rank_0").iterdir()
    file.write_bytes((directory / "policy" / "rank_0" / file.name).read_bytes())
    with pytest.raises(CheckpointError, match=r"score_head\.weight"):
        training.checkpoints(tmp_path, 1).load(directory, training.trained(), {})


def test_a_directory_that_is_none_is_refused(training: Training, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"state\.json"):
        training.checkpoints(tmp_path, 1).load(tmp_path, training.trained(), {})


def test_moments_lie_beside_the_weights_they_belong_to(training: Training, tmp_path: Path) -> None:
    from mindrlhf.checkpoint.weight_files import open_weights

    directory = save(training, training.checkpoints(tmp_path, 1), 1)
    (file,) = (directory / "policy_optimizer" / "rank_0").iterdir()
    with open_weights(file) as source:
        names = set(source.tensors)
    weights = set(training.models.train.layouts)
    assert names >= {f"adam_m.{name}" for name in weights} | {f"adam_v.{name}" for name in weights}
    assert "global_step" in names
    assert not names & weights
    state = read_state(directory)
    assert (state["step"], state["parts"]) == (1, {})


def test_parts_that_a_checkpoint_does_not_know_start_anew_and_that_is_said(
    training: Training, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = save(training, training.checkpoints(tmp_path, 1), 3, old=Note("kept"))
    parts = {"old": Note(), "new": Note("fresh")}
    training.checkpoints(tmp_path, 1).load(directory, training.trained(), parts)
    assert (parts["old"].text, parts["new"].text) == ("kept", "fresh")
    assert "no state of new" in caplog.text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"iteration": 3}', "format None, but this version of MindRLHF resumes format 2 only"),
        ('{"format": 2, "step": 1}', "damaged"),
        ('{"format": 2, "step": "x", "layouts": {}, "fixed": {}, "parts": {}}', "damaged"),
        ('{"format": 2, "step": 1, "layouts": {"policy": {}}, "fixed": {}, "parts": {}}', "damaged"),
        ("[]", "damaged"),
        ("{", "damaged"),
    ],
)
def test_a_state_of_another_version_or_a_damaged_one_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"state\.json: {says}"):
        read_state(tmp_path)
