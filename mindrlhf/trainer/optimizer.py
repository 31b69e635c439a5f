"""AdamW over this rank's shards, in place and one tensor at a time, on a schedule built by MindFormers."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, ops

from mindrlhf.configs.keys import RunConfig
from mindrlhf.configs.optimizer_section import completed_schedule
from mindrlhf.models.pieces import Gradients
from mindrlhf.parallel.tensor_parallel import empty_parameter
from mindrlhf.trainer.mindformers_builders import load_builders
from mindrlhf.utils.errors import ConfigError

_DEFAULTS: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}  # MindFormers' own


class AdamW:
    """AdamW with bias correction (Loshchilov and Hutter, arXiv 1711.05101), as in torch and MindFormers.

    Norms and biases, which are the one-dimensional parameters, get no weight decay. A tensor's step is done
    before the next one's begins, so that besides the state no array of more than one tensor exists. Weights
    that are stored in fewer bits than float32 are rounded from a float32 copy, the master, which takes the
    steps: those of a small learning rate would be lost in the rounding (arXiv 1710.03740).

    Args:
        config: its ``optimizer`` and ``lr_schedule``.
        parameters: what is trained, by name.
        total_steps: optimizer steps of the whole job, used where the schedule says -1.

    Attributes:
        state: moments, masters and step count by name, under MindFormers' names.

    Raises:
        ConfigError: MindFormers does not accept the schedule.
    """

    def __init__(self, config: RunConfig, parameters: Mapping[str, Parameter], total_steps: int) -> None:
        settings = {**_DEFAULTS, **config.optimizer}
        self._betas: tuple[float, float] = tuple(settings["betas"])
        self._eps, self._decay = float(settings["eps"]), float(settings["weight_decay"])
        self._schedule = _build_schedule(config, total_steps)
        self._parameters = parameters
        self._step = Parameter(Tensor(np.zeros(1, np.int32)), name="global_step", requires_grad=False)
        self.state: dict[str, Parameter] = {"global_step": self._step}
        for name, parameter in parameters.items():
            kinds = ["adam_m", "adam_v"] + (["master"] if parameter.dtype != ms.float32 else [])
            for key in (f"{kind}.{name}" for kind in kinds):
                self.state[key] = empty_parameter(parameter.shape, ms.float32, key, trainable=False)
        self._kernel = ops.AdamWeightDecay() if ms.get_context("device_target") == "CPU" else None
        self._has_masters = False

    def step(self, gradients: Gradients, scale: float) -> float:
        """One step; returns its learning rate.

        Args:
            gradients: one for each parameter.
            scale: factor of all of them.
        """
        if not self._has_masters:
            self.fill_masters()
        rate = float(self._schedule(Tensor(self._step)).asnumpy().reshape(-1)[0])
        count = int(self._step.asnumpy()[0]) + 1
        for name, parameter in self._parameters.items():
            gradient = ops.cast(gradients[name], ms.float32) * scale
            master = self.state.get(f"master.{name}", parameter)
            moments = self.state[f"adam_m.{name}"], self.state[f"adam_v.{name}"]
            decay = self._decay if parameter.ndim > 1 else 0.0
            (self._fused if self._kernel else self._plain)(master, *moments, gradient, rate, decay, count)
            if master is not parameter:
                ops.assign(parameter, ops.cast(master, parameter.dtype))
        ops.assign(self._step, Tensor(np.array([count], np.int32)))
        return rate

    def fill_masters(self) -> None:
        """Takes the masters from the weights, which have been loaded."""
        for name, parameter in self._parameters.items():
            if master := self.state.get(f"master.{name}"):
                ops.assign(master, ops.cast(Tensor(parameter), ms.float32))
        self._has_masters = True

    def _fused(
        self,
        weight: Parameter,
        first: Parameter,
        second: Parameter,
        gradient: Tensor,
        rate: float,
        decay: float,
        count: int,
    ) -> None:
        """By one kernel, which does not correct bias: ``w -= lr (m / (sqrt(v) + eps) + decay w)``.

        With ``c = sqrt(1 - beta2^t) / (1 - beta1^t)``, ``lr c`` for its ``lr``, ``eps sqrt(1 - beta2^t)`` for
        its ``eps`` and ``decay / c`` for its ``decay`` it does.
        """
        beta1, beta2 = self._betas
        root = float(np.sqrt(1.0 - beta2**count))
        correction = root / (1.0 - beta1**count)
        scalars = [Tensor(value, ms.float32) for value in (rate * correction, beta1, beta2, self._eps * root)]
        assert self._kernel is not None
        self._kernel(weight, first, second, *scalars, Tensor(decay / correction, ms.float32), gradient)

    def _plain(
        self,
        weight: Parameter,
        first: Parameter,
        second: Parameter,
        gradient: Tensor,
        rate: float,
        decay: float,
        count: int,
    ) -> None:
        """By operators that every device has."""
        beta1, beta2 = self._betas
        ops.assign(first, first * beta1 + gradient * (1.0 - beta1))
        ops.assign(second, second * beta2 + gradient * gradient * (1.0 - beta2))
        root = ops.sqrt(second * (1.0 / (1.0 - beta2**count))) + self._eps
        change = first * (1.0 / (1.0 - beta1**count)) / root + weight * decay
        ops.assign(weight, weight - change * rate)


def _build_schedule(config: RunConfig, total_steps: int) -> Any:
    with _quiet():
        build_lr, _ = load_builders()
        try:
            return build_lr(completed_schedule(config.lr_schedule, total_steps))
        except (TypeError, ValueError) as error:
            raise ConfigError([f"{config.path}: lr_schedule: {error}"]) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps MindFormers from warning about models that it fails to import and that nobody asked for."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
