"""Canonical parameters <-> the fused storage of the generation network.

Every fused parameter is a permutation of the numbers of one or more canonical ones, so the conversion
is exact to the bit in both directions. Loading writes into the existing parameters, so compiled graphs stay
valid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from mindspore import Parameter, Tensor

from mindrlhf.configs.keys import ModelConfig
from mindrlhf.models.device_memory import ParameterStore
from mindrlhf.models.generator import Shards
from mindrlhf.models.qwen2.generator_layers import LocalSizes
from mindrlhf.models.qwen2.generator_network import FusedDecoder, FusedLayer
from mindrlhf.models.qwen2.layouts import EMBEDDING, FINAL_NORM, LM_HEAD, layer_prefix
from mindrlhf.parallel.layout import Layout
from mindrlhf.utils.errors import CheckpointError


@dataclass(frozen=True)
class _Fused:
    """A stored parameter, the canonical names it holds, and the conversion in both directions."""

    parameter: Parameter
    names: tuple[str, ...]
    fuse: Callable[[Sequence[np.ndarray], np.ndarray], object]  # parts -> into the stored array
    split: Callable[[np.ndarray], Sequence[np.ndarray]]


class FusedWeights:
    """Loads and returns this rank's canonical shards of a :class:`FusedDecoder`.

    Args:
        decoder: the network that owns the parameters.
        config: model sizes.
        layouts: canonical name -> layout of every parameter.

    Attributes:
        store: the fused parameters by the first of their canonical names, wherever they are.
    """

    def __init__(self, decoder: FusedDecoder, config: ModelConfig, layouts: Mapping[str, Layout]) -> None:
        self._shapes = {name: layout.local_shape for name, layout in layouts.items()}
        fused_parameters = list(_fused_parameters(decoder, config))
        self._holder = {name: fused for fused in fused_parameters for name in fused.names}
        self.store = ParameterStore({fused.names[0]: fused.parameter for fused in fused_parameters})

    def load(self, shards: Shards) -> None:
        """Overwrites all parameters in place.

        Args:
            shards: canonical name -> this rank's array, or pairs of them one after another (then no more
                than the parts of one fused parameter are held at a time, if they come in model order).

        Raises:
            CheckpointError: names are missing, unknown, repeated or have the wrong shape; lists them all.
                With a mapping, nothing has been written by then.
        """
        if isinstance(shards, Mapping):
            faults = self._faults({name: tuple(array.shape) for name, array in shards.items()})
            if faults:
                raise _load_error(faults)
        seen: dict[str, tuple[int, ...]] = {}
        repeated: list[str] = []
        waiting: dict[str, np.ndarray] = {}
        for name, array in shards.items() if isinstance(shards, Mapping) else shards:
            if name in seen:
                repeated.append(f"{name}: given more than once")
            seen[name] = tuple(array.shape)
            if self._shapes.get(name) != seen[name]:
                continue
            waiting[name] = _numpy(array)
            holder = self._holder[name]
            if all(part in waiting for part in holder.names):
                parts = [waiting.pop(part) for part in holder.names]
                self.store.change(holder.names[0], partial(holder.fuse, parts))
        faults = self._faults(seen) + repeated
        if faults:
            raise _load_error(faults)

    def shards(self) -> Iterator[tuple[str, np.ndarray]]:
        """This rank's canonical shards in model order, in the type they are stored in."""
        waiting: dict[str, np.ndarray] = {}
        for name in self._shapes:
            if name not in waiting:
                holder = self._holder[name]
                parts = holder.split(self.store.array(holder.names[0]))
                waiting.update(zip(holder.names, parts, strict=True))
            yield name, np.ascontiguousarray(waiting.pop(name))

    def _faults(self, given: Mapping[str, tuple[int, ...]]) -> list[str]:
        missing = [f"{name}: missing" for name in self._shapes if name not in given]
        extra = [f"{name}: not a parameter of this model" for name in given if name not in self._shapes]
        misshaped = [
            f"{name}: shape {shape}, this rank holds {self._shapes[name]}"
            for name, shape in given.items()
            if name in self._shapes and shape != self._shapes[name]
        ]
        return missing + extra + misshaped


def _fused_parameters(decoder: FusedDecoder, config: ModelConfig) -> Iterator[_Fused]:
    yield _single(decoder.embedding.weight, EMBEDDING)
    for index, layer in enumerate(decoder.layers):
        yield from _layer_parameters(layer, decoder.sizes, config, layer_prefix(index))
    yield _single(decoder.norm.weight, FINAL_NORM)
    if not decoder.tied:
        yield _single(decoder.head, LM_HEAD)


def _layer_parameters(
    layer: FusedLayer, sizes: LocalSizes, config: ModelConfig, prefix: str
) -> Iterator[_Fused]:
    attention, feed_forward = prefix + "attention.", prefix + "feed_forward."
    yield _single(layer.attention_norm.weight, prefix + "attention_norm.weight")
    yield _projection(layer.qkv.weight, attention, "weight", sizes)
    if config.qkv_has_bias:
        yield _projection(layer.qkv.bias, attention, "bias", sizes)
    yield _single(layer.out.weight, attention + "wo.weight")
    yield _single(layer.ffn_norm.weight, prefix + "ffn_norm.weight")
    yield _Fused(
        layer.gate_up.weight,
        (feed_forward + "w1.weight", feed_forward + "w3.weight"),
        lambda parts, stored: np.concatenate(parts, out=stored, casting="unsafe"),
        lambda whole: np.split(whole, 2),
    )
    yield _single(layer.down.weight, feed_forward + "w2.weight")


def _single(parameter: Parameter, name: str) -> _Fused:
    return _Fused(
        parameter,
        (name,),
        lambda parts, stored: np.copyto(stored, parts[0], casting="unsafe"),
        lambda whole: [whole],
    )


def _projection(parameter: Parameter, prefix: str, kind: str, sizes: LocalSizes) -> _Fused:
    """Weights or biases of query, key and value as slots ``[q .. q | k | v]`` per key/value head."""
    counts = (sizes.queries, 1, 1)

    def fuse(parts: Sequence[np.ndarray], stored: np.ndarray) -> None:
        inputs = parts[0].shape[1:]
        slots = [
            part.reshape(sizes.kv_heads, count, sizes.head_dim, *inputs)
            for part, count in zip(parts, counts, strict=True)
        ]
        whole = stored.reshape(sizes.kv_heads, sizes.slots, sizes.head_dim, *inputs)
        np.concatenate(slots, axis=1, out=whole, casting="unsafe")

    def split(whole: np.ndarray) -> Sequence[np.ndarray]:
        inputs = whole.shape[1:]
        slots = whole.reshape(sizes.kv_heads, sizes.slots, sizes.head_dim, *inputs)
        parts = np.split(slots, np.cumsum(counts)[:-1], axis=1)
        return [part.reshape(-1, *inputs) for part in parts]

    names = tuple(f"{prefix}{projection}.{kind}" for projection in ("wq", "wk", "wv"))
    return _Fused(parameter, names, fuse, split)


def _numpy(array: np.ndarray | Tensor) -> np.ndarray:
    return array.asnumpy() if isinstance(array, Tensor) else array


def _load_error(faults: Sequence[str]) -> CheckpointError:
    listing = "".join(f"\n  - {fault}" for fault in faults)
    return CheckpointError(
        f"the generation model cannot take these weights, {len(faults)} fault(s):{listing}\n"
        "Give exactly the shards of its own layout (parameter_layouts of its YAML)."
    )
