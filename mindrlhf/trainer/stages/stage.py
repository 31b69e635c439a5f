"""What SFT and reward modelling share: the arrays a network takes, and what makes a stage a stage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import numpy as np
from mindspore import nn

from mindrlhf.algorithms.masks import attention_mask, position_ids
from mindrlhf.data.sequences import Sequences
from mindrlhf.models.qwen2.networks import SequenceModel
from mindrlhf.parallel.layout import Mesh
from mindrlhf.runtime.host_exchange import HostExchange, local_rows
from mindrlhf.trainer.experience import SequenceInputs
from mindrlhf.trainer.stages.records import Curves

Forward = Callable[..., np.ndarray]


class Stage(ABC):
    """A model, its loss, and what is measured of it.

    Attributes:
        model: what is trained.
        loss: cell over ``model`` that returns (loss, statistics (k,)); divided by the GLOBAL count of a step.
        curves: six pairs of metric and title for the picture.
        shown: pairs of metric and title for the log; those a line lacks are left out.
    """

    model: SequenceModel
    loss: nn.Cell
    curves: Curves
    shown: Curves

    @abstractmethod
    def count(self, rows: np.ndarray) -> int:
        """What the loss of these rows is a mean over: tokens or pairs."""

    @abstractmethod
    def tokens(self, rows: np.ndarray) -> int:
        """Real tokens that a forward pass over these rows goes through."""

    @abstractmethod
    def inputs(self, rows: np.ndarray, inverse_count: np.ndarray) -> tuple[np.ndarray, ...]:
        """Arguments of the loss for some rows of the data set; ``inverse_count`` (1,) is 1 / global count."""

    @abstractmethod
    def train_metrics(self, sums: np.ndarray, count: int) -> dict[str, float]:
        """Metrics of a step from its statistics, summed over all ranks, and its count."""

    @abstractmethod
    def evaluate(self, rows: np.ndarray) -> dict[str, float]:
        """Metrics on held-out rows; collective, equal on every rank."""

    def summary(self, metrics: Mapping[str, float]) -> str:
        """The few numbers a person watches, in one line."""
        return "  ".join(f"{title} {metrics[name]:.4f}" for name, title in self.shown if name in metrics)


def network_inputs(sequences: Sequences, prompt_columns: int) -> SequenceInputs:
    """Masks and positions of sequences, from their lengths alone (checklist 3)."""
    response_columns = sequences.tokens.shape[1] - prompt_columns
    valid = attention_mask(
        sequences.prompt_lengths, sequences.response_lengths, prompt_columns, response_columns
    )
    # Pads behind a text as long as the model's positions reach would have the next position.
    positions = np.where(valid, position_ids(valid), 0).astype(np.int32)
    return SequenceInputs(sequences.tokens, valid.astype(np.int32), positions)


def over_rows(
    forward: Forward,
    arrays: tuple[np.ndarray, ...],
    mesh: Mesh,
    exchange: HostExchange,
    *,
    rows_per_pass: int,
) -> np.ndarray:
    """One number a row, for any number of rows; each replica works on its part, every rank gets all.

    Passes are all of one size, so that one graph serves them: the last ones are filled with rows anew.

    Args:
        forward: ``rows_per_pass`` rows of every array -> (rows_per_pass,) numbers.
        arrays: (n, ...) each, n at least 1.
        mesh: of the model behind ``forward``.
        exchange: gathers the replicas' numbers.
        rows_per_pass: rows of one call on a rank.

    Returns:
        (n,) float32.
    """
    count = len(arrays[0])
    unit = mesh.dp * rows_per_pass
    order = np.arange(-(-count // unit) * unit) % count
    mine = order[local_rows(len(order), mesh, exchange.runtime.rank)]
    parts = []
    for first in range(0, len(mine), rows_per_pass):
        rows = mine[first : first + rows_per_pass]
        parts.append(forward(*(array[rows] for array in arrays)))
    return exchange.gather_rows({"x": np.concatenate(parts).astype(np.float32)}, mesh)["x"][:count]
