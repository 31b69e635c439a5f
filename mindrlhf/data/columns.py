"""The columns of the prompt data set: the one statement of what a row holds, and the checks of a row.

=============  ===================  ==================================================================
column         shape, type          content
=============  ===================  ==================================================================
prompt_ids     (P,) int32           the prompt, LEFT-padded
pretrain_ids   (seq_length,) int32  prompt, response, stop token, RIGHT-padded
loss_mask      (seq_length,) int32  1 on the response tokens of ``pretrain_ids``, else 0
rejected_ids   (seq_length,) int32  pairs only: prompt, rejected response, stop token, RIGHT-padded
rejected_mask  (seq_length,) int32  pairs only: 1 on the response tokens of ``rejected_ids``, else 0
=============  ===================  ==================================================================

The first three are the same with and without pairs, so a file of pairs is a file of prompts too.
The length of a prompt is the index of the first 1 in ``loss_mask``. A row without a response has no 1; its
prompt is what follows the leading run of pads in ``prompt_ids``. No prompt starts with the pad token, so
this is exact even where the pad token occurs in the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mindrlhf.data.mindrecord import Column, read_schema
from mindrlhf.utils.errors import DataError

PROMPT_IDS = "prompt_ids"
PRETRAIN_IDS = "pretrain_ids"
LOSS_MASK = "loss_mask"
REJECTED_IDS = "rejected_ids"
REJECTED_MASK = "rejected_mask"

REMEDY = "make the data again with rlhf_data.py"
ANOTHER_TOKENIZER = "the data was made with another tokenizer"


def prompt_schema(max_prompt_length: int, seq_length: int, *, pairs: bool = False) -> dict[str, Column]:
    """The columns of a prompt data set, with the rejected responses when they are ``pairs``."""
    whole = (PRETRAIN_IDS, LOSS_MASK, *((REJECTED_IDS, REJECTED_MASK) if pairs else ()))
    columns = {name: Column("int32", seq_length) for name in whole}
    return {PROMPT_IDS: Column("int32", max_prompt_length), **columns}


def check_columns(path: str | Path, names: Sequence[str]) -> tuple[dict[str, int], int]:
    """Length of each of the columns ``names`` (-1 where rows may differ), and the number of rows.

    Raises:
        DataError: the file is missing or damaged, lacks a column, or has one whose rows are not 1-D int32.
    """
    columns, rows = read_schema(path)
    missing = [name for name in names if name not in columns]
    faults = [f"no column {', '.join(missing)}"] if missing else []
    faults += [
        f"column {name} is {columns[name][0]} {columns[name][1]}, expected a row of int32"
        for name in names
        if name in columns and (columns[name][0] != "int32" or len(columns[name][1]) != 1)
    ]
    if faults:
        pairs = " --pairs, which adds the rejected responses"
        only_pairs = bool(missing) and set(missing) <= {REJECTED_IDS, REJECTED_MASK}
        raise DataError(
            f"{path}: not a data set for this purpose: {'; '.join(faults)}; make it with rlhf_data.py"
            + (pairs if only_pairs else "")
        )
    return {name: columns[name][1][0] for name in names}, rows


def prompt_length(row: Mapping[str, np.ndarray], pad_token_id: int) -> int:
    """Number of prompt tokens in one row.

    Args:
        row: ``prompt_ids`` (P,) and ``loss_mask`` (S,).
        pad_token_id: what ``prompt_ids`` is padded with.
    """
    mask = row[LOSS_MASK]
    first = int(mask.argmax())
    if mask[first]:
        return first
    real = row[PROMPT_IDS] != pad_token_id
    return len(real) - int(real.argmax()) if real.any() else 0


def check_prompt(prompt: np.ndarray, length: int, whole: np.ndarray, name: str) -> None:
    """Raises ValueError unless ``prompt`` (P,) ends with the first ``length`` tokens of ``whole`` (S,).

    Args:
        prompt: ``prompt_ids``, left-padded.
        length: tokens of the prompt.
        whole: prompt and response.
        name: column of ``whole``, for the message.
    """
    if not 0 < length <= len(prompt) or not np.array_equal(prompt[len(prompt) - length :], whole[:length]):
        raise ValueError(
            f"prompt_ids does not end with the {length} tokens before the response of {name}; {REMEDY}"
        )


def check_tokens(tokens: np.ndarray, padding: np.ndarray, pad_token_id: int, vocab_size: int | None) -> None:
    """Raises ValueError when ``tokens`` or ``padding``, both 1-D, are not those of the model's tokenizer."""
    if (padding != pad_token_id).any():
        token = int(padding[padding != pad_token_id][0])
        raise ValueError(
            f"padded with token {token}, but the model's pad_token_id is {pad_token_id}; {ANOTHER_TOKENIZER}"
        )
    if vocab_size is not None and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        raise ValueError(
            f"token {int(tokens.max())} is not below the model's vocab_size {vocab_size}; {ANOTHER_TOKENIZER}"
        )
