"""Optimizer and learning-rate schedule of a YAML, built by MindFormers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mindspore import Parameter
from mindspore.nn import Optimizer

from mindrlhf.configs.optimizer import with_total_steps
from mindrlhf.configs.schema import RunConfig
from mindrlhf.utils.errors import ConfigError


def build_optimizer(config: RunConfig, parameters: Sequence[Parameter], total_steps: int) -> Optimizer:
    """The YAML's ``optimizer`` driven by its ``lr_schedule``, over this rank's shards.

    Norms and biases, which are the one-dimensional parameters, get no weight decay (checklist 17).

    Args:
        config: the YAML; both sections are handed to MindFormers as they stand.
        parameters: what is trained.
        total_steps: optimizer steps of the whole job, used where the schedule says -1.

    Raises:
        ConfigError: MindFormers does not accept a section.
    """
    with _quiet():
        # Imported here: it costs seconds and writes a log folder, see LOCAL_DEFAULT_PATH in job.py.
        from mindformers.core.lr import build_lr
        from mindformers.core.optim import build_optim

        return _build(config, parameters, total_steps, build_lr, build_optim)


def _build(
    config: RunConfig,
    parameters: Sequence[Parameter],
    total_steps: int,
    build_lr: Callable[..., Any],
    build_optim: Callable[..., Optimizer],
) -> Optimizer:
    try:
        schedule = build_lr(with_total_steps(config.lr_schedule, total_steps))
    except (TypeError, ValueError) as error:
        raise ConfigError([f"{config.path}: lr_schedule: {error}"]) from error
    optimizer = dict(config.optimizer)
    optimizer.pop("learning_rate", None)  # the schedule has it
    decay = float(optimizer.get("weight_decay", 0.0))
    groups = [
        {"params": [p for p in parameters if len(p.shape) > 1], "weight_decay": decay},
        {"params": [p for p in parameters if len(p.shape) == 1], "weight_decay": 0.0},
        {"order_params": list(parameters)},
    ]
    try:
        return build_optim(optimizer, default_args={"params": groups, "learning_rate": schedule})
    except (TypeError, ValueError) as error:
        raise ConfigError([f"{config.path}: optimizer: {error}"]) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps MindFormers from warning about models that it fails to import and that nobody asked for."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
