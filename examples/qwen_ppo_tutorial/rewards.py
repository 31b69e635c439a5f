"""Rule-based rewards for ``ppo_one_stage.py --reward_fn rewards:NAME``.

A reward function takes prompts and responses as plain text, n of each, and returns n finite numbers; a prompt
is the user's message without the chat template around it. This module is found without installation because
it is beside ``ppo_one_stage.py``; your own may be in the working directory, in any installed package, or in a
file: ``--reward_fn path/to/file.py:NAME``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

SHORTEST, LONGEST = 6, 25
"""Words of a reply that counts in full."""

FADE = 5
"""Words beyond the band over which the score fades to 0."""


def cheerful_reply(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """How cheerful each reply sounds, if it has a sensible length.

    VADER's compound sentiment (Hutto and Gilbert, 2014) in [-1, 1], times :func:`length_factor`: neither a
    single happy word nor an endless list of them is worth anything. A bad length never improves a gloomy
    reply.

    Args:
        prompts: not used.
        responses: without control tokens.
    """
    return [_cheerfulness(response) for response in responses]


def _cheerfulness(response: str) -> float:
    sentiment = float(_analyzer().polarity_scores(response)["compound"])
    return sentiment * (length_factor(len(response.split())) if sentiment > 0 else 1.0)


def length_factor(words: int) -> float:
    """1 from SHORTEST to LONGEST words, falling to 0 over FADE words on either side."""
    outside = max(SHORTEST - words, words - LONGEST, 0)
    return max(0.0, 1.0 - outside / FADE)


@cache
def _analyzer() -> SentimentIntensityAnalyzer:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
