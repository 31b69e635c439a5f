"""What one rank holds of a model: local sizes, bytes of each number type, counts of parameters."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from mindrlhf.configs.schema import ModelConfig
from mindrlhf.models.qwen2.layouts import EMBEDDING, SCORE_HEAD, layer_prefix, parameter_layouts
from mindrlhf.parallel.layout import Mesh

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of a number, by its name in a YAML."""


@dataclass(frozen=True, kw_only=True)
class RankSizes:
    """Sizes of one rank's part of a model, and the bytes of the types it computes in.

    Attributes:
        layers: decoder layers.
        hidden: H.
        queries: features of this rank's query heads.
        keys: features of this rank's key heads; the value heads have as many.
        heads: query heads of this rank.
        head_dim: D.
        inner: intermediate features of this rank.
        vocab: vocabulary rows of this rank.
        compute, softmax, rotary, norm, param: bytes of a number in each of the YAML's types.
        flash: whether attention is one kernel, which keeps no scores.
    """

    layers: int
    hidden: int
    queries: int
    keys: int
    heads: int
    head_dim: int
    inner: int
    vocab: int
    compute: int
    softmax: int
    rotary: int
    norm: int
    param: int
    flash: bool


def rank_sizes(config: ModelConfig, mp: int) -> RankSizes:
    """This rank's sizes; ``mp`` must divide heads, key/value heads, intermediate size and vocabulary."""
    return RankSizes(
        layers=config.num_layers,
        hidden=config.hidden_size,
        queries=config.num_heads * config.head_dim // mp,
        keys=config.n_kv_heads * config.head_dim // mp,
        heads=config.num_heads // mp,
        head_dim=config.head_dim,
        inner=config.intermediate_size // mp,
        vocab=config.vocab_size // mp,
        compute=BYTES[config.compute_dtype],
        softmax=BYTES[config.softmax_compute_type],
        rotary=BYTES[config.rotary_dtype],
        norm=BYTES[config.layernorm_compute_type],
        param=BYTES[config.param_init_type],
        flash=config.use_flash_attention,
    )


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of one rank's part of a model.

    Attributes:
        body: all parameters but the scalar head, stored in the YAML's ``param_init_type``.
        head: the scalar head, always float32.
        largest: of the largest parameter.
        layer: of a decoder layer.
        embedding: of the embedding table, which is looked up and not multiplied unless it is tied.
        shapes: how often each shape comes in the body.
        head_shapes: the same of the scalar head.
    """

    body: int
    head: int
    largest: int
    layer: int
    embedding: int
    shapes: Counter[tuple[int, ...]]
    head_shapes: Counter[tuple[int, ...]]

    @property
    def total(self) -> int:
        """All numbers."""
        return self.body + self.head

    def weight_bytes(self, param: int) -> int:
        """Bytes of the weights when the body takes ``param`` bytes a number."""
        return self.body * param + self.head * BYTES["float32"]

    def kinds(self, param: int) -> Counter[tuple[tuple[int, ...], int]]:
        """How often each shape comes with each number of bytes, when the body takes ``param`` a number."""
        body = Counter({(shape, param): count for shape, count in self.shapes.items()})
        return body + Counter({(shape, BYTES["float32"]): n for shape, n in self.head_shapes.items()})


def kinds_bytes(kinds: Counter[tuple[tuple[int, ...], int]]) -> int:
    """Bytes of all tensors that are counted."""
    return sum(prod(shape) * size * count for (shape, size), count in kinds.items())


@lru_cache(maxsize=512)
def count_parameters(config: ModelConfig, mp: int, *, lm_head: bool, score_head: bool) -> ParameterCount:
    """Parameters of one rank, from the layouts that the model itself is built from."""
    layouts = parameter_layouts(config, Mesh(1, mp), lm_head=lm_head, score_head=score_head)
    numbers = {name: prod(layout.local_shape) for name, layout in layouts.items()}
    head = sum(numbers[name] for name in SCORE_HEAD if name in numbers)
    shapes = Counter(layout.local_shape for name, layout in layouts.items() if name not in SCORE_HEAD)
    return ParameterCount(
        body=sum(numbers.values()) - head,
        head=head,
        largest=max(numbers.values()),
        layer=sum(number for name, number in numbers.items() if name.startswith(layer_prefix(0))),
        embedding=numbers[EMBEDDING],
        shapes=shapes,
        head_shapes=Counter(layout.local_shape for name, layout in layouts.items() if name in SCORE_HEAD),
    )
