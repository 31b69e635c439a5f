"""A sentencepiece ``.model`` behind the library's tokenizer protocol."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import sentencepiece

from mindrlhf.data.tokenizer import IM_END, IM_START, SpecialIds
from mindrlhf.utils.errors import DataError


class SentencePieceTokenizer:
    """Unigram or BPE model of sentencepiece.

    The end of text is the model's ``</s>``; padding is its pad piece, or the end of text when it has
    none. ChatML works when the model has ``<|im_start|>`` and ``<|im_end|>`` as CONTROL symbols:
    user-defined symbols would let user text close a turn.

    Raises:
        DataError: not a sentencepiece model, or a model without an end-of-text piece.
    """

    def __init__(self, path: Path) -> None:
        self._core = sentencepiece.SentencePieceProcessor()
        try:
            self._core.LoadFromSerializedProto(path.read_bytes())
        except (RuntimeError, OSError) as error:
            raise DataError(f"{path}: not a sentencepiece model ({error}); copy it again") from error
        if self._core.eos_id() < 0:
            raise DataError(f"{path}: the model has no end-of-text piece (</s>), which responses need")
        self._special_tokens = {
            self._core.IdToPiece(i): i for i in range(self._core.GetPieceSize()) if self._core.IsControl(i)
        }
        eos, pad, bos = self._core.eos_id(), self._core.pad_id(), self._core.bos_id()
        self._special = SpecialIds(
            end_of_text=eos,
            pad=pad if pad >= 0 else eos,
            begin_of_text=bos if bos >= 0 else None,
            turn_start=self._special_tokens.get(IM_START),
            turn_end=self._special_tokens.get(IM_END),
        )
        self._special_ids = frozenset(self._special_tokens.values())
        longest_first = sorted(self._special_tokens, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    @property
    def size(self) -> int:
        """Number of pieces."""
        return int(self._core.GetPieceSize())

    @property
    def special(self) -> SpecialIds:
        """The control tokens by role."""
        return self._special

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Text of every control piece, with its id."""
        return self._special_tokens

    @property
    def chat_template(self) -> str | None:
        """A ``.model`` file holds no template."""
        return None

    def encode_batch(self, texts: Sequence[str], *, parse_special: bool = False) -> list[list[int]]:
        """Ids of each text; see :class:`mindrlhf.data.tokenizer.Tokenizer`."""
        if not parse_special:
            return [list(ids) for ids in self._core.Encode(list(texts), out_type=int)]
        return [self._encode_with_special(text) for text in texts]

    def _encode_with_special(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._split.split(text):
            if part in self._special_tokens:
                ids.append(self._special_tokens[part])
            elif part:
                ids.extend(self._core.Encode(part, out_type=int))
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of ``ids``; see :class:`mindrlhf.data.tokenizer.Tokenizer`."""
        parts: list[str] = []
        run: list[int] = []
        for i in map(int, ids):
            if i not in self._special_ids:
                run.append(i)
                continue
            if not skip_special:
                parts += [self._core.Decode(run), self._core.IdToPiece(i)]
                run = []
        return "".join([*parts, self._core.Decode(run)])
