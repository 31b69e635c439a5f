"""Memory of the compiled graphs, from the structure of the networks in :mod:`mindrlhf.models`.

Letters: m rows of a pass, T columns, n = m T, R response columns, P prompt columns; sizes are one rank's.
A graph takes memory in two ways. What lives between two operations is given back to a pool that all graphs
share (``activations``). What a kernel keeps for itself stays as long as its graph (``kernels``): on CPU the
index tables of transposes (8 bytes an element), which only generation has, and of broadcasts (16).
"""

from __future__ import annotations

from dataclasses import dataclass

from mindrlhf.planning.devices import DeviceTraits
from mindrlhf.planning.sizes import ParameterCount, RankSizes

FLOAT32 = 4
QUERY_BLOCK = 512
"""Prompt columns that go through attention at a time when generating (models/qwen2/generator_network.py)."""

FLASH_STATISTICS = 64
"""Bytes a head and token that flash attention keeps for its gradient: 8 float32 of maximum and of sum."""


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
        responses: R, whose logits or values are wanted.
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
    """A forward pass: what one layer needs at its widest, or the head, beside what all layers share."""
    widest = work.tokens * max(_attention_forward(sizes, work.columns), _feed_forward(sizes))
    activations = work.tokens * _shared(sizes, work.columns) + max(widest, _head_forward(sizes, work))
    kernels = device.broadcast_index * _broadcast_once(sizes, work)
    return GraphMemory(activations, kernels, device.forward_layer * sizes.layers)


def training_graph(
    sizes: RankSizes, work: Pass, parameters: ParameterCount, device: DeviceTraits
) -> GraphMemory:
    """Forward and backward pass, which adds its gradients to buffers.

    The pool is fullest when the backward pass begins: all layers' activations and the head's gradients. Of
    the parameters' gradients a layer's and the largest one are there before they are added (measured on CPU).
    """
    layer = work.tokens * _kept_by_layer(sizes, work.columns)
    start = sizes.layers * layer + work.tokens * sizes.hidden * (sizes.norm + sizes.compute)
    start += _weight_copies(sizes, parameters) + (parameters.layer + parameters.largest) * sizes.param
    widest = max(_head_backward(sizes, work), work.tokens * _layer_backward(sizes, work.columns))
    activations = work.tokens * _shared(sizes, work.columns) + start + widest
    kernels = device.broadcast_index * _broadcast_once(sizes, work)
    return GraphMemory(activations, kernels, device.backward_layer * sizes.layers)


def generation_graphs(
    sizes: RankSizes, rows: int, prompt: int, response: int, steps: int, device: DeviceTraits
) -> GraphMemory:
    """Prefill and decode graph together; the cache is counted by :func:`kv_cache_bytes`."""
    qkv = sizes.queries + 2 * sizes.keys
    tokens, cache_columns = rows * prompt, cached_columns(prompt, response, steps)
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


def cached_columns(prompt: int, response: int, steps: int) -> int:
    """Columns of the key/value cache: the prompt and whole calls of the decode graph."""
    calls = -(-(response - 1) // steps)
    return prompt + calls * steps


def kv_cache_bytes(sizes: RankSizes, rows: int, columns: int) -> int:
    """Keys and values of all layers: ``2 x layers x rows x columns x key features x bytes``."""
    return 2 * sizes.layers * rows * columns * sizes.keys * sizes.compute


def decode_steps(response: int, steps_per_call: int) -> int:
    """Steps in one decode graph (models/qwen2/generator.py)."""
    return max(1, min(steps_per_call, response - 1))


def _broadcast_once(sizes: RankSizes, work: Pass) -> int:
    """Elements that are made by broadcasting."""
    elements = work.columns**2 + work.rows * work.columns**2
    if work.padded_vocab and work.logits:
        elements += work.response_tokens * sizes.vocab
    if work.last_token:
        elements += work.response_tokens * sizes.hidden
    return elements


def _shared(sizes: RankSizes, columns: int) -> int:
    """Bytes a token of what all layers share: the hidden keys; cosines and sines of queries and keys."""
    mask = columns * (1 + sizes.softmax) if sizes.flash else sizes.heads * columns * sizes.softmax
    return mask + 2 * (sizes.queries + sizes.keys) * sizes.rotary


def _attention_forward(sizes: RankSizes, columns: int) -> int:
    """Bytes a token at the widest point of attention: residual and projections beside scores or rotation."""
    carried = sizes.hidden * sizes.compute + (sizes.queries + 2 * sizes.keys) * sizes.compute
    rotation = 4 * sizes.queries * sizes.rotary + sizes.hidden * sizes.compute
    scores = 0 if sizes.flash else 3 * sizes.heads * columns * sizes.softmax
    return carried + max(rotation, scores, sizes.queries * sizes.compute)


def _feed_forward(sizes: RankSizes) -> int:
    """Bytes a token at the widest point of the feed-forward: residual, norm, gate, up, SwiGLU's steps."""
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
    """Bytes a token that a layer keeps for its gradient.

    Both norms' inputs and outputs (4 H); turned queries, keys, values and the heads' mix, all by head; the
    attention weights; gate, up and their product.
    """
    norms = 2 * sizes.hidden * (sizes.norm + sizes.compute)
    by_head = (2 * sizes.queries + 2 * sizes.keys) * sizes.compute
    if sizes.flash:
        weights = sizes.heads * FLASH_STATISTICS + sizes.queries * sizes.compute
    else:
        # In another type than the products', the weights are kept in both.
        cast = sizes.compute if sizes.compute != sizes.softmax else 0
        weights = sizes.heads * columns * (sizes.softmax + cast)
    return norms + by_head + weights + 3 * sizes.inner * sizes.compute


def _layer_backward(sizes: RankSizes, columns: int) -> int:
    """Bytes a token at the widest point of a layer's backward pass: scores, or SwiGLU's five arrays."""
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
