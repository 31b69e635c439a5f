"""The main rank's side of a conversation: messages in, commands, replies out."""

from __future__ import annotations

import queue
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mindrlhf.chat.conversation import Conversation
from mindrlhf.chat.display import ColumnsDisplay, PlainDisplay
from mindrlhf.chat.reply import Reply
from mindrlhf.utils.errors import DataError

if TYPE_CHECKING:
    from mindrlhf.chat.team import Team

HELP = "/reset forgets the conversation, /quit ends it; // in front of a message sends it with one /"
_PROMPT = "you> "
_SECONDS_BETWEEN_SIGNS_OF_LIFE = 5.0


class Session:
    """Talks until there are no more messages.

    Each speaker has a conversation of its own, with its own replies.

    Args:
        team: the speakers on all workers.
        conversations: one for each speaker.
        display: where replies go.
    """

    def __init__(
        self, team: Team, conversations: Sequence[Conversation], display: PlainDisplay | ColumnsDisplay
    ) -> None:
        self._team, self._conversations, self._display = team, conversations, display
        self._asked = 0

    def talk(self, messages: Iterator[str]) -> None:
        """Answers every message, one after another; ``/quit`` or the end of messages ends it."""
        for line in messages:
            message = line.strip()
            if message in ("/quit", "/exit"):
                return
            if message == "/reset":
                for conversation in self._conversations:
                    conversation.reset()
                self._display.notice("the conversation is forgotten")
            elif message.startswith("/") and not message.startswith("//"):
                known = message == "/help"
                self._display.notice(HELP if known else f"{message.split()[0]}: no such command; {HELP}")
            elif message:
                self._answer(message[1:] if message.startswith("//") else message)

    def _answer(self, message: str) -> None:
        try:
            prompts = [self._prompt(place, message) for place in range(len(self._conversations))]
        except DataError as error:
            self._display.notice(f"not sent: {error}")
            return
        speakers = self._team.speakers
        replies = [Reply(speaker.checkpoint.tokenizer, speaker.stop_ids) for speaker in speakers]
        self._asked += 1
        with self._display.reply(), _terminate_is_interrupt():
            try:
                for place, ids in self._team.ask([[prompt] for prompt in prompts], [self._asked]):
                    self._display.piece(place, replies[place].add(ids[0]))
            except KeyboardInterrupt:
                if not self._team.is_alone:  # the other workers cannot be told to stop
                    raise
            for place, reply in enumerate(replies):
                self._display.piece(place, reply.finish())
        for conversation, reply in zip(self._conversations, replies, strict=True):
            conversation.add(message, reply.ids)
        if not all(reply.stopped for reply in replies):
            self._display.notice("(cut: --max_tokens or an interrupt ended it)")

    def _prompt(self, place: int, message: str) -> list[int]:
        conversation, speaker = self._conversations[place], self._team.speakers[place]
        before = len(conversation)
        prompt = conversation.prompt(message, speaker.limit)
        if len(conversation) < before:
            self._display.notice(
                f"{speaker.checkpoint.name}: the oldest {before - len(conversation)} turn(s) are forgotten, "
                f"prompts have at most {speaker.limit} tokens"
            )
        return prompt


@contextmanager
def _terminate_is_interrupt() -> Iterator[None]:
    """Makes Ctrl-C at a terminal end the reply and not the program.

    From its first graph on MindSpore answers SIGINT itself, with a SIGTERM to its own process; so SIGTERM
    counts as an interrupt here, and SIGINT is Python's again afterwards.
    """
    if not sys.stdin.isatty():
        yield
        return
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def read_messages(team: Team) -> Iterator[str]:
    """Lines of standard input, asked for on a terminal.

    With several workers the main rank tells the others now and then that it is only waiting.
    """
    on_terminal = sys.stdin.isatty()
    if team.is_alone:
        yield from _lines(on_terminal)
        return
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in _lines(on_terminal):
            lines.put(line)
        lines.put(None)

    # Waits for a person, so the process must be able to end without it.
    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=_SECONDS_BETWEEN_SIGNS_OF_LIFE)
        except queue.Empty:
            team.still_here()
            continue
        if line is None:
            return
        yield line


def _lines(on_terminal: bool) -> Iterator[str]:
    if on_terminal:
        import readline  # noqa: F401  # gives input() a history and arrow keys
    while True:
        try:
            line = input(_PROMPT) if on_terminal else next(sys.stdin, None)
        except EOFError:
            return
        if line is None:
            return
        if not on_terminal and sys.stdout.isatty():
            sys.stdout.write(_PROMPT + line.rstrip("\n") + "\n")
        yield line
