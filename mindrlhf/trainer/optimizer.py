"""Optimizer and learning-rate schedule of a YAML, built by MindFormers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.nn import Optimizer

from mindrlhf.configs.keys import RunConfig
from mindrlhf.configs.optimizer_section import completed_schedule
from mindrlhf.trainer.mindformers_builders import load_builders
from mindrlhf.utils.errors import ConfigError


def build_optimizer(config: RunConfig, parameters: Sequence[Parameter], total_steps: int) -> Optimizer:
    """The YAML's ``optimizer`` driven by its ``lr_schedule``, over this rank's shards.

    Norms and biases, which are the one-dimensional parameters, get no weight decay.

    Args:
        config: the YAML; both sections are passed to MindFormers unchanged.
        parameters: what is trained.
        total_steps: optimizer steps of the whole job, used where the schedule says -1.

    Raises:
        ConfigError: MindFormers does not accept a section.
    """
    with _quiet():
        return _build(config, parameters, total_steps, *load_builders())


def _build(
    config: RunConfig,
    parameters: Sequence[Parameter],
    total_steps: int,
    build_lr: Callable[..., Any],
    build_optim: Callable[..., Optimizer],
) -> Optimizer:
    try:
        schedule = build_lr(completed_schedule(config.lr_schedule, total_steps))
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


class FusedAdamW(nn.Cell):
    """A step of MindFormers' ``AdamW`` by one kernel per parameter, on its own state and schedule.

    The kernel of ``ops.AdamWeightDecay`` does not correct bias, ``w -= lr (m / (sqrt(v) + eps) + decay w)``;
    with ``c = sqrt(1 - beta2^t) / (1 - beta1^t)``, ``lr c`` for its ``lr``, ``eps sqrt(1 - beta2^t)`` for its
    ``eps`` and ``decay / c`` for its ``decay`` it is AdamW (Loshchilov and Hutter, arXiv 1711.05101), bias
    corrected.

    Args:
        optimizer: a MindFormers ``AdamW`` for which :meth:`fits` holds; its state stays where it is.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(auto_prefix=False)
        self.optimizer = optimizer
        self.beta1 = float(optimizer.beta1.asnumpy()[0])
        self.beta2 = float(optimizer.beta2.asnumpy()[0])
        self.eps = float(optimizer.eps.asnumpy()[0])
        self.parameters_in_order = optimizer.parameters
        self.first_moments = optimizer.exp_avg
        self.second_moments = optimizer.exp_avg_sq
        self.kernel = ops.AdamWeightDecay()
        self.map = ops.HyperMap()

    @staticmethod
    def fits(optimizer: Optimizer) -> bool:
        """Whether it is an ``AdamW`` over float32 parameters, on CPU, with one learning rate."""
        return (
            ms.get_context("device_target") == "CPU"
            and type(optimizer).__name__ == "AdamW"
            and hasattr(optimizer, "exp_avg_sq")
            and not optimizer.is_group_lr
            and all(parameter.dtype == ms.float32 for parameter in optimizer.parameters)
        )

    def construct(self, gradients: tuple[Tensor, ...], scale: Tensor) -> Tensor:
        """One gradient per parameter, and the factor () for all -> a value that depends on the whole step."""
        decays = self.optimizer.get_weight_decay()
        rate = self.optimizer.get_lr()
        step = ops.assign_add(self.optimizer.global_step, self.optimizer.global_step_increase_tensor)
        step = ops.cast(step, ms.float32)
        root = ops.sqrt(1.0 - ops.pow(self.beta2, step))
        correction = (root / (1.0 - ops.pow(self.beta1, step))).reshape(())
        fused_rate = rate.reshape(()) * correction
        fused_eps = (self.eps * root).reshape(())
        step_one = ops.partial(self._step_one, fused_rate, fused_eps, correction, scale)
        state = (self.parameters_in_order, self.first_moments, self.second_moments, gradients)
        if self.optimizer.is_group:
            done = self.map(step_one, decays, *state)
        else:
            done = self.map(ops.partial(step_one, decays), *state)
        return ops.depend(fused_rate, done)

    def _step_one(
        self,
        rate: Tensor,
        eps: Tensor,
        correction: Tensor,
        scale: Tensor,
        decay: float | Tensor,
        parameter: Parameter,
        first_moment: Parameter,
        second_moment: Parameter,
        gradient: Tensor,
    ) -> Tensor:
        """One parameter's step; scalars are as the kernel takes them, except ``decay``; ``scale`` clips."""
        return self.kernel(
            parameter,
            first_moment,
            second_moment,
            rate,
            self.beta1,
            self.beta2,
            eps,
            decay / correction,
            gradient * scale,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps MindFormers from warning about models that it fails to import and that nobody asked for."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
