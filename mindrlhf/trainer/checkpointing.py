"""Checkpoints of a whole training state: ``iteration_NNNNNN/`` with one file per rank and model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from mindspore import Parameter, Tensor
from mindspore.nn import Optimizer

from mindrlhf.checkpoint.load import load_shard
from mindrlhf.checkpoint.save import save_shard
from mindrlhf.models.train import SequenceModel
from mindrlhf.parallel.layout import Layout
from mindrlhf.trainer.builder import PPOModels
from mindrlhf.trainer.runtime import HostExchange
from mindrlhf.trainer.start import check_writable
from mindrlhf.trainer.update import PPOUpdate
from mindrlhf.utils.errors import CheckpointError
from mindrlhf.utils.files import atomic_file
from mindrlhf.utils.logging import get_logger

STATE_FILE = "state.json"

logger = get_logger(__name__)


class Stateful(Protocol):
    """What is neither weight nor moment and must go on where it stood: a cursor, a controller."""

    def state_dict(self) -> Mapping[str, Any]:
        """What a checkpoint must keep, as plain numbers and texts."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from :meth:`state_dict`."""
        ...


def load_states(parts: Mapping[str, Stateful], state: Mapping[str, Any], directory: Path) -> None:
    """Gives each part its own of a checkpoint's ``state``; one that has none there starts anew."""
    for name, part in parts.items():
        if name in state:
            part.load_state_dict(state[name])
        else:
            logger.warning("%s has no state of %s, which starts anew", directory, name)


class TrainingCheckpoints:
    """Saves and loads the training state of one rank below a directory that all ranks share.

    A checkpoint is ``policy/``, ``policy_optimizer/`` and, with a separate critic, ``critic/`` and
    ``critic_optimizer/``, each with ``rank_0/ rank_1/ ...``, and ``state.json``. It is written under a
    temporary name and renamed when every rank has finished, so a directory with the final name is whole.

    Args:
        directory: where checkpoints go; made when missing.
        rank: this worker.
        keep: how many checkpoints stay; older ones are removed after a newer one is whole.

    Raises:
        CheckpointError: the directory cannot be written.
    """

    def __init__(self, directory: Path, rank: int, keep: int) -> None:
        self.directory = directory
        self.rank = rank
        self.keep = keep
        check_writable(directory, rank)

    def save(
        self,
        iteration: int,
        models: PPOModels,
        update: PPOUpdate,
        state: Mapping[str, Any],
        exchange: HostExchange,
    ) -> Path:
        """Writes this rank's part and makes the checkpoint appear; collective. Returns its directory."""
        final = self.directory / f"iteration_{iteration:06d}"
        temporary = self.directory / f".{final.name}.tmp"
        if self.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        exchange.barrier()
        for name, model, optimizer in _trained(models, update):
            save_shard(temporary / name, self.rank, dict(model.shards()))
            save_shard(temporary / f"{name}_optimizer", self.rank, dict(_optimizer_arrays(optimizer, model)))
        exchange.barrier()
        if self.rank == 0:
            with atomic_file(temporary / STATE_FILE) as file:
                file.write_text(json.dumps(dict(state), indent=1), encoding="utf-8")
            replaced = final.with_name(f".{final.name}.old")
            shutil.rmtree(replaced, ignore_errors=True)
            if final.exists():
                final.rename(replaced)
            temporary.rename(final)
            shutil.rmtree(replaced, ignore_errors=True)
            self._remove_old(keep_always=final)
        exchange.barrier()
        return final

    def load(self, directory: Path, models: PPOModels, update: PPOUpdate) -> dict[str, Any]:
        """Fills this rank's models and optimizers from a checkpoint and returns its ``state``.

        Raises:
            CheckpointError: the directory is no checkpoint, or one of other models or layouts.
        """
        state_file = directory / STATE_FILE
        if not state_file.is_file():
            raise CheckpointError(
                f"{directory}: no {STATE_FILE}, so this is no whole checkpoint; "
                "name an iteration_NNNNNN directory"
            )
        try:
            state: dict[str, Any] = json.loads(state_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(
                f"{state_file}: damaged ({error}); resume from another checkpoint"
            ) from error
        for name, model, optimizer in _trained(models, update):
            model.load(load_shard(directory / name, model.layouts, self.rank))
            _load_optimizer(directory / f"{name}_optimizer", optimizer, model, self.rank)
        return state

    def _remove_old(self, keep_always: Path) -> None:
        checkpoints = sorted(self.directory.glob("iteration_[0-9]*"))
        for old in checkpoints[: -self.keep] if self.keep else []:
            if old != keep_always:
                shutil.rmtree(old)


def _trained(models: PPOModels, update: PPOUpdate) -> list[tuple[str, SequenceModel, Optimizer]]:
    """What changes in training: name, model and optimizer of the policy and of a separate critic."""
    trained: list[tuple[str, SequenceModel, Optimizer]] = [
        ("policy", models.train, update.policy_step.optimizer)
    ]
    if models.critic is not None and update.critic_step is not None:
        trained.append(("critic", models.critic, update.critic_step.optimizer))
    return trained


def _optimizer_states(optimizer: Optimizer, model: SequenceModel) -> dict[str, Parameter]:
    """Moments and step count by name; what the optimizer shares with the model is left out."""
    own = model.parameters_dict().keys()
    return {
        parameter.name: parameter for parameter in optimizer.get_parameters() if parameter.name not in own
    }


def _optimizer_arrays(optimizer: Optimizer, model: SequenceModel) -> dict[str, np.ndarray]:
    return {name: parameter.asnumpy() for name, parameter in _optimizer_states(optimizer, model).items()}


def _load_optimizer(directory: Path, optimizer: Optimizer, model: SequenceModel, rank: int) -> None:
    states = _optimizer_states(optimizer, model)
    layouts = {name: _state_layout(name, parameter, model) for name, parameter in states.items()}
    for name, array in load_shard(directory, layouts, rank).items():
        states[name].set_data(Tensor(array).astype(states[name].dtype))


def _state_layout(name: str, parameter: Parameter, model: SequenceModel) -> Layout:
    """The layout of a moment is its parameter's; the step count is whole on every rank."""
    for own, layout in model.layouts.items():
        if name.endswith("." + own):
            return layout
    return Layout(model.groups.mesh, tuple(parameter.shape), (None,) * len(parameter.shape))
