"""Sample texts: which prompts and responses of a rollout are recorded for reading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mindrlhf.data.tokenizer import Tokenizer
from mindrlhf.trainer.experience import Rollout


def choose_rows(count: int, wanted: int) -> Sequence[int]:
    """Evenly spread row numbers to show."""
    return [int(row) for row in np.linspace(0, count - 1, min(wanted, count)).round()] if wanted else []


def sample_texts(
    rollout: Rollout, row: int, tokenizer: Tokenizer | None, *, skip_special: bool = False
) -> dict[str, Any]:
    """``sample_id``, ``prompt`` and ``response`` of one row, as text when there is a tokenizer, else ids.

    Args:
        rollout: holds the row.
        row: its number.
        tokenizer: decodes it.
        skip_special: leave control tokens out of the response; the prompt keeps its markup.
    """
    columns = rollout.prompt_columns
    tokens = rollout.tokens[row].tolist()
    prompt: Any = tokens[columns - rollout.prompt_lengths[row] : columns]
    response: Any = tokens[columns : columns + rollout.response_lengths[row]]
    if tokenizer is not None:
        prompt = tokenizer.decode(prompt)
        response = tokenizer.decode(response, skip_special=skip_special)
    return {"sample_id": rollout.sample_ids[row], "prompt": prompt, "response": response}
