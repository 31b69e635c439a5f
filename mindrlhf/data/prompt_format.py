"""From messages to ids: a chat by the tokenizer's own template, or raw text; prompt and response kept apart.

Prompt and response are always encoded separately and their ids joined, so the prompt is a true prefix of
the whole by construction: what generation sees is what training sees. Only the template writes control
tokens: a literal ``<|im_end|>`` in a message becomes ordinary tokens and closes no turn. An added token that
is text, such as ``<think>``, is one token in a message too.

A whole response ends with its stop token, the control token with which the template ends a turn:
``<|im_end|>`` in ChatML, the end of text in raw mode.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mindrlhf.data.jsonl import Sample
from mindrlhf.data.tokenizer import IM_END, IM_START, ChatTemplate, Tokenizer
from mindrlhf.utils.errors import DataError

QWEN2_SYSTEM_PROMPT = "You are a helpful assistant."

CHATML_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n"
    + QWEN2_SYSTEM_PROMPT
    + "<|im_end|>\n{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Qwen2's chats, for a tokenizer without a template of its own."""

_RAW_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
)
# They stand for a message and its reply where what the template writes around them is found.
_MESSAGE, _REPLY = "\ue000", "\ue001"

Message = Mapping[str, str]
"""``role`` (system, user or assistant) and ``content``."""


class EncodedSample(NamedTuple):
    """Ids of one sample.

    Attributes:
        prompt: everything in front of the response.
        response: with its stop token, ``None`` for a prompt alone.
        rejected: the same of the rejected response, ``None`` when there is none.
    """

    prompt: list[int]
    response: list[int] | None
    rejected: list[int] | None = None


class PromptFormat:
    """Renders messages by a chat template and encodes them.

    Ids equal those of ``apply_chat_template`` of ``transformers``, except where a message looks like a
    control token.

    Args:
        tokenizer: its own template is used; without one, ChatML.
        chat_template: False takes messages as they are, behind the begin-of-text token if there is one.
        system_prompt: text of the system turn; ``None`` is the template's default, ``""`` leaves it out.

    Attributes:
        source: where the template stands.
        example: the text of a prompt, ``...`` in place of the message.
        prefix, suffix: ids in front of and behind the message of a prompt.
        stop: the token that ends a whole response.

    Raises:
        DataError: the template cannot be used: it fails, its generation prompt does not begin the
            assistant's turn, it does not end that turn with a control token, or it shows no message.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, chat_template: bool = True, system_prompt: str | None = None
    ) -> None:
        if system_prompt and not chat_template:
            raise DataError("--system_prompt needs the chat template; leave --no_chat_template out")
        if not chat_template:
            system_prompt = None
        self._tokenizer = tokenizer
        text, self.source, self._tokens = (_template_of if chat_template else _raw_template_of)(tokenizer)
        try:
            self._template = _environment().from_string(text)
        except TemplateError as error:
            raise self._unusable(f"is not valid Jinja ({error})") from error
        self._system = [] if system_prompt is None else [self._message("system", system_prompt)]
        # An empty system turn is rendered and then cut off: without one many templates write their default.
        self._cut = self._render(self._system, is_prompt=False) if system_prompt == "" else ""
        self._ending, self._behind_stop = "", 0
        prompt = self._turns([self._message("user", _MESSAGE)], is_prompt=True)
        if prompt.count(_MESSAGE) != 1:
            raise self._unusable("does not show the user's message once")
        before, _, after = prompt.partition(_MESSAGE)
        self.example = tokenizer.shown(f"{before}...{after}")
        self.prefix, self.suffix = tokenizer.encode_markup([before, after])
        self._opening = next((i for i in self.prefix[::-1] if i in tokenizer.control_ids), None)
        self._lead = tokenizer.control_tokens.split(before)[-1]
        ending = self._answer(prompt, _MESSAGE, _REPLY).rpartition(_REPLY)[2]
        control = tokenizer.control_tokens.search(ending)
        if control is None:
            raise self._unusable("does not end the assistant's turn with a control token of the tokenizer")
        self.stop = tokenizer.special_tokens[control[0]]
        self._ending, self._behind_stop = ending, len(ending) - control.end()

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation that ends with the user's message, ready for the assistant's reply."""
        turns = [self._message(message["role"], message["content"]) for message in messages]
        return self._tokenizer.encode_markup([self._turns(turns, is_prompt=True)])[0]

    def last_message(self, prompt: Sequence[int]) -> str:
        """The text of the user's last message in a prompt; of a prompt in another form, the whole text."""
        if self.suffix and list(prompt[-len(self.suffix) :]) == self.suffix:
            ids = list(prompt[: -len(self.suffix)])
            first = len(ids) - ids[::-1].index(self._opening) if self._opening in ids else 0
            text = self._tokenizer.decode(ids[first:])
            if text.startswith(self._lead):
                return text.removeprefix(self._lead)
        return self._tokenizer.decode(prompt, skip_special=True)

    def encode_samples(self, samples: Sequence[Sample]) -> list[EncodedSample]:
        """Ids of every sample, in one call of the tokenizer.

        Raises:
            DataError: the template fails for one of them.
        """
        texts = []
        for sample in samples:
            prompt = self._turns([self._message("user", sample.prompt)], is_prompt=True)
            answers = [answer for answer in (sample.response, sample.rejected) if answer is not None]
            texts += [prompt, *(self._answer(prompt, sample.prompt, answer) for answer in answers)]
        ids = iter(self._tokenizer.encode_markup(texts))
        return [
            EncodedSample(
                next(ids),
                None if sample.response is None else next(ids),
                None if sample.rejected is None else next(ids),
            )
            for sample in samples
        ]

    def _message(self, role: str, text: str) -> dict[str, str]:
        return {"role": role, "content": self._tokenizer.without_markup(text)}

    def _answer(self, prompt: str, message: str, reply: str) -> str:
        """What the template writes behind ``prompt`` for ``reply``, up to its stop token."""
        turns = [self._message("user", message), self._message("assistant", reply)]
        whole = self._turns(turns, is_prompt=False)
        if not whole.startswith(prompt):
            raise self._unusable("does not begin the assistant's turn with the generation prompt")
        if not whole.endswith(self._ending):
            raise self._unusable(f"does not always end the assistant's turn with {self._ending!r}")
        return whole[len(prompt) : len(whole) - self._behind_stop]

    def _turns(self, turns: Sequence[Message], *, is_prompt: bool) -> str:
        text = self._render([*self._system, *turns], is_prompt=is_prompt)
        if not text.startswith(self._cut):
            raise self._unusable("has no system turn that could be left out, as --system_prompt '' asks")
        return text[len(self._cut) :]

    def _render(self, messages: Sequence[Message], *, is_prompt: bool) -> str:
        try:
            return self._template.render(messages=messages, add_generation_prompt=is_prompt, **self._tokens)
        except Exception as error:  # whatever an expression of the template can raise
            raise self._unusable(f"fails ({type(error).__name__}: {error})") from error

    def _unusable(self, why: str) -> DataError:
        return DataError(
            f"{self.source}: the chat template {why}; use another template (--tokenizer_config, or "
            "chat_template.jinja), or --no_chat_template for prompts without turns"
        )


