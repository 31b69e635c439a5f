"""A conversation as token ids: prompts made of its turns, and replies from sampled ids to text."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from mindrlhf.data.prompt_format import PromptFormat
from mindrlhf.data.tokenizer import Tokenizer, chat_stop_ids
from mindrlhf.utils.errors import DataError

_REPLACEMENT = "\ufffd"
# Characters that move the cursor, change colours or ring the bell: C0 without tab and line end, DEL and C1.
_CONTROL = {code: None for code in (*range(32), 127, *range(128, 160)) if chr(code) not in "\t\n"}


class Conversation:
    """The turns so far, and the next prompt: all of them in the tokenizer's chat template.

    A message that looks like a control token is ordinary text: it cannot close its turn.

    Args:
        tokenizer: of the model.
        system_prompt: text of the system turn; ``None`` is the template's default, ``""`` leaves it out.
        chat_template: False takes each message as it is, for a model that continues text; then there is no
            history.

    Attributes:
        stop_ids: end a reply.

    Raises:
        DataError: the template cannot be used.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, system_prompt: str | None = None, chat_template: bool = True
    ) -> None:
        self._chat_template = chat_template
        self._format = PromptFormat(tokenizer, chat_template=chat_template, system_prompt=system_prompt)
        self.stop_ids = tuple(dict.fromkeys((self._format.stop, *chat_stop_ids(tokenizer))))
        self._turns: list[tuple[str, str]] = []  # message and reply

    def __len__(self) -> int:
        """Turns that precede the message in the next prompt."""
        return len(self._turns)

    def prompt(self, message: str, limit: int) -> list[int]:
        """Ids of all turns and a new message, ready for the reply.

        Turns that no longer fit are forgotten, the oldest first; the system turn stays.

        Args:
            message: the user's text.
            limit: maximum number of ids.

        Raises:
            DataError: the message alone does not fit, or is empty.
        """
        while len(ids := self._encode(message)) > limit and self._turns:
            del self._turns[0]
        if len(ids) > limit:
            raise DataError(
                f"the message makes a prompt of {len(ids)} tokens, only {limit} fit; shorten it, or lower "
                "--max_tokens or raise --max_context as far as the model allows"
            )
        if not ids:
            raise DataError("the message is empty")
        return ids

    def add(self, message: str, reply: str) -> None:
        """Adds a finished turn."""
        if self._chat_template:
            self._turns.append((message, reply))

    def reset(self) -> None:
        """Forgets all turns."""
        self._turns.clear()

    def _encode(self, message: str) -> list[int]:
        turns = [*(text for turn in self._turns for text in turn), message]
        roles = ("user", "assistant")
        return self._format.encode_prompt(
            [{"role": roles[number % 2], "content": text} for number, text in enumerate(turns)]
        )


class Reply:
    """Collects the ids of one reply and returns its text as soon as it is certain.

    A character whose bytes lie in several tokens is held back until its last byte has arrived.

    Args:
        tokenizer: of the model.
        stop_ids: the first of these ends the reply and is not part of it.

    Attributes:
        ids: without the stop token.
        tokens: number of tokens drawn, with the stop token.
        stopped: whether a stop token was drawn.
        text: returned so far.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._stop_ids = frozenset(stop_ids)
        self.ids: list[int] = []
        self.tokens = 0
        self.stopped = False
        self.text = ""

    def add(self, ids: Iterable[int]) -> str:
        """Takes the next ids and returns the text that has become certain; "" after the end."""
        for token in ids:
            if self.stopped:
                break
            self.tokens += 1
            self.stopped = token in self._stop_ids
            if not self.stopped:
                self.ids.append(int(token))
        # An unfinished character is decoded as one U+FFFD or more, any of which may become something else.
        return self._advance(self._decoded().rstrip(_REPLACEMENT))

    def finish(self) -> str:
        """Returns the text that was held back, with U+FFFD for bytes that are not a character."""
        return self._advance(self._decoded())

    def _decoded(self) -> str:
        return self._tokenizer.decode(self.ids, skip_special=True)

    def _advance(self, certain: str) -> str:
        new = certain[len(self.text) :]
        if new:
            self.text = certain
        return new


def printable(text: str) -> str:
    """``text`` without control characters: a model's output must not control the terminal."""
    return text.translate(_CONTROL)
