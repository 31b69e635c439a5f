"""Memory of the compiled graphs, from the structure of the networks in :mod:`mindrlhf.models`.

Letters: m rows of a pass, T columns, n = m T, R response columns, P prompt columns; sizes are one rank's.
A graph takes memory in two ways. What lives between two operations is returned to a pool that all graphs
share (``activations``). What a kernel keeps lives as long as its graph (``kernels``): on CPU the
index tables of transposes (8 bytes per element), which only generation has, and of broadcasts (16).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from mindrlhf.configs.keys import ModelConfig
from mindrlhf.models.decode_schedule import QUERY_BLOCK, DecodeSchedule
from mindrlhf.models.families import family_of
from mindrlhf.models.score_head import SCORE_HEAD
from mindrlhf.parallel.layout import Mesh
from mindrlhf.utils.sizes import exact_div

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class DeviceTraits:
    """Constants of a kind of device.

    Attributes:
        measured: whether the constants were measured (on this project's machine) or assumed.
        process: bytes of the process, or of the device's runtime, before any model is built.
        training_imports: additional bytes once MindFormers' optimizer is imported.
        transpose_index: bytes per element that a ``Transpose`` kernel keeps, as long as its graph lives.
        broadcast_index: the same for an element-wise kernel that broadcasts.
        first_graph: bytes that compiling anything at all takes: threads, generated code.
        forward_layer, backward_layer, decode_layer: bytes of a compiled layer in a graph of each kind; the
            graphs of an optimizer step count with the backward pass.
        fused_optimizer: whether an AdamW step is one kernel per parameter, which needs no copies.
        host_shared: whether the models live in the memory of the process.
    """

    measured: bool
    process: int
    training_imports: int
    transpose_index: int
    broadcast_index: int
    first_graph: int
    forward_layer: int
    backward_layer: int
    decode_layer: int
    fused_optimizer: bool
    host_shared: bool


CPU = DeviceTraits(
    measured=True,
    process=400 * MIB,
    training_imports=30 * MIB,
    transpose_index=8,
    broadcast_index=16,
    first_graph=50 * MIB,
    forward_layer=7 * MIB,
    backward_layer=25 * MIB,
    decode_layer=2 * MIB,
    fused_optimizer=True,
    host_shared=True,
)
"""Measured with MindSpore 2.9.0: what its CPU kernels keep, by chains of ten operations of one kind; compiled
graphs, by how the heap grows from phase to phase on models of 4, 6 and 8 layers, and by the peak of the quick
start's 30 layers; a decode layer with the operators of :mod:`mindrlhf.kernels`, and 3 MiB more without."""

ASCEND = DeviceTraits(
    measured=False,
    process=2048 * MIB,
    training_imports=0,
    transpose_index=0,
    broadcast_index=0,
    first_graph=0,
    forward_layer=0,
    backward_layer=0,
    decode_layer=0,
    fused_optimizer=False,
    host_shared=False,
)
"""Assumed: 2 GiB for runtime and communication (HCCL takes 2 x 200 MB per group), nothing in kernels."""

HOST_PROCESS = CPU.process + CPU.training_imports
"""Host memory of a worker whose models live on a device, without copies of weights."""


def traits_of(device_target: str) -> DeviceTraits:
    """The constants of ``context.device_target``; those of Ascend stand in for GPU."""
    return CPU if device_target == "CPU" else ASCEND


BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of a number, by its name in a YAML."""
FLOAT32 = BYTES["float32"]


@dataclass(frozen=True, kw_only=True)
class RankSizes:
    """Sizes of one rank's part of a model, and the bytes of the types it computes in.

    Attributes:
        layers: decoder layers.
        hidden: H.
        queries: features of this rank's query heads.
        keys: features of this rank's key heads; the value heads have as many.
        heads: query heads of this rank.
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
    inner: int
    vocab: int
    compute: int
    softmax: int
    rotary: int
    norm: int
    param: int
    flash: bool


@lru_cache(maxsize=512)
def rank_sizes(config: ModelConfig, mp: int) -> RankSizes:
    """This rank's sizes, from the layouts that the model itself is built from.

    Raises:
        ValueError: ``mp`` does not divide heads, key/value heads, intermediate size or vocabulary.
    """
    names = family_of(config).layouts
    shapes = {
        name: layout.local_shape for name, layout in names.parameter_layouts(config, Mesh(1, mp)).items()
    }
    layer = names.layer_prefix(0)
    queries = shapes[f"{layer}attention.wq.weight"][0]
    return RankSizes(
        layers=config.num_layers,
        hidden=config.hidden_size,
        queries=queries,
        keys=shapes[f"{layer}attention.wk.weight"][0],
        heads=exact_div(queries, config.head_dim, "query features by head size"),
        inner=shapes[f"{layer}feed_forward.w1.weight"][0],
        vocab=shapes[names.EMBEDDING][0],
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
        shapes: how often each shape occurs in the body.
        head_shapes: the same for the scalar head.
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
        """Bytes of the weights when the body takes ``param`` bytes per number."""
        return self.body * param + self.head * FLOAT32

    def kinds(self, param: int) -> Counter[tuple[tuple[int, ...], int]]:
        """How often each (shape, bytes per number) occurs, when the body takes ``param`` bytes per number."""
        body = Counter({(shape, param): count for shape, count in self.shapes.items()})
        return body + Counter({(shape, FLOAT32): n for shape, n in self.head_shapes.items()})


def kinds_bytes(kinds: Counter[tuple[tuple[int, ...], int]]) -> int:
    """Bytes of all tensors that are counted."""
    return sum(prod(shape) * size * count for (shape, size), count in kinds.items())


@lru_cache(maxsize=512)
def count_parameters(config: ModelConfig, mp: int, *, lm_head: bool, score_head: bool) -> ParameterCount:
    """Parameters of one rank, from the layouts that the model itself is built from."""
    names = family_of(config).layouts
    layouts = names.parameter_layouts(config, Mesh(1, mp), lm_head=lm_head, score_head=score_head)
    numbers = {name: prod(layout.local_shape) for name, layout in layouts.items()}
    head = [name for name in SCORE_HEAD if name in layouts]
    return ParameterCount(
        body=sum(numbers.values()) - sum(numbers[name] for name in head),
        head=sum(numbers[name] for name in head),
        largest=max(numbers.values()),
        layer=sum(number for name, number in numbers.items() if name.startswith(names.layer_prefix(0))),
        embedding=numbers[names.EMBEDDING],
        shapes=Counter(layout.local_shape for name, layout in layouts.items() if name not in head),
        head_shapes=Counter(layouts[name].local_shape for name in head),
    )


FLASH_STATISTICS = 64
"""Bytes per head and token that flash attention keeps for its gradient: 8 float32 of maximum and of sum."""


@dataclass(frozen=True)
class GraphMemory:
    """Bytes of one compiled graph: what it takes from the pool, what its kernels keep, its code."""

    activations: int
    kernels: int
    compiled: int


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What a pass over whole sequences computes.

    Attributes:
        rows: m.
        columns: T.
        responses: R, whose logits or values are computed.
        logits: whether there is a language-model head.
        values: whether there is a scalar head.
        entropy: whether the entropy is computed.
        entropy_gradient: whether it has a gradient.
        padded_vocab: whether padding of the vocabulary is masked.
        last_token: whether a score is read at the last token alone (reward model).
    """

    rows: int
    columns: int
    responses: int
    logits: bool = False
    values: bool = False
    entropy: bool = False
    entropy_gradient: bool = False
    padded_vocab: bool = False
    last_token: bool = False

    @property
    def tokens(self) -> int:
        """n."""
        return self.rows * self.columns

    @property
    def response_tokens(self) -> int:
        """Tokens whose logits or values are computed."""
        return self.rows * self.responses


def scoring_graph(sizes: RankSizes, work: Pass, device: DeviceTraits) -> GraphMemory:
    """A forward pass: what one layer needs at its widest, or the head, plus what all layers share."""
    widest = work.tokens * max(_attention_forward(sizes, work.columns), _feed_forward(sizes))
    activations = work.tokens * _shared(sizes, work.columns) + max(widest, _head_forward(sizes, work))
    kernels = device.broadcast_index * _broadcast_once(sizes, work)
    return GraphMemory(activations, kernels, device.forward_layer * sizes.layers)


def training_graph(
    sizes: RankSizes, work: Pass, parameters: ParameterCount, device: DeviceTraits
) -> GraphMemory:
    """Forward and backward pass, which adds its gradients to buffers.

    The pool is fullest when the backward pass begins: all layers' activations and the head's gradients. Of
    the parameters' gradients, one layer's and the largest one exist before they are added (measured on CPU).
    """
    layer = work.tokens * _kept_by_layer(sizes, work.columns)
    start = sizes.layers * layer + work.tokens * sizes.hidden * (sizes.norm + sizes.compute)
    start += _weight_copies(sizes, parameters) + (parameters.layer + parameters.largest) * sizes.param
    widest = max(_head_backward(sizes, work), work.tokens * _layer_backward(sizes, work.columns))
    activations = work.tokens * _shared(sizes, work.columns) + start + widest
    kernels = device.broadcast_index * _broadcast_once(sizes, work)
    return GraphMemory(activations, kernels, device.backward_layer * sizes.layers)


def generation_graphs(
    sizes: RankSizes, rows: int, prompt: int, schedule: DecodeSchedule, device: DeviceTraits
) -> GraphMemory:
    """Prefill and decode graph together; the cache is counted by :func:`kv_cache_bytes`."""
    qkv = sizes.queries + 2 * sizes.keys
    tokens, steps, cache_columns = rows * prompt, schedule.steps, schedule.columns
    block = min(QUERY_BLOCK, prompt)
    attention = (5 * qkv + sizes.hidden) * sizes.compute
    scores = 0 if sizes.flash else 3 * sizes.heads * block * prompt * rows * sizes.softmax
    feed_forward = (2 * sizes.hidden + 6 * sizes.inner) * sizes.compute
    prefill = tokens * max(attention, feed_forward) + scores + 2 * tokens * qkv * sizes.compute
    decode = rows * (3 * sizes.heads * cache_columns * sizes.softmax + 4 * sizes.vocab * FLOAT32)
    tables = 2 * cache_columns * qkv * sizes.compute
    transposed = tokens * (qkv + sizes.queries) + steps * rows * (qkv + 2 * sizes.hidden)
    kernels = device.transpose_index * (sizes.layers * transposed + (1 + steps) * rows * sizes.vocab)
    kernels += device.broadcast_index * rows * (prompt * prompt + 2 * steps * cache_columns)
    compiled = device.first_graph + device.decode_layer * sizes.layers * (1 + steps)
    return GraphMemory(max(prefill, decode) + tables, kernels, compiled)


def kv_cache_bytes(sizes: RankSizes, rows: int, columns: int) -> int:
    """Keys and values of all layers: ``2 x layers x rows x columns x key features x bytes``."""
    return 2 * sizes.layers * rows * columns * sizes.keys * sizes.compute


def _broadcast_once(sizes: RankSizes, work: Pass) -> int:
    """Elements that are made by broadcasting."""
    elements = work.columns**2 + work.rows * work.columns**2
    if work.padded_vocab and work.logits:
        elements += work.response_tokens * sizes.vocab
    if work.last_token:
        elements += work.response_tokens * sizes.hidden
    return elements


def _shared(sizes: RankSizes, columns: int) -> int:
    """Bytes per token of what all layers share: the hidden keys; cosines and sines of queries and keys."""
    mask = columns * (1 + sizes.softmax) if sizes.flash else sizes.heads * columns * sizes.softmax
    return mask + 2 * (sizes.queries + sizes.keys) * sizes.rotary


def _attention_forward(sizes: RankSizes, columns: int) -> int:
    """Bytes per token where attention is widest: residual and projections beside scores or rotation."""
    carried = sizes.hidden * sizes.compute + (sizes.queries + 2 * sizes.keys) * sizes.compute
    rotation = 4 * sizes.queries * sizes.rotary + sizes.hidden * sizes.compute
    scores = 0 if sizes.flash else 3 * sizes.heads * columns * sizes.softmax
    return carried + max(rotation, scores, sizes.queries * sizes.compute)


def _feed_forward(sizes: RankSizes) -> int:
    """Bytes per token at the widest point of the feed-forward: residual, norm, gate, up, SwiGLU's steps."""
    return (2 * sizes.hidden + 5 * sizes.inner) * sizes.compute


def _head_forward(sizes: RankSizes, work: Pass) -> int:
    """Bytes of the head: the responses' hidden states; logits, shifted logits, exponentials in float32."""
    total = work.response_tokens * sizes.hidden * sizes.compute
    if work.logits:
        arrays = 4 if work.entropy else 3
        total += work.response_tokens * sizes.vocab * arrays * FLOAT32
    if work.last_token:
        total += 2 * work.response_tokens * sizes.hidden * sizes.compute
    return total


def _kept_by_layer(sizes: RankSizes, columns: int) -> int:
    """Bytes per token that a layer keeps for its gradient.

    Both norms' inputs and outputs (4 H); turned queries, keys, values and the heads' mix, all by head; the
    attention weights; gate, up and their product.
    """
    norms = 2 * sizes.hidden * (sizes.norm + sizes.compute)
    by_head = (2 * sizes.queries + 2 * sizes.keys) * sizes.compute
    if sizes.flash:
        weights = sizes.heads * FLASH_STATISTICS + sizes.queries * sizes.compute
    else:
        # In a type other than the products', the weights are kept in both.
        cast = sizes.compute if sizes.compute != sizes.softmax else 0
        weights = sizes.heads * columns * (sizes.softmax + cast)
    return norms + by_head + weights + 3 * sizes.inner * sizes.compute


def _layer_backward(sizes: RankSizes, columns: int) -> int:
    """Bytes per token at the widest point of a layer's backward pass: scores, or SwiGLU's five arrays."""
    scores = 0 if sizes.flash else sizes.heads * columns * sizes.softmax
    return max(scores, 5 * sizes.inner * sizes.compute) + 2 * sizes.hidden * sizes.compute


def _head_backward(sizes: RankSizes, work: Pass) -> int:
    """Bytes of the head when the backward pass begins: exponentials and the gradients through them."""
    total = work.response_tokens * sizes.hidden * (sizes.compute + FLOAT32 * work.values)
    if work.logits:
        arrays = 6 if work.entropy_gradient else 4
        total += work.response_tokens * sizes.vocab * arrays * FLOAT32
    return total


def _weight_copies(sizes: RankSizes, parameters: ParameterCount) -> int:
    """Weights cast to the compute type, which the backward pass needs again."""
    return 0 if sizes.param == sizes.compute else (parameters.body - parameters.embedding) * sizes.compute
