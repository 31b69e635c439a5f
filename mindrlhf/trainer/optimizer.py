"""AdamW over this rank's shards, in place and one tensor at a time, on a schedule built by MindFormers."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, ops

from mindrlhf.configs.keys import RunConfig
from mindrlhf.configs.optimizer_section import completed_schedule
from mindrlhf.models.device_memory import ParameterStore
from mindrlhf.models.networks import SequenceModel
from mindrlhf.models.pieces import Gradients
from mindrlhf.parallel.partition import Partition, buckets
from mindrlhf.parallel.tensor_parallel import empty_parameter
from mindrlhf.trainer.mindformers_schedules import load_build_lr
from mindrlhf.utils.errors import ConfigError

_Update = Callable[[Parameter, Parameter, Parameter, Tensor, float], None]
"""Steps a weight in place: weight, first and second moment, gradient, weight decay."""
FLOAT32_BYTES = 4
_DEFAULTS: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}  # MindFormers' own


class AdamW:
    """AdamW with bias correction (Loshchilov and Hutter, arXiv 1711.05101), as in torch and MindFormers.

    Norms and biases, which are the one-dimensional parameters, get no weight decay. A tensor's step is done
    before the next one's begins, so that besides the state no array of more than one tensor exists. Weights
    that are stored in fewer bits than float32 are rounded from a float32 copy, the master, which takes the
    steps: those of a small learning rate would be lost in the rounding (arXiv 1710.03740).

    With a partition, each replica has the state of its part of every tensor and steps that part; the weights
    return from all of them (ZeRO-1, arXiv 1910.02054). States that are swapped rest in host memory and come
    to the device for their tensor's step.

    Args:
        config: its ``optimizer`` and ``lr_schedule``.
        weights: what is trained; on the device whenever a step is taken.
        total_steps: optimizer steps of the whole job, used where the schedule says -1.
        partition: how replicas share out the states; ``None``: each has all.

    Attributes:
        state: moments, masters and step count by name, under MindFormers' names.
        is_swapped: whether they rest in host memory (``optimizer.swap``).

    Raises:
        ConfigError: MindFormers does not accept the schedule.
    """

    def __init__(
        self,
        config: RunConfig,
        weights: ParameterStore,
        total_steps: int,
        partition: Partition | None = None,
    ) -> None:
        settings = {**_DEFAULTS, **config.optimizer}
        self._betas: tuple[float, float] = tuple(settings["betas"])
        self._eps, self._decay = float(settings["eps"]), float(settings["weight_decay"])
        self._schedule = _build_schedule(config, total_steps)
        self._weights, self.partition = weights, partition
        self.is_swapped = bool(settings.get("swap"))
        self._step = Parameter(Tensor(np.zeros(1, np.int32)), name="global_step", requires_grad=False)
        self._shapes = {name: tuple(weights[name].shape) for name in weights}
        sizes = {name: FLOAT32_BYTES * prod(shape) for name, shape in self._shapes.items()}
        self._last_of_buckets = {names[-1] for names in buckets(sizes)}
        self._keys: dict[str, list[str]] = {}
        self.state = ParameterStore({"global_step": self._step})
        for name, shape in self._shapes.items():
            kinds = ["adam_m", "adam_v"]
            if weights.parameter(name).dtype != ms.float32:
                kinds.append("master")
            self._keys[name] = [f"{kind}.{name}" for kind in kinds]
            if partition:
                shape = (partition.size(prod(shape)),)
            for key in self._keys[name]:
                self.state.add(
                    empty_parameter(shape, ms.float32, key, trainable=False), on_host=self.is_swapped
                )
        self._kernel = ops.AdamWeightDecay() if ms.get_context("device_target") == "CPU" else None
        self._has_masters = False

    def step(self, gradients: Gradients, scale: float) -> float:
        """One step; returns its learning rate.

        Args:
            gradients: one for each parameter, or this replica's part of it.
            scale: factor of all of them.
        """
        if not self._has_masters:
            self._fill_masters()
        rate = float(self._schedule(Tensor(self._step)).asnumpy().reshape(-1)[0])
        count = int(self._step.asnumpy()[0]) + 1
        update = (self._plain if self._kernel is None else self._fused)(rate, count)
        stepped: dict[str, Tensor] = {}
        for name, keys in self._keys.items():
            self.state.to_device(keys)
            parameter = self._weights.parameter(name)
            first, second, *masters = (self.state.parameter(key) for key in keys)
            weight = masters[0] if masters else parameter
            if self.partition and weight is parameter:
                weight = Parameter(self.partition.take(Tensor(parameter)), requires_grad=False)
            decay = self._decay if parameter.ndim > 1 else 0.0
            update(weight, first, second, gradients[name] * scale, decay)
            if weight is not parameter:
                stepped[name] = ops.cast(Tensor(weight), parameter.dtype)
            if self.is_swapped:
                self.state.to_host(keys)
            if name in self._last_of_buckets:
                self._return(stepped)
        ops.assign(self._step, Tensor(np.array([count], np.int32)))
        return rate

    def arrays(self) -> dict[str, np.ndarray]:
        """The state without a partition, whatever there is: moments in the shapes of their parameters."""
        arrays = {key: self.state.array(key) for key in self.state}
        if self.partition is None:
            return arrays
        return {
            key: array
            if key == "global_step"
            else self.partition.all_gather([Tensor(array)], [self._shape(key)])[0].asnumpy()
            for key, array in arrays.items()
        }

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Takes up a state of :meth:`arrays`, of any partition."""
        for key, array in arrays.items():
            value = Tensor(np.ascontiguousarray(array)).astype(self.state.parameter(key).dtype)
            is_part = self.partition and key != "global_step"
            self.state.set(key, self.partition.take(value) if self.partition and is_part else value)
        self._has_masters = any(key.startswith("master.") for key in arrays)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Those of :meth:`arrays`."""
        return {key: (1,) if key == "global_step" else self._shape(key) for key in self.state}

    def _shape(self, key: str) -> tuple[int, ...]:
        return self._shapes[key.partition(".")[2]]

    def _return(self, stepped: dict[str, Tensor]) -> None:
        """Stores weights that were stepped elsewhere, or parts of them, in their parameters."""
        by_type: dict[Any, list[str]] = defaultdict(list)
        for name, value in stepped.items():
            by_type[value.dtype].append(name)
        for names in by_type.values():
            values = [stepped[name] for name in names]
            if self.partition:
                values = self.partition.all_gather(values, [self._shapes[name] for name in names])
            for name, value in zip(names, values, strict=True):
                self._weights.parameter(name).set_data(value)
        stepped.clear()

    def _fill_masters(self) -> None:
        """Takes the masters from the weights, which have been loaded."""
        for name, keys in self._keys.items():
            for key in keys[2:]:
                value = ops.cast(Tensor(self._weights.parameter(name)), ms.float32)
                self.state.set(key, self.partition.take(value) if self.partition else value)
        self._has_masters = True

    def _fused(self, rate: float, count: int) -> _Update:
        """By one kernel, which does not correct bias: ``w -= lr (m / (sqrt(v) + eps) + decay w)``.

        With ``c = sqrt(1 - beta2^t) / (1 - beta1^t)``, ``lr c`` for its ``lr``, ``eps sqrt(1 - beta2^t)`` for
        its ``eps`` and ``decay / c`` for its ``decay`` it does.
        """
        beta1, beta2 = self._betas
        root = float(np.sqrt(1.0 - beta2**count))
        correction = root / (1.0 - beta1**count)
        scalars = [Tensor(value, ms.float32) for value in (rate * correction, beta1, beta2, self._eps * root)]
        decays = {decay: Tensor(decay / correction, ms.float32) for decay in (0.0, self._decay)}

        def update(
            weight: Parameter, first: Parameter, second: Parameter, gradient: Tensor, decay: float
        ) -> None:
            assert self._kernel is not None
            self._kernel(weight, first, second, *scalars, decays[decay], gradient)

        return update

    def _plain(self, rate: float, count: int) -> _Update:
        """By operators that every device has."""
        beta1, beta2 = self._betas
        first_scale, second_scale = 1.0 / (1.0 - beta1**count), 1.0 / (1.0 - beta2**count)

        def update(
            weight: Parameter, first: Parameter, second: Parameter, gradient: Tensor, decay: float
        ) -> None:
            ops.assign(first, first * beta1 + gradient * (1.0 - beta1))
            ops.assign(second, second * beta2 + gradient * gradient * (1.0 - beta2))
            change = first * first_scale / (ops.sqrt(second * second_scale) + self._eps)
            ops.assign(weight, weight - (change + weight * decay) * rate)

        return update


def build_optimizer(config: RunConfig, model: SequenceModel, total_steps: int) -> AdamW:
    """The optimizer of a model, its state shared out over the replicas where the YAML says so."""
    shares = config.shards_optimizer and model.groups.dp_group is not None
    return AdamW(config, model.store, total_steps, Partition(model.groups) if shares else None)


def _build_schedule(config: RunConfig, total_steps: int) -> Any:
    with _quiet():
        try:
            return load_build_lr()(completed_schedule(config.lr_schedule, total_steps))
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
