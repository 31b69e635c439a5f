"""Memory of the compiled graphs, from the structure of the networks in :mod:`mindrlhf.models`.

Letters: m rows of a pass, T columns, n = m T, R response columns, P prompt columns; sizes are one rank's.
A graph takes memory in two ways. What lives between two operations is returned to a pool that all graphs
share (``activations``). What a kernel keeps lives as long as its graph (``kernels``): on CPU the
index tables of broadcasts (16 bytes per element).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

from mindrlhf.configs.keys import ModelConfig
from mindrlhf.models.chunks import blocks, chunk_rows
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
        broadcast_index: bytes per element that an element-wise kernel that broadcasts keeps, as long as its
            graph lives.
        first_graph: bytes that compiling anything at all takes: threads, generated code.
        scoring_graphs, training_graphs: bytes of the compiled pieces of a forward and of a backward pass; one
            set serves all layers.
        decode_layer: bytes of a compiled layer in the decode graph.
        logit_arrays: float32 arrays beside a chunk's logits that log-probs take; their gradients take twice
            all of that.
        host_shared: whether the models live in the memory of the process.
    """

    measured: bool
    process: int
    training_imports: int
    broadcast_index: int
    first_graph: int
    scoring_graphs: int
    training_graphs: int
    decode_layer: int
    logit_arrays: int
    host_shared: bool


CPU = DeviceTraits(
    measured=True,
    process=400 * MIB,
    training_imports=30 * MIB,
    broadcast_index=16,
    first_graph=50 * MIB,
    scoring_graphs=60 * MIB,
    training_graphs=120 * MIB,
    decode_layer=2 * MIB,
    logit_arrays=0,
    host_shared=True,
)
"""Measured with MindSpore 2.9.0: what its CPU kernels keep, by chains of ten operations of one kind; compiled
graphs, by how the heap grows from phase to phase; a decode layer with the operators of
:mod:`mindrlhf.kernels`, and 3 MiB more without."""

