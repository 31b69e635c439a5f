"""What networks compute from the decoder's hidden states: log-probs, values, scores; and the way back.

A head picks rows of the hidden states, takes the last norm of them, and computes its outputs from these. The
logits exist for a chunk of the rows at a time, forward and backward: of all arrays, (tokens, vocabulary)
would be the largest.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mindrlhf.configs.keys import ModelConfig
from mindrlhf.kernels.fused_layers import layer_kernels
from mindrlhf.models.chunks import chunk_rows
from mindrlhf.models.dtypes import ms_dtype
from mindrlhf.models.families import family_of
from mindrlhf.models.pieces import Gradients, Piece, Weights
from mindrlhf.models.score_head import SCORE_HEAD
from mindrlhf.parallel.collectives import CopyToGroup, WholeRows
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.tensor_parallel import RowsProduct, VocabParallelLogProbs


class SelectRows(nn.Cell):
    """The last norm of some rows of the decoder's hidden states."""

    def __init__(self, config: ModelConfig, groups: Groups) -> None:
        super().__init__()
        self.whole_rows = WholeRows(groups)
        self.norm = family_of(config).decoder.RMSNorm(config)

    def construct(self, x: Tensor, rows: Tensor, norm: Tensor) -> Tensor:
        """``x`` (B * T, H), or this rank's rows of it, row numbers (n,) int32, each once -> (n, H)."""
        return self.norm(ops.gather(self.whole_rows(x), rows, 0), norm)


