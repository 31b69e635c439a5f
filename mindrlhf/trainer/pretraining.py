"""PPO-ptx: the pre-training loss that InstructGPT adds to the policy's, and the texts it is computed on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mindspore import Tensor, nn, ops

from mindrlhf.algorithms.losses import cross_entropy_sum
from mindrlhf.algorithms.masks import position_ids
from mindrlhf.configs.keys import JobConfig
from mindrlhf.data.columns import LOSS_MASK, PRETRAIN_IDS, check_columns, check_tokens
from mindrlhf.data.mindrecord import read_rows
from mindrlhf.data.stream import RowStream
from mindrlhf.models.heads import LanguageHead, Rows
from mindrlhf.models.networks import Network, PPOModelTrain
from mindrlhf.models.score_head import SCORE_HEAD
from mindrlhf.trainer.builder import valid_vocab_size
from mindrlhf.trainer.experience import SequenceInputs
from mindrlhf.trainer.train_step import MicroBatch, Objective
from mindrlhf.utils.errors import DataError

FEWEST_COLUMNS = 16
_CHECKED_AT_START = 64
_REMEDY = "give --ptx_dataset_dir a file of rlhf_data.py with responses, or set ptx_coef=0"


class PretrainBatch(NamedTuple):
    """Texts to be learned, one row per text; column t predicts the token at t + 1."""

    inputs: SequenceInputs  # (B, S)
    targets: np.ndarray  # (B, S) int32
    mask: np.ndarray  # (B, S) float32, 1 where the target is to be learned

    def rows(self, rows: slice) -> PretrainBatch:
        """The given rows of every field."""
        return PretrainBatch(self.inputs.rows(rows), self.targets[rows], self.mask[rows])


class PretrainStream:
    """Draws batches of texts without end, each epoch in a fresh order; every rank draws the same.

    A batch has as many columns as the next power of two above its longest text, so that few graphs are
    compiled and short texts cost little; columns after a text's last target change nothing.

    Args:
        path: MindRecord file with ``pretrain_ids`` and ``loss_mask`` (S,), see :mod:`mindrlhf.data.columns`.
        batch_size: B, texts of a global batch.
        max_length: most columns of the network, the model's ``seq_length``; longer texts are cut.
        vocab_size: every token must be below it.
        seed: of the orders.

    Raises:
        DataError: the file is missing, damaged or of another schema; a row has no target (the first
            rows are checked here, the others when they are drawn) or was made by another tokenizer.
    """

    def __init__(
        self, path: str | Path, *, batch_size: int, max_length: int, vocab_size: int, seed: int
    ) -> None:
        self._path = Path(path)
        self._batch_size = batch_size
        self._max_length = max_length
        self._vocab_size = vocab_size
        _, rows = check_columns(self._path, (PRETRAIN_IDS, LOSS_MASK))
        self._order = RowStream(rows, purpose="pretraining", seed=seed, source=path)
        self._batch(np.arange(min(rows, _CHECKED_AT_START)))

    def next_batch(self) -> PretrainBatch:
        """The next B texts.

        Raises:
            DataError: a row is invalid; the message names it.
        """
        return self._batch(self._order.draw(self._batch_size))

    def state_dict(self) -> Mapping[str, Any]:
        """The place in the data."""
        return self._order.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from :meth:`state_dict`.

        Raises:
            DataError: the state is of another data set or seed.
        """
        self._order.load_state_dict(state)

    def _batch(self, numbers: np.ndarray) -> PretrainBatch:
        rows = read_rows(self._path, numbers, (PRETRAIN_IDS, LOSS_MASK))
        lengths = [self._check_row(int(i), row) for i, row in zip(numbers, rows, strict=True)]
        longest = max(lengths)
        columns = min(max(1 << (longest - 1).bit_length(), FEWEST_COLUMNS), self._max_length)
        tokens = np.zeros((len(rows), columns), np.int32)
        targets, mask = np.zeros_like(tokens), np.zeros(tokens.shape, np.float32)
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            tokens[i, :length] = row[PRETRAIN_IDS][:length]
            targets[i, :length] = row[PRETRAIN_IDS][1 : length + 1]
            mask[i, :length] = row[LOSS_MASK][1 : length + 1]
        valid = (np.arange(columns) < np.array(lengths)[:, None]).astype(np.int32)
        return PretrainBatch(SequenceInputs(tokens, valid, position_ids(valid)), targets, mask)

    def _check_row(self, number: int, row: Mapping[str, np.ndarray]) -> int:
        """Columns that a row needs: those up to the one that predicts its last target."""
        ids, mask = row[PRETRAIN_IDS][: self._max_length + 1], row[LOSS_MASK][: self._max_length + 1]
        learned = np.flatnonzero(mask)
        if row[LOSS_MASK].shape != row[PRETRAIN_IDS].shape or not np.isin(mask, (0, 1)).all():
            raise DataError(f"{self._path}: row {number}: loss_mask must be 0 or 1 for each token; {_REMEDY}")
        if not learned.size or not learned[-1]:
            raise DataError(
                f"{self._path}: row {number}: no token to pre-train on among the first {len(ids)} "
                f"(ptx_coef is not 0); {_REMEDY}"
            )
        try:
            check_tokens(ids[: learned[-1] + 1], ids[:0], 0, self._vocab_size)
        except ValueError as error:
            raise DataError(f"{self._path}: row {number}: {error}") from error
        return int(learned[-1])


