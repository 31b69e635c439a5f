"""How generation cuts responses into calls of its decode graph, and prompts into blocks; needs no device."""

from __future__ import annotations

from typing import NamedTuple

QUERY_BLOCK = 512
"""Queries of a prompt per attention block: bounds the scores' memory and skips later keys."""


class DecodeSchedule(NamedTuple):
    """Calls of the decode graph that produce a response."""

    steps: int  # tokens per row and call
    calls: int  # maximum number of calls per response
    columns: int  # of the key/value cache: the prompt and whole calls


def decode_schedule(prompt: int, response: int, steps_per_call: int) -> DecodeSchedule:
    """The schedule for ``prompt`` columns and ``response`` tokens, of which the prefill produces the first.

    ``decode_schedule(64, 10, 4)`` produces 1 + 3 x 4 tokens in a cache of 64 + 12 columns.
    """
    steps = max(1, min(steps_per_call, response - 1))
    calls = -(-(response - 1) // steps)
    return DecodeSchedule(steps, calls, prompt + calls * steps)
