"""Where parameters are: in the device's memory, or in the host's while other models are at work.

On CPU the two are one, so nothing is saved there, but everything is done: what has gone to the host cannot be
used by mistake, and :class:`DeviceMemory` counts what a device would hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor

PARTS = ("weights", "moments", "gradients", "kv_cache")


class ParameterStore(Mapping[str, Parameter | np.ndarray]):
    """Parameters by name, each on the device (a ``Parameter``) or in host memory (an array).

    The parameter of an array is empty: a graph that took it would fail, not compute with old values.

    Args:
        parameters: by name.
    """

    def __init__(self, parameters: Mapping[str, Parameter]) -> None:
        self._parameters = dict(parameters)
        self._on_host: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> Parameter | np.ndarray:
        return self._on_host[name] if name in self._on_host else self._parameters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def add(self, parameter: Parameter, *, on_host: bool = False) -> None:
        """Adds a parameter under its name."""
        self._parameters[parameter.name] = parameter
        if on_host:
            self.to_host([parameter.name])

    def parameter(self, name: str) -> Parameter:
        """The parameter, which is empty while its values are in host memory."""
        return self._parameters[name]

    def array(self, name: str) -> np.ndarray:
        """The values of a parameter; in host memory or on CPU the array is its memory, elsewhere a copy."""
        found = self[name]
        return found if isinstance(found, np.ndarray) else found.asnumpy()

    def set(self, name: str, value: Tensor) -> None:
        """Replaces the values of a parameter by others of its shape and type."""
        if name in self._on_host:
            self._on_host[name] = value.asnumpy()
        else:
            self._parameters[name].set_data(value)

    def change(self, name: str, change: Callable[[np.ndarray], object]) -> None:
        """Changes the values of a parameter in place."""
        array = self.array(name)
        change(array)
        if name not in self._on_host and ms.get_context("device_target") != "CPU":
            self._parameters[name].set_data(Tensor(array))

    def to_host(self, names: Iterable[str] | None = None) -> None:
        """Moves parameters, all or some, to host memory, one at a time."""
        for name in self if names is None else names:
            if name not in self._on_host:
                parameter = self._parameters[name]
                self._on_host[name] = parameter.asnumpy()
                empty(parameter)

    def to_device(self, names: Iterable[str] | None = None) -> None:
        """Moves parameters, all or some, to the device, one at a time."""
        for name in self if names is None else names:
            if name in self._on_host:
                value = Tensor.from_numpy(self._on_host.pop(name))
                self._parameters[name].set_data(value, slice_shape=True)

    @property
    def device_bytes(self) -> int:
        """What is on the device."""
        return sum(parameter.nbytes for parameter in self._parameters.values())


def empty(parameter: Parameter) -> None:
    """Frees the memory of a parameter, which keeps its type; graphs that take it stay compiled."""
    parameter.set_data(Tensor(np.zeros(0, np.float32)).astype(parameter.dtype), slice_shape=True)


class DeviceMemory:
    """What the models of one rank hold on its device, and whose turn it is.

    Of the models that are offloaded (``context.memory_offload``) only the one in use is on the device, until
    the next one is used; the others of them are in host memory. It also keeps the account of all models.

    Attributes:
        most: bytes by part (:data:`PARTS`) at the fullest moment that was measured.
    """

    def __init__(self) -> None:
        self._held: list[tuple[str, Callable[[], int]]] = []
        self._offloaded: list[ParameterStore] = []
        self._in_use: ParameterStore | None = None
        self.most: dict[str, int] = dict.fromkeys(PARTS, 0)

    def watch(self, part: str, held: Callable[[], int]) -> None:
        """Adds something to the account.

        Args:
            part: one of :data:`PARTS`.
            held: gives the bytes that it has on the device now.
        """
        self._held.append((part, held))

    def add(self, weights: ParameterStore, *, offloaded: bool) -> None:
        """Adds the weights of a model; those of one that is offloaded go to host memory."""
        self.watch("weights", lambda: weights.device_bytes)
        if offloaded:
            self._offloaded.append(weights)
            weights.to_host()

    def use(self, weights: ParameterStore) -> None:
        """Makes sure that the weights of a model are on the device."""
        if weights is self._in_use or not any(weights is one for one in self._offloaded):
            return
        if self._in_use is not None:
            self._in_use.to_host()
        weights.to_device()
        self._in_use = weights
        self.measure()

    def measure(self) -> dict[str, int]:
        """Bytes by part that are on the device now."""
        now = dict.fromkeys(PARTS, 0)
        for part, held in self._held:
            now[part] += held()
        if sum(now.values()) > sum(self.most.values()):
            self.most = now
        return now