def open_pretraining(path: Path, job: JobConfig) -> PretrainStream | None:
    """The texts of a job, one per prompt of a minibatch in each optimizer step; ``None`` without ptx."""
    if not job.ppo.ptx_coef:
        return None
    return PretrainStream(
        path,
        batch_size=job.ppo.minibatch_size,
        max_length=job.train.model.seq_length,
        vocab_size=valid_vocab_size(job),
        seed=job.ppo.seed,
    )


class TextModel(Network):
    """The policy on texts: log-probs (B, T) of a target for each token, at temperature 1.

    The rollout's temperature belongs to sampling; a text is not a sample. It takes the targets, (B, T) int32,
    besides sequences.
    """

    def __init__(self, policy: PPOModelTrain) -> None:
        parameters = {name: one for name, one in policy.parameters.items() if name not in SCORE_HEAD}
        settings = {"valid_vocab_size": policy.valid_vocab_size, "with_entropy": False}
        super().__init__(policy.decoder, LanguageHead(policy.config, policy.groups, parameters, **settings))
        self._policy = policy

    def to_device(self) -> None:
        """The policy's weights."""
        self._policy.to_device()

    def rows(self, tokens: np.ndarray, *extra: np.ndarray) -> Rows:
        """All columns."""
        return Rows(np.arange(tokens.size, dtype=np.int32), extra[0].reshape(-1), tokens.shape)


class PretrainLoss(nn.Cell):
    """``ptx_coef`` times the mean cross-entropy of a text's tokens."""

    def __init__(self, ptx_coef: float) -> None:
        super().__init__(auto_prefix=False)
        self.statistics = ("cross_entropy",)
        self.ptx_coef = ptx_coef

    def construct(
        self, logprobs: Tensor, entropy: Tensor, mask: Tensor, inverse_count: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One micro-batch.

        Args:
            logprobs, entropy: (B, T) of a :class:`TextModel`.
            mask: (B, T) float32, where a target is to be learned.
            inverse_count: (1,) 1 / global targets.

        Returns:
            the loss, and (1,) the sum of the cross-entropy.
        """
        total = cross_entropy_sum(logprobs, mask)
        return (self.ptx_coef * total * inverse_count).sum(), ops.stop_gradient(total.reshape((1,)))


def pretraining_objective(policy: PPOModelTrain, ptx_coef: float) -> Objective:
    """The loss that is mixed in."""
    return Objective(TextModel(policy), PretrainLoss(ptx_coef))


def pretrain_batches(batch: PretrainBatch, mine: slice, size: int) -> list[MicroBatch]:
    """The micro-batches of one replica.

    Args:
        batch: the global batch.
        mine: rows of this replica.
        size: rows per micro-batch; 0 for all.
    """
    inverse_count = np.array([1.0 / batch.mask.sum(dtype=np.float64)], np.float32)
    step = size or (mine.stop - mine.start)
    parts = [batch.rows(slice(first, first + step)) for first in range(mine.start, mine.stop, step)]
    return [MicroBatch((*part.inputs, part.targets), (part.mask, inverse_count)) for part in parts]