class Logits(nn.Cell):
    """This rank's logits, before any temperature."""

    def __init__(self, config: ModelConfig, groups: Groups) -> None:
        super().__init__()
        self.copy_to_group = CopyToGroup(groups.mp_group)
        self.product = RowsProduct(ms_dtype(config.compute_dtype), config.matmul_dtype)

    def construct(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """``hidden`` (n, H), ``weight`` (V / mp, H) -> (n, V / mp)."""
        return self.product(self.copy_to_group(hidden), weight)


class LogProbs(nn.Cell):
    """Log-probs of tokens, and entropies, from normed hidden states."""

    def __init__(self, config: ModelConfig, groups: Groups, **settings: Any) -> None:
        super().__init__()
        self.logits = Logits(config, groups)
        self.log_probs = VocabParallelLogProbs(config.vocab_size, groups, **settings)

    def construct(self, hidden: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """``hidden`` (n, H), ``targets`` (n,) int32, ``weight`` (V / mp, H) -> twice (n,) float32."""
        return self.log_probs(self.logits(hidden, weight), targets)


class LogProbsGradient(nn.Cell):
    """The gradients of ``hidden`` and ``weight`` of :class:`LogProbs`; see :class:`Piece`."""

    def __init__(self, cell: LogProbs) -> None:
        super().__init__()
        self.logits, self.log_probs = cell.logits, cell.log_probs
        self.of_product = ops.GradOperation(get_all=True, sens_param=True)

    def construct(
        self,
        dout: tuple[Tensor, ...],
        kept: tuple[Tensor, ...],
        hidden: Tensor,
        targets: Tensor,
        weight: Tensor,
    ) -> tuple[Tensor, ...]:
        """Nothing is kept: the logits are computed anew."""
        d_logits = self.log_probs.gradient(self.logits(hidden, weight), targets, dout[0], dout[1])
        return self.of_product(self.logits)(hidden, weight, d_logits)


class ScoreHead(nn.Cell):
    """One number per row, ``w . h + b``, without an activation.

    Every rank of a model-parallel group holds the whole head, and its hidden states are whole too, so
    there is nothing to communicate. Kept and computed in float32: it is small and its output is a target.
    """

    def __init__(self) -> None:
        super().__init__()
        self.product = RowsProduct(ms.float32)

    def construct(self, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """``hidden`` (n, H), ``weight`` (1, H), ``bias`` (1,) -> (n,) float32."""
        return (self.product(hidden, weight) + bias).reshape((-1,))


class Rows(NamedTuple):
    """Which rows of the hidden states a head looks at, and what for.

    Attributes:
        numbers: (n,) int32, of (B * T).
        targets: (n,) int32 tokens whose log-probs are wanted, ``None`` for none.
        shape: of the outputs, n numbers in all.
    """

    numbers: np.ndarray
    targets: np.ndarray | None
    shape: tuple[int, ...]


def response_rows(tokens: np.ndarray, prompt_length: int) -> Rows:
    """For ``tokens`` (B, T): columns P-1 .. T-2, which predict the tokens after them, the targets."""
    batch, length = tokens.shape
    columns = np.arange(prompt_length - 1, length - 1)
    numbers = np.arange(batch)[:, None] * length + columns
    targets = tokens[:, prompt_length:]
    return Rows(numbers.reshape(-1).astype(np.int32), targets.reshape(-1), targets.shape)


def last_rows(tokens: np.ndarray, prompt_length: int, response_lengths: np.ndarray) -> Rows:
    """The last real token of each row; ``response_lengths`` (B,) int32, at least 1."""
    batch, length = tokens.shape
    numbers = np.arange(batch) * length + prompt_length + response_lengths - 1
    return Rows(numbers.astype(np.int32), None, (batch,))


class HeadTape(NamedTuple):
    """What a head keeps for its backward pass."""

    rows: Rows
    numbers: Tensor
    x: Tensor
    hidden: Tensor


class _Pieces(NamedTuple):
    select: Piece
    score: Piece


@functools.lru_cache(maxsize=8)
def _pieces(config: ModelConfig, groups: Groups, kernels: Path | None) -> _Pieces:
    """Models that agree in these share compiled graphs."""
    return _Pieces(
        Piece(SelectRows(config, groups), inputs=1, constants=1), Piece(ScoreHead(), inputs=1, constants=0)
    )


class Head(ABC):
    """From hidden states to the outputs of a network, and back.

    Args:
        config: model sizes.
        groups: this rank's groups.
        parameters: of the model.
    """

    def __init__(self, config: ModelConfig, groups: Groups, parameters: Mapping[str, Parameter]) -> None:
        self._pieces = _pieces(config, groups, layer_kernels(ms.float32))
        self._norm = Weights(parameters, [family_of(config).layouts.FINAL_NORM])

    def forward(self, x: Tensor, rows: Rows) -> tuple[tuple[Tensor, ...], HeadTape]:
        """Outputs of the shape of ``rows``, float32, and what :meth:`backward` needs.

        Args:
            x: a decoder's result.
            rows: of its B * T rows.
        """
        numbers = Tensor(rows.numbers)
        hidden = self._pieces.select(x, numbers, *self._norm.tensors)
        outputs = self._outputs(hidden, rows)
        return tuple(output.reshape(rows.shape) for output in outputs), HeadTape(rows, numbers, x, hidden)

    def backward(self, tape: HeadTape, d_outputs: Sequence[Tensor], gradients: Gradients) -> Tensor:
        """Adds the gradients of the weights to their sums; returns that of ``x``.

        Args:
            tape: of :meth:`forward`.
            d_outputs: gradients of its outputs.
            gradients: the sums.
        """
        flat = [dout.reshape((-1,)) for dout in d_outputs]
        d_hidden = self._d_hidden(tape.hidden, tape.rows, flat, gradients)
        dx = self._pieces.select.backward((d_hidden,), (tape.x, tape.numbers), self._norm, gradients)
        assert dx is not None
        return dx

    @abstractmethod
    def _outputs(self, hidden: Tensor, rows: Rows) -> tuple[Tensor, ...]:
        """Normed hidden states (n, H) -> outputs (n,)."""

    @abstractmethod
    def _d_hidden(
        self, hidden: Tensor, rows: Rows, d_outputs: Sequence[Tensor], gradients: Gradients
    ) -> Tensor:
        """The gradient of the normed hidden states, (n, H)."""


class ScalarHead(Head):
    """One number per row: values, or scores."""

    def __init__(self, config: ModelConfig, groups: Groups, parameters: Mapping[str, Parameter]) -> None:
        super().__init__(config, groups, parameters)
        self._weights = Weights(parameters, SCORE_HEAD)

    def _outputs(self, hidden: Tensor, rows: Rows) -> tuple[Tensor, ...]:
        return (self._pieces.score(hidden, *self._weights.tensors),)

    def _d_hidden(
        self, hidden: Tensor, rows: Rows, d_outputs: Sequence[Tensor], gradients: Gradients
    ) -> Tensor:
        d_hidden = self._pieces.score.backward(d_outputs, (hidden,), self._weights, gradients)
        assert d_hidden is not None
        return d_hidden


class LanguageHead(Head):
    """Log-probs and entropies of tokens, chunk by chunk, and values when there is a scalar head, too.

    Args:
        config: model sizes.
        groups: this rank's groups.
        parameters: of the model.
        settings: of :class:`VocabParallelLogProbs`.
    """

    def __init__(
        self, config: ModelConfig, groups: Groups, parameters: Mapping[str, Parameter], **settings: Any
    ) -> None:
        super().__init__(config, groups, parameters)
        layouts = family_of(config).layouts
        table = layouts.EMBEDDING if config.tie_word_embeddings else layouts.LM_HEAD
        self._table = Weights(parameters, [table])
        self._vocabulary: int = parameters[table].shape[0]  # this rank's rows of it
        log_probs = LogProbs(config, groups, **settings)
        self._log_probs = Piece(log_probs, inputs=1, constants=1, gradient=LogProbsGradient(log_probs))
        self._values = (
            ScalarHead(config, groups, parameters) if parameters.keys() >= set(SCORE_HEAD) else None
        )

    def _outputs(self, hidden: Tensor, rows: Rows) -> tuple[Tensor, ...]:
        table = self._table.tensors
        chunks = [self._log_probs(*args, *table) for args in self._chunks(hidden, rows)]
        outputs = tuple(_joined(parts) for parts in zip(*chunks, strict=True))
        return outputs if self._values is None else outputs + self._values._outputs(hidden, rows)

    def _d_hidden(
        self, hidden: Tensor, rows: Rows, d_outputs: Sequence[Tensor], gradients: Gradients
    ) -> Tensor:
        parts, first = [], 0
        for args in self._chunks(hidden, rows):
            end = first + args[0].shape[0]
            douts = [dout[first:end] for dout in d_outputs[:2]]
            parts.append(self._log_probs.backward(douts, args, self._table, gradients))
            first = end
        d_hidden = _joined(parts)
        if self._values is not None:
            d_hidden = d_hidden + self._values._d_hidden(hidden, rows, d_outputs[2:], gradients)
        return d_hidden

    def _chunks(self, hidden: Tensor, rows: Rows) -> Iterator[tuple[Tensor, ...]]:
        """Arguments of the piece, for as many rows at a time as LOGITS_BYTES allows, evenly."""
        assert rows.targets is not None
        count = len(rows.numbers)
        size = chunk_rows(count, self._vocabulary)
        for first in range(0, count, size):
            part = hidden if size >= count else hidden[first : first + size]
            yield part, Tensor(rows.targets[first : first + size])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else ops.concat(list(parts))