def turn_markup(template: ChatTemplate | None) -> str:
    """What a template (without one, ChatML's) writes around turns; of one that fails, all that it could.

    The turns are in the past: in the last one templates also write what a model says (``<think>``).
    """
    text, _, tokens = template or ChatTemplate(CHATML_TEMPLATE, "ChatML", {})
    turns = [{"role": role, "content": _MESSAGE} for role in ("user", "assistant", "user")]
    try:
        return _environment().from_string(text).render(messages=turns, add_generation_prompt=False, **tokens)
    except Exception:  # PromptFormat says why, unless the prompts are raw
        return text


def _template_of(tokenizer: Tokenizer) -> ChatTemplate:
    if tokenizer.chat_template is not None:
        return tokenizer.chat_template
    if tokenizer.special.turn_start is None or tokenizer.special.turn_end is None:
        raise DataError(
            f"chat template: the tokenizer has none, nor ChatML's control tokens {IM_START} and {IM_END}; "
            "use --no_chat_template, or a tokenizer (config) that has them"
        )
    return ChatTemplate(CHATML_TEMPLATE, "ChatML", {})


def _raw_template_of(tokenizer: Tokenizer) -> ChatTemplate:
    texts = {number: text for text, number in tokenizer.special_tokens.items()}
    begin, end = tokenizer.special.begin_of_text, tokenizer.special.end_of_text
    tokens = {"bos_token": "" if begin is None else texts[begin], "eos_token": texts[end]}
    return ChatTemplate(_RAW_TEMPLATE, "none (raw prompts)", tokens)


class _GenerationBlock(Extension):
    """``{% generation %}``, with which templates mark what the assistant says."""

    tags = {"generation"}  # noqa: RUF012  # as the base class has it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment in which ``transformers`` renders chat templates (``utils/chat_template_utils.py``)."""

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"tools": None, "documents": None}
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
