"""What the library asks of a tokenizer; the back ends are in ``tokenizer_*.py``."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from mindrlhf.utils.errors import DataError

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
QWEN2_SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END)

# Where Qwen and Qwen2 cut a text before merging: contractions, words, single digits, punctuation, blanks.
QWEN_SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class SpecialIds:
    """The control tokens by role; ``None`` where the tokenizer has no such token.

    Attributes:
        end_of_text: ends a text that has no chat markup; the stop token of raw mode.
        pad: fills rows.
        begin_of_text: put in front of a raw prompt (sentencepiece models such as Llama's have one).
        turn_start, turn_end: ChatML's ``<|im_start|>`` and ``<|im_end|>``.
    """

    end_of_text: int
    pad: int
    begin_of_text: int | None = None
    turn_start: int | None = None
    turn_end: int | None = None


class ChatTemplate(NamedTuple):
    """How a model's authors write a conversation.

    Attributes:
        text: Jinja, as ``transformers`` renders it.
        source: the file it stands in.
        tokens: names by which it calls control tokens (``eos_token``), with their texts.
    """

    text: str
    source: str
    tokens: Mapping[str, str]


# A byte of text that must not be read as a control token; such surrogates occur in no valid text.
_BYTE = 0xDC00
_BYTES = re.compile("[\udc00-\udcff]+")


class Tokenizer(ABC):
    """Text to ids and back, whatever file the vocabulary came from.

    Attributes:
        size: ids are 0 .. size - 1; a model may have more embedding rows, which are never sampled.
        special: the control tokens by role.
        added_tokens: text of every token that :meth:`encode_markup` finds, with its id.
        special_tokens: those of them that are control tokens; others, such as ``<think>``, are text, which a
            message may write.
        chat_template: of the model, if there is one.
    """

    size: int
    special: SpecialIds
    added_tokens: Mapping[str, int]
    special_tokens: Mapping[str, int]
    chat_template: ChatTemplate | None = None

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, with nothing added before or after.

        Text that looks like an added token is encoded as ordinary text.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of ``ids``, without control tokens when asked; bytes that are not UTF-8 become U+FFFD."""

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids of the control tokens."""
        return frozenset(self.special_tokens.values())

    @cached_property
    def control_tokens(self) -> re.Pattern[str]:
        """Finds the control tokens in a text; of two that begin at one place, the longer."""
        return _one_of(self.special_tokens)

    @cached_property
    def markup(self) -> re.Pattern[str]:
        """Finds the added tokens in a text in the same way."""
        return _one_of(self.added_tokens)

    def without_markup(self, text: str) -> str:
        """``text`` for a template, such that :meth:`encode_markup` finds no control token in it."""
        return self.control_tokens.sub(
            lambda found: "".join(chr(_BYTE + byte) for byte in found[0].encode()), text
        )

    def shown(self, text: str) -> str:
        """A text of :meth:`without_markup` as people wrote it."""
        return _BYTES.sub(_plain, text)

    def encode_markup(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, the added tokens in it included."""
        rows = [self.markup.split(text) for text in texts]
        ordinary = list(dict.fromkeys(part for row in rows for part in row[::2]))  # templates repeat theirs
        encoded = self.encode_batch([self.shown(part) for part in ordinary])
        ids = dict(zip(ordinary, encoded, strict=True))
        ids |= {text: [number] for text, number in self.added_tokens.items()}
        return [[number for part in row for number in ids[part]] for row in rows]


def _one_of(tokens: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def _plain(found: re.Match[str]) -> str:
    return bytes(ord(letter) - _BYTE for letter in found[0]).decode(errors="replace")


def chat_stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that end a response: the turn's end (if the tokenizer has one), then the end of text."""
    special = tokenizer.special
    turn_end = () if special.turn_end is None else (special.turn_end,)
    return (*turn_end, special.end_of_text)


def read_text(path: Path) -> str:
    """The whole UTF-8 text of a file.

    Raises:
        DataError: the file cannot be read, or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give the tokenizer's file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}); copy it again") from error
