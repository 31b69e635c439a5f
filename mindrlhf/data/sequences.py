"""Whole sequences for supervised fine-tuning and reward modelling: a prompt and one or two responses per row.

The file is scanned once for lengths and faults; rows are then read when they are used, so memory does not
grow with the data set's tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mindrlhf.data.columns import (
    LOSS_MASK,
    PRETRAIN_IDS,
    PROMPT_IDS,
    REJECTED_IDS,
    REJECTED_MASK,
    REMEDY,
    check_columns,
    check_prompt,
    check_tokens,
)
from mindrlhf.data.mindrecord import read_rows
from mindrlhf.utils.errors import MOST_BULLETS, DataError, bullet_list
from mindrlhf.utils.progress import ProgressBar

_SCANNED_AT_ONCE = 256

CHOSEN = (PRETRAIN_IDS, LOSS_MASK)
REJECTED = (REJECTED_IDS, REJECTED_MASK)


class Sequences(NamedTuple):
    """Prompts with responses, laid out as PPO's: ``[left-padded prompt | right-padded response]``.

    Attributes:
        tokens: (B, P + R) int32.
        prompt_lengths: (B,) int32.
        response_lengths: (B,) int32, stop token included.
    """

    tokens: np.ndarray
    prompt_lengths: np.ndarray
    response_lengths: np.ndarray


class SequenceData:
    """A data set of ``rlhf_data.py`` as whole sequences; every rank reads the same.

    Args:
        path: MindRecord file with the columns of :mod:`mindrlhf.data.columns`.
        pad_token_id: what the file is padded with.
        vocab_size: every token must be below it.
        max_length: maximum tokens of prompt and response, the model's ``seq_length``. A row may have one
            more, for next-token labels; it is cut.
        pairs: whether to read rejected responses.

    Attributes:
        prompt_lengths, response_lengths, rejected_lengths: (rows,) int32; the last is ``None`` without pairs.
        prompt_columns, response_columns: P and R, the lengths of the longest prompt and the longest response.

    Raises:
        DataError: the file is missing, damaged or without the columns; or rows that have no response, are
            too long, padded with another token or made with another tokenizer, all of them in one error.
    """

    def __init__(
        self, path: str | Path, *, pad_token_id: int, vocab_size: int, max_length: int, pairs: bool
    ) -> None:
        self.path = Path(path)
        self.pairs = pairs
        self._pad_token_id = pad_token_id
        self._vocab_size = vocab_size
        self._max_length = max_length
        self._responses = (CHOSEN, REJECTED) if pairs else (CHOSEN,)
        self._columns = (PROMPT_IDS, *(name for pair in self._responses for name in pair))
        _, self._rows = check_columns(self.path, self._columns)
        lengths, self._prompt_keys = self._scan()
        self.prompt_lengths, self.response_lengths = lengths[0], lengths[1]
        self.rejected_lengths = lengths[2] if pairs else None
        self.prompt_columns = int(lengths[0].max())
        self.response_columns = int(lengths[1:].max())

    def __len__(self) -> int:
        """Rows of the data set."""
        return self._rows

    def read(self, rows: np.ndarray) -> Sequences:
        """The given rows with their preferred response; (b,) row numbers -> b sequences."""
        return self._laid_out(read_rows(self.path, rows, (PROMPT_IDS, *CHOSEN)), rows, CHOSEN)

    def read_pairs(self, rows: np.ndarray) -> Sequences:
        """The given rows twice: (b,) row numbers -> b with the preferred, then b with the rejected one."""
        read = read_rows(self.path, rows, self._columns)
        parts = [self._laid_out(read, rows, response) for response in self._responses]
        return Sequences(*(np.concatenate(field) for field in zip(*parts, strict=True)))

    def split(self, fraction: float, max_held_out: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers for training and held-out ones, the same on every rank and in every run.

        The split is by prompt: all rows of a prompt are on one side. Prompts are ordered by a hash of their
        tokens and the seed, so the order of the file does not matter, nor do other columns.

        Args:
            fraction: of the prompts; above 0 at least one prompt is held out.
            max_held_out: bound on the held-out prompts; 0: none.
            seed: of the job.

        Raises:
            DataError: no prompt is left on one side.
        """
        order = sorted(
            set(self._prompt_keys), key=lambda key: hashlib.sha256(key + str(seed).encode()).digest()
        )
        count = max(1, round(fraction * len(order))) if fraction > 0 else 0
        count = min(count, max_held_out) if max_held_out else count
        if count >= len(order):
            raise DataError(
                f"{self.path}: {len(order)} different prompt(s), of which {count} are to be held out; give "
                "more data or another --eval_fraction"
            )
        held_out = set(order[:count])
        is_held_out = np.array([key in held_out for key in self._prompt_keys])
        return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)

    def _laid_out(
        self, read: list[dict[str, np.ndarray]], rows: np.ndarray, response: tuple[str, str]
    ) -> Sequences:
        prompts = self.prompt_lengths[rows]
        lengths = self.response_lengths if response == CHOSEN else self.rejected_lengths
        assert lengths is not None
        responses = lengths[rows]
        tokens = np.full(
            (len(rows), self.prompt_columns + self.response_columns), self._pad_token_id, np.int32
        )
        for row, (columns, n, length) in enumerate(zip(read, prompts, responses, strict=True)):
            whole = columns[response[0]]
            tokens[row, self.prompt_columns - n : self.prompt_columns + length] = whole[: n + length]
        return Sequences(tokens, prompts, responses)

    def _scan(self) -> tuple[np.ndarray, list[bytes]]:
        """Lengths (1 + responses, rows) int32 and a key of each prompt; raises for all faulty rows."""
        lengths = np.zeros((1 + len(self._responses), self._rows), np.int32)
        keys: list[bytes] = []
        faults: list[str] = []
        count = 0
        with ProgressBar(f"checking {self.path.name}", self._rows) as bar:
            for first in range(0, self._rows, _SCANNED_AT_ONCE):
                numbers = np.arange(first, min(first + _SCANNED_AT_ONCE, self._rows))
                for number, row in zip(numbers, read_rows(self.path, numbers, self._columns), strict=True):
                    try:
                        lengths[:, number], prompt = self._check_row(row)
                        keys.append(hashlib.sha256(prompt.tobytes()).digest())
                    except ValueError as fault:
                        count += 1
                        if len(faults) < MOST_BULLETS:
                            faults.append(f"{self.path}: row {number}: {fault}")
                bar.update(len(numbers))
        if count:
            raise DataError(f"{count} row(s) cannot be used:{bullet_list(faults, total=count)}")
        return lengths, keys

    def _check_row(self, row: Mapping[str, np.ndarray]) -> tuple[list[int], np.ndarray]:
        """Length of the prompt and of each response, and the prompt's tokens; ValueError for a fault."""
        lengths: list[int] = []
        prompt = row[PROMPT_IDS]
        for ids, mask in self._responses:
            n, length = _response_span(row[ids], row[mask], mask)
            if n + length > self._max_length + 1:
                raise ValueError(
                    f"{n + length} tokens in {ids}, more than the model's seq_length {self._max_length}; "
                    f"make the data again with --seq_length {self._max_length + 1}, or raise the YAML's"
                )
            length = min(length, self._max_length - n)
            if length < 1:
                raise ValueError(f"the prompt of {n} tokens leaves no room for a response in seq_length")
            real = row[ids][: n + length]
            check_prompt(prompt, n, real, ids)
            after = row[mask].nonzero()[0][-1] + 1
            padding = np.concatenate([prompt[: len(prompt) - n], row[ids][after:]])
            check_tokens(real, padding, self._pad_token_id, self._vocab_size)
            lengths = [n, *lengths[1:], length]
        return lengths, real[:n]


def _response_span(ids: np.ndarray, mask: np.ndarray, name: str) -> tuple[int, int]:
    """Where the response of a row starts and how many tokens it has."""
    ones = np.flatnonzero(mask)
    if len(ones) == 0:
        raise ValueError("there is no response; data made with --prompt_only can only be used for PPO")
    if mask.shape != ids.shape or (mask[ones] != 1).any() or ones[-1] - ones[0] + 1 != len(ones):
        raise ValueError(f"{name} must be 1 on one unbroken response, else 0; {REMEDY}")
    return int(ones[0]), len(ones)
