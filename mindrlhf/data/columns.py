"""The columns of the prompt data set: the one statement of what a row holds.

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
this is exact even where the pad token is a token of the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

PROMPT_IDS = "prompt_ids"
PRETRAIN_IDS = "pretrain_ids"
LOSS_MASK = "loss_mask"
REJECTED_IDS = "rejected_ids"
REJECTED_MASK = "rejected_mask"

COLUMN_TYPES = ("int32", "int64", "float32", "float64")


@dataclass(frozen=True)
class Column:
    """One column of a MindRecord file: an array of fixed length in every row.

    Attributes:
        dtype: int32, int64, float32 or float64.
        length: values per row.
    """

    dtype: str
    length: int

    def __post_init__(self) -> None:
        """Refuses what MindRecord cannot store."""
        if self.dtype not in COLUMN_TYPES:
            raise ValueError(f"MindRecord stores {', '.join(COLUMN_TYPES)}, not {self.dtype}")
        if self.length < 1:
            raise ValueError(f"a column holds at least one value per row, not {self.length}")


def prompt_schema(max_prompt_length: int, seq_length: int, *, pairs: bool = False) -> dict[str, Column]:
    """The columns of a prompt data set, with the rejected responses when they are ``pairs``."""
    columns = {
        PROMPT_IDS: Column("int32", max_prompt_length),
        PRETRAIN_IDS: Column("int32", seq_length),
        LOSS_MASK: Column("int32", seq_length),
    }
    if pairs:
        columns |= {REJECTED_IDS: Column("int32", seq_length), REJECTED_MASK: Column("int32", seq_length)}
    return columns


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
