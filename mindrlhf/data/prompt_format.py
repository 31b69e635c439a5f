"""From a prompt and a response to ids: ChatML or raw, prompt and response kept apart.

Prompt and response are always encoded separately and their ids joined, so the prompt is a true prefix of
the whole by construction: what generation sees is what training sees. The texts of a sample are encoded
without control tokens: a literal ``<|im_end|>`` in a prompt becomes ordinary tokens and closes no turn.

A whole response ends with its stop token: ``<|im_end|>`` in ChatML, the end of text in raw mode. A response
that had to be cut has none, since it did not end there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mindrlhf.data.jsonl import Sample
from mindrlhf.data.tokenizer import IM_END, IM_START, Tokenizer
from mindrlhf.utils.errors import DataError

QWEN2_SYSTEM_PROMPT = "You are a helpful assistant."

# The literal default system turn in a ChatML template; a template writes the line end as \n or as a
# backslash and an n inside a quoted string.
_SYSTEM_TURN = re.compile(r"<\|im_start\|>system(?:\\n|\n)([^'\"{}<]+)<\|im_end\|>")


@dataclass(frozen=True)
class PromptFormat:
    """The tokens around the text of a prompt.

    The prompt of a text is ``prefix + encode(lead + text) + suffix``; the response of a text is
    ``encode(text) + [stop]``.

    Attributes:
        prefix: control and template tokens in front of the text.
        lead: template text joined to the text before encoding (``"user\\n"``: the tokenizer may merge it
            with what follows).
        lead_ids: the lead alone, which stays when the text is cut.
        suffix: control and template tokens behind the text.
        stop: the token that ends a whole response.
        system_prompt: text of the system turn, ``None`` when there is none.
    """

    prefix: tuple[int, ...]
    lead: str
    lead_ids: tuple[int, ...]
    suffix: tuple[int, ...]
    stop: int
    system_prompt: str | None = None

    @property
    def overhead(self) -> int:
        """Tokens of a prompt that are not its text."""
        return len(self.prefix) + len(self.lead_ids) + len(self.suffix)


@dataclass(frozen=True)
class EncodedSample:
    """Ids of one sample.

    Attributes:
        text: ids of lead and prompt text, without prefix and suffix.
        response: ids of the response without its stop token, ``None`` for a prompt alone.
        rejected: the same of the rejected response, ``None`` when there is none.
    """

    text: list[int]
    response: list[int] | None
    rejected: list[int] | None = None


def default_system_prompt(chat_template: str | None) -> str:
    """The default system prompt of a model's own template; without a template, Qwen2's.

    Raises:
        DataError: the template is not ChatML.
    """
    if chat_template is None:
        return QWEN2_SYSTEM_PROMPT
    if IM_START not in chat_template or IM_END not in chat_template:
        raise DataError(
            f"chat template: the tokenizer's own template is not ChatML (no {IM_START}); "
            "use --no_chat_template and put the markup into the prompts"
        )
    found = _SYSTEM_TURN.search(chat_template)
    return found.group(1) if found else ""


def chatml_format(tokenizer: Tokenizer, system_prompt: str | None = None) -> PromptFormat:
    """ChatML with one user turn, ready for the assistant's.

    Args:
        tokenizer: has ``<|im_start|>`` and ``<|im_end|>``.
        system_prompt: text of the system turn; ``None`` is the model's default, ``""`` leaves it out.

    Raises:
        DataError: the tokenizer has no ChatML tokens.
    """
    special = tokenizer.special
    if special.turn_start is None or special.turn_end is None:
        raise DataError(
            f"chat template: the tokenizer has no control tokens {IM_START} and {IM_END}; "
            "use --no_chat_template, or a tokenizer (config) that has them"
        )
    if system_prompt is None:
        system_prompt = default_system_prompt(tokenizer.chat_template)
    newline, system, user, assistant = tokenizer.encode_batch(
        ["\n", f"system\n{system_prompt}", "user\n", "assistant\n"]
    )
    start, end = special.turn_start, special.turn_end
    system_turn = (start, *system, end, *newline) if system_prompt else ()
    return PromptFormat(
        prefix=(*system_turn, start),
        lead="user\n",
        lead_ids=tuple(user),
        suffix=(end, *newline, start, *assistant),
        stop=end,
        system_prompt=system_prompt or None,
    )


def raw_format(tokenizer: Tokenizer) -> PromptFormat:
    """The prompt as it is, behind the tokenizer's begin-of-text token if it has one."""
    begin = tokenizer.special.begin_of_text
    return PromptFormat(
        prefix=() if begin is None else (begin,),
        lead="",
        lead_ids=(),
        suffix=(),
        stop=tokenizer.special.end_of_text,
    )


def encode_samples(
    tokenizer: Tokenizer, prompt_format: PromptFormat, samples: Sequence[Sample]
) -> list[EncodedSample]:
    """Ids of every sample, in one call of the tokenizer."""
    pairs = [(sample.response, sample.rejected) for sample in samples]
    answers = [answer for pair in pairs for answer in pair if answer is not None]
    encoded = tokenizer.encode_batch([prompt_format.lead + sample.prompt for sample in samples] + answers)
    ids = iter(encoded[len(samples) :])
    return [
        EncodedSample(text, *(None if answer is None else next(ids) for answer in pair))
        for pair, text in zip(pairs, encoded, strict=False)
    ]
