"""Forward and backward passes of the decoder, layer by layer; one for all families of models."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import mindspore as ms
from mindspore import Parameter, Tensor, nn

from mindrlhf.configs.keys import ModelConfig
from mindrlhf.kernels.fused_layers import layer_kernels
from mindrlhf.models.chunks import blocks
from mindrlhf.models.dtypes import ms_dtype
from mindrlhf.models.families import family_of
from mindrlhf.models.pieces import Gradients, Piece, Recomputed, Weights
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layout import Layout
from mindrlhf.parallel.tensor_parallel import VocabParallelEmbedding


@dataclass
class DecoderTape:
    """What a forward pass keeps for its backward pass.

    Attributes:
        tokens: (B, T).
        shared: what all layers take besides their input and weights.
        blocks: the input of each block of layers, and the results that its gradient takes, none if they are
            computed anew.
    """

    tokens: Tensor
    shared: tuple[Tensor, ...]
    blocks: list[tuple[Tensor, tuple[Tensor, ...]]] = field(default_factory=list)


class Block(nn.Cell):
    """Some decoder layers, one after the other.

    Args:
        layer: ``construct(x, *shared, *weights)`` -> the result, and what its gradient takes.
        layers: how many.
        weights: of one layer.
    """

    def __init__(self, layer: nn.Cell, layers: int, weights: int) -> None:
        super().__init__()
        self.layer, self.layers, self.weights = layer, layers, weights

    def construct(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """``rest`` are the shared inputs and the weights of each layer -> the result, then what is kept.

        Kept are the results of each layer, but for the last one's first.
        """
        first = len(rest) - self.layers * self.weights
        kept = ()
        for index in range(self.layers):
            start = first + index * self.weights
            results = self.layer(x, *rest[:first], *rest[start : start + self.weights])
            x = results[0]
            kept += results[1:] if index == self.layers - 1 else results
        return x, *kept


class BlockGradient(nn.Cell):
    """The gradients of a :class:`Block`, layer by layer.

    Args:
        block: whose gradients.
        gradient: of a layer: ``construct(dout, kept, x, *shared, *weights)``, where ``kept`` are all results
            of the layer but the first -> the gradients of ``x`` and of the weights.
    """

    def __init__(self, block: Block, gradient: nn.Cell) -> None:
        super().__init__()
        self.layers, self.weights, self.gradient = block.layers, block.weights, gradient

    def construct(
        self, dout: Tensor, kept: tuple[Tensor, ...], x: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        """See :class:`mindrlhf.models.pieces.Piece`."""
        first = len(rest) - self.layers * self.weights
        results = (len(kept) + 1) // self.layers
        of_weights = ()
        for back in range(self.layers):
            index = self.layers - 1 - back
            # Layer ``index`` has ``results`` entries, its own result first; the last layer's is missing.
            start, end = index * results + (1 if back else 0), (index + 1) * results - (0 if back else 1)
            before = kept[(index - 1) * results] if index else x
            of_layer = first + index * self.weights
            weights = rest[of_layer : of_layer + self.weights]
            found = self.gradient(dout, kept[start:end], before, *rest[:first], *weights)
            dout = found[0]
            of_weights = found[1:] + of_weights
        return dout, *of_weights


class _BlockPieces(NamedTuple):
    kept: Piece
    recomputed: Piece


# Models that agree in the arguments share compiled graphs; the last is in the key only.


@functools.lru_cache(maxsize=16)
def _block_pieces(
    config: ModelConfig, groups: Groups, layers: int, weights: int, kernels: Path | None
) -> _BlockPieces:
    family = family_of(config).decoder
    layer = family.DecoderLayer(config, groups)
    block = Block(layer, layers, weights)
    gradient = BlockGradient(block, family.DecoderLayerGradient(layer))
    return _BlockPieces(
        *(
            Piece(block, inputs=1, constants=0, gradient=one)
            for one in (gradient, Recomputed(block, gradient))
        )
    )


class _FirstPieces(NamedTuple):
    embedding: Piece
    shared_inputs: Piece


@functools.lru_cache(maxsize=8)
def _first_pieces(config: ModelConfig, groups: Groups, kernels: Path | None) -> _FirstPieces:
    shared_inputs = family_of(config).decoder.SharedInputs(config, groups)
    embedding = VocabParallelEmbedding(config.vocab_size, groups, ms_dtype(config.compute_dtype))
    return _FirstPieces(Piece(embedding, inputs=0, constants=1), Piece(shared_inputs, inputs=0, constants=2))


class _LayerRun(NamedTuple):
    """Layers that go through one graph.

    Attributes:
        pieces: with the gradient from what is kept, and from what is computed anew.
        weights: of all of them.
        recompute: which of the two is used.
    """

    pieces: _BlockPieces
    weights: Weights
    recompute: bool


class Decoder:
    """Token ids to the last layer's hidden states, and back.

    Args:
        config: model sizes and types; ``config.seq_length`` bounds the positions.
        groups: this rank's groups.
        layouts: canonical name -> layout, in model order.
        parameters: this rank's shards, by name.
        recompute: in this many of the layers, from the first on, the backward pass computes results anew
            that would otherwise be kept.

    Attributes:
        row_parts: what B * T must divide by: ranks that split the rows.
    """

    def __init__(
        self,
        config: ModelConfig,
        groups: Groups,
        layouts: Mapping[str, Layout],
        parameters: Mapping[str, Parameter],
        recompute: int = 0,
    ) -> None:
        names = family_of(config).layouts
        kernels = layer_kernels(ms.float32)
        self._first = _first_pieces(config, groups, kernels)
        self.row_parts = groups.mesh.mp if groups.splits_rows else 1
        self._embedding = Weights(parameters, [names.EMBEDDING])
        self._blocks = []
        for start, end in ((0, recompute), (recompute, config.num_layers)):
            for layers in blocks(end - start):
                prefixes = [names.layer_prefix(start + layer) for layer in layers]
                of_layers = [name for prefix in prefixes for name in layouts if name.startswith(prefix)]
                size = len(of_layers) // len(layers)
                pieces = _block_pieces(config, groups, len(layers), size, kernels)
                self._blocks.append(_LayerRun(pieces, Weights(parameters, of_layers), start < recompute))

    def forward(
        self, tokens: Tensor, valid: Tensor, position_ids: Tensor, *, keep: bool = False
    ) -> tuple[Tensor, DecoderTape | None]:
        """Hidden states before the last norm.

        Args:
            tokens: (B, T) int32 ids.
            valid: (B, T) int32, 1 on real tokens, 0 on padding (from lengths, never from ids).
            position_ids: (B, T) int32, 0 at a row's first real token.
            keep: whether a backward pass will follow.

        Returns:
            (B * T, H), or this rank's rows of it, in the compute type; values at pads are finite and
            meaningless. The tape if it is kept.
        """
        shared = self._first.shared_inputs(valid, position_ids)
        x = self._first.embedding(tokens, *self._embedding.tensors)
        tape = DecoderTape(tokens, shared) if keep else None
        for pieces, weights, recompute in self._blocks:
            out, *kept = pieces.kept(x, *shared, *weights.tensors)
            if tape is not None:
                tape.blocks.append((x, () if recompute else tuple(kept)))
            x = out
        return x, tape

    def backward(self, tape: DecoderTape, dx: Tensor, gradients: Gradients) -> None:
        """Adds the gradients of all weights to their sums; the tape is used up.

        Args:
            tape: of :meth:`forward`.
            dx: gradient of its result.
            gradients: the sums.
        """
        for pieces, weights, recompute in reversed(self._blocks):
            x, kept = tape.blocks.pop()
            piece = pieces.recomputed if recompute else pieces.kept
            dx = piece.backward((dx,), (x, *tape.shared), weights, gradients, kept)
        self._first.embedding.backward((dx,), (tape.tokens,), self._embedding, gradients)