ASCEND = DeviceTraits(
    measured=False,
    process=2048 * MIB,
    training_imports=0,
    broadcast_index=0,
    first_graph=0,
    scoring_graphs=0,
    training_graphs=0,
    decode_layer=0,
    logit_arrays=4,
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
        stream: features of the residual stream on this rank, for each token: H, or H / mp with sequence
            parallelism.
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
    stream: int
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
def rank_sizes(config: ModelConfig, mp: int, *, splits_rows: bool = False) -> RankSizes:
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
        stream=exact_div(config.hidden_size, mp, "hidden size by mp") if splits_rows else config.hidden_size,
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
    """

    body: int
    head: int
    largest: int
    layer: int
    embedding: int

    @property
    def total(self) -> int:
        """All numbers."""
        return self.body + self.head

    def weight_bytes(self, param: int) -> int:
        """Bytes of the weights when the body takes ``param`` bytes per number."""
        return self.body * param + self.head * FLOAT32


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
    )


STEP_ARRAYS = 3
"""Arrays of a parameter's size that its optimizer step takes at a time, the scaled gradient among them."""


@dataclass(frozen=True)
class GraphMemory:
    """Bytes of the graphs of a pass: what they take from the pool, what their kernels keep, their code."""

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
        recompute: of the network: layers whose results a backward pass computes anew.
        repeated: whether gradients of an earlier pass are there already.
    """

    rows: int
    columns: int
    responses: int
    logits: bool = False
    recompute: int = 0
    repeated: bool = False

    @property
    def tokens(self) -> int:
        """n."""
        return self.rows * self.columns

    @property
    def response_tokens(self) -> int:
        """Tokens whose logits or values are computed."""
        return self.rows * self.responses


def scoring_graph(
    sizes: RankSizes, work: Pass, parameters: ParameterCount, device: DeviceTraits
) -> GraphMemory:
    """A forward pass: what all layers share, and a block of layers with its results, or the head."""
    largest = _largest_block(sizes, work)
    block = (
        largest * _kept_by_layer(sizes) + sizes.stream * sizes.compute + _widest_forward(sizes, work.columns)
    )
    head = sizes.stream * sizes.compute * work.tokens + _head(sizes, work, device)
    activations = work.tokens * _shared(sizes, work.columns) + max(work.tokens * block, head)
    activations += _widened(sizes, largest, parameters, device)
    return GraphMemory(activations, _broadcast_index(work, device), device.scoring_graphs)


def training_graph(
    sizes: RankSizes, work: Pass, parameters: ParameterCount, device: DeviceTraits
) -> GraphMemory:
    """Forward and backward pass, without the sums of the gradients.

    The pool is fullest when the backward pass begins: all layers' results and the head, or the last block.
    Gradients become the sums, or are added to them, block by block, and the head's chunk by chunk.
    """
    whole = sizes.layers - work.recompute
    inputs = len(blocks(work.recompute))
    kept = whole * _kept_by_layer(sizes) + inputs * sizes.stream * sizes.compute
    recomputed = max(map(len, blocks(work.recompute)), default=0) * _kept_by_layer(sizes)
    block = _widest_backward(sizes, work.columns) + recomputed
    largest = _largest_block(sizes, work)
    of_block = largest * parameters.layer * FLOAT32 if work.repeated else 0
    of_head = sizes.vocab * sizes.hidden * FLOAT32 if work.logits else 0
    last = max(work.tokens * block + of_block, 2 * _head(sizes, work, device) + of_head)
    last += _widened(sizes, largest, parameters, device)
    activations = work.tokens * (_shared(sizes, work.columns) + kept + sizes.stream * sizes.compute) + last
    activations = max(activations, STEP_ARRAYS * parameters.largest * FLOAT32)
    return GraphMemory(activations, _broadcast_index(work, device), device.training_graphs)


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
    kernels = device.broadcast_index * rows * (prompt * prompt + 2 * steps * cache_columns)
    compiled = device.first_graph + device.decode_layer * sizes.layers * (1 + steps)
    return GraphMemory(max(prefill, decode) + tables, kernels, compiled)


def kv_cache_bytes(sizes: RankSizes, rows: int, columns: int) -> int:
    """Keys and values of all layers: ``2 x layers x rows x columns x key features x bytes``."""
    return 2 * sizes.layers * rows * columns * sizes.keys * sizes.compute


def _largest_block(sizes: RankSizes, work: Pass) -> int:
    """Layers of the largest block; those that are recomputed and the others have blocks of their own."""
    return max(map(len, [*blocks(work.recompute), *blocks(sizes.layers - work.recompute)]))


def _widened(sizes: RankSizes, layers: int, parameters: ParameterCount, device: DeviceTraits) -> int:
    """Float32 copies of a block's weights, or the embedding, where CPU stores another type."""
    is_needed = device.host_shared and sizes.param < FLOAT32
    return max(layers * parameters.layer, parameters.embedding) * FLOAT32 if is_needed else 0


def _broadcast_index(work: Pass, device: DeviceTraits) -> int:
    """What the kernels of the masks keep, which are made by broadcasting."""
    return device.broadcast_index * (work.columns**2 + work.rows * work.columns**2)


def _shared(sizes: RankSizes, columns: int) -> int:
    """Bytes per token of what all layers share: the hidden keys; cosines and sines of queries and keys."""
    mask = columns * (1 + sizes.softmax) if sizes.flash else sizes.heads * columns * sizes.softmax
    return mask + 2 * (sizes.queries + sizes.keys) * sizes.rotary


def _kept_by_layer(sizes: RankSizes) -> int:
    """Bytes per token of a layer's results: see :class:`mindrlhf.models.qwen2.decoder.DecoderLayer`.

    Its output and the stream between its halves; query and the mixed values; key and value; gate and up.
    """
    return 2 * (sizes.stream + sizes.queries + sizes.keys + sizes.inner) * sizes.compute


def _widest_forward(sizes: RankSizes, columns: int) -> int:
    """Bytes per token between a layer's results: ordered heads, scores and weights; or norm and SwiGLU."""
    heads = (2 * sizes.queries + 2 * sizes.keys) * sizes.compute
    scores = 0 if sizes.flash else 2 * sizes.heads * columns * sizes.softmax
    return max(heads + scores, (sizes.hidden + sizes.inner) * sizes.compute)


def _widest_backward(sizes: RankSizes, columns: int) -> int:
    """Bytes per token: as forward, and the gradients of all these; three of gate and up's size."""
    heads = 2 * (2 * sizes.queries + 2 * sizes.keys) * sizes.compute
    scores = 0 if sizes.flash else 3 * sizes.heads * columns * sizes.softmax
    return max(heads + scores, 3 * sizes.inner * sizes.compute) + 2 * sizes.hidden * sizes.compute


def _head(sizes: RankSizes, work: Pass, device: DeviceTraits) -> int:
    """Bytes of the head: the rows that it looks at, and a chunk of logits with what is computed from it.

    Where the residual stream is split, all its rows are gathered first.
    """
    total = work.tokens * sizes.hidden * sizes.compute if sizes.stream < sizes.hidden else 0
    total += 2 * work.response_tokens * sizes.hidden * sizes.compute
    if work.logits:
        chunk = chunk_rows(work.response_tokens, sizes.vocab)
        total += chunk * sizes.vocab * (sizes.compute + device.logit_arrays * FLOAT32)
    return total
