"""A conversation as ids: ChatML turns, the replies exactly as they were sampled."""

from __future__ import annotations

from dataclasses import dataclass

from mindrlhf.data.prompt_format import chatml_format, raw_format
from mindrlhf.data.tokenizer import Tokenizer
from mindrlhf.utils.errors import DataError


@dataclass(frozen=True)
class Turn:
    """A user's message and the reply, as ids without the markup around them."""

    message: list[int]
    reply: list[int]


class Conversation:
    """Turns so far, and the prompt that the next message makes of them.

    A message that looks like a control token is ordinary text: it cannot close its turn.

    Args:
        tokenizer: of the model.
        system_prompt: text of the system turn; ``None`` is the model's default, ``""`` leaves it out.
        chat_template: False takes each message as it is, for a model that goes on with text; then there
            is no history.

    Raises:
        DataError: the tokenizer has no ChatML tokens.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, system_prompt: str | None = None, chat_template: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._format = chatml_format(tokenizer, system_prompt) if chat_template else raw_format(tokenizer)
        self._newline = tokenizer.encode_batch(["\n"])[0]
        self._turns: list[Turn] = []

    def __len__(self) -> int:
        """Turns that the next prompt holds in front of its message."""
        return len(self._turns)

    def prompt(self, message: str, limit: int) -> list[int]:
        """Ids of all turns and a new message, ready for the reply.

        Turns that do not fit any more are forgotten, the oldest first; the system turn stays.

        Args:
            message: the user's text.
            limit: most ids.

        Raises:
            DataError: the message alone does not fit, or there is nothing in it.
        """
        ids = self._encode(message)
        while len(self._joined(ids)) > limit and self._turns:
            del self._turns[0]
        joined = self._joined(ids)
        if len(joined) > limit:
            raise DataError(
                f"the message makes a prompt of {len(joined)} tokens, only {limit} fit; shorten it, or lower "
                "--max_tokens or raise --max_context as far as the model allows"
            )
        if not joined:
            raise DataError("the message is empty")
        return joined

    def add(self, message: str, reply: list[int]) -> None:
        """Keeps a turn that is over; ``reply`` without its stop token."""
        if self._chat_template:
            self._turns.append(Turn(self._encode(message), list(reply)))

    def reset(self) -> None:
        """Forgets all turns."""
        self._turns.clear()

    def _encode(self, message: str) -> list[int]:
        return self._tokenizer.encode_batch([self._format.lead + message])[0]

    def _joined(self, message: list[int]) -> list[int]:
        form = self._format
        ids = list(form.prefix)
        for turn in self._turns:
            # The prefix ends with the start of a user's turn; so does what follows a reply.
            ids += [*turn.message, *form.suffix, *turn.reply, form.stop, *self._newline, form.prefix[-1]]
        return [*ids, *message, *form.suffix]
