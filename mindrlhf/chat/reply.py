"""A reply while it is made: from pieces of ids to text that may be shown."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from mindrlhf.data.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
# What moves the cursor, changes colours or rings: everything below the blank but tab and line end, and C1.
_CONTROL = {code: None for code in (*range(32), 127, *range(128, 160)) if chr(code) not in "\t\n"}


def printable(text: str) -> str:
    """``text`` without control characters: what a model says must not command the terminal."""
    return text.translate(_CONTROL)


class Reply:
    """Collects the ids of one reply and gives out its text as far as it is certain.

    A character whose bytes lie in several tokens is held back until its last byte is there.

    Args:
        tokenizer: of the model.
        stop_ids: the first of these ends the reply and is no part of it.

    Attributes:
        ids: without the stop token.
        tokens: that were drawn, with the stop token.
        stopped: whether a stop token came.
        text: given out so far.
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
        # An unfinished character is decoded as one U+FFFD or more, which may all become something else.
        return self._advance(self._decoded().rstrip(_REPLACEMENT))

    def finish(self) -> str:
        """The text that was held back, with U+FFFD for bytes that make no character."""
        return self._advance(self._decoded())

    def _decoded(self) -> str:
        return self._tokenizer.decode(self.ids, skip_special=True)

    def _advance(self, certain: str) -> str:
        if len(certain) <= len(self.text):
            return ""
        new = certain[len(self.text) :]
        self.text = certain
        return new
