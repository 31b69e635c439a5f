"""A sentencepiece ``.model`` as a tokenizer of the library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from mindrlhf.data.tokenizer import IM_END, IM_START, SpecialIds, Tokenizer
from mindrlhf.utils.errors import DataError


class SentencePieceTokenizer(Tokenizer):
    """Unigram or BPE model of sentencepiece.

    The end of text is the model's ``</s>``; padding is its pad piece, or the end of text when it has
    none. ChatML works when the model has ``<|im_start|>`` and ``<|im_end|>`` as CONTROL symbols:
    user-defined symbols would let user text close a turn.

    Raises:
        DataError: not a sentencepiece model, or a model without an end-of-text piece.
    """

    def __init__(self, path: Path) -> None:
        self._core = core = sentencepiece.SentencePieceProcessor()
        try:
            core.LoadFromSerializedProto(path.read_bytes())
        except (RuntimeError, OSError) as error:
            raise DataError(f"{path}: not a sentencepiece model ({error}); copy it again") from error
        if core.eos_id() < 0:
            raise DataError(f"{path}: the model has no end-of-text piece (</s>), which responses need")
        self.size = int(core.GetPieceSize())
        self.special_tokens = {core.IdToPiece(i): i for i in range(self.size) if core.IsControl(i)}
        self.added_tokens = self.special_tokens
        eos, pad, bos = core.eos_id(), core.pad_id(), core.bos_id()
        self.special = SpecialIds(
            end_of_text=eos,
            pad=pad if pad >= 0 else eos,
            begin_of_text=bos if bos >= 0 else None,
            turn_start=self.special_tokens.get(IM_START),
            turn_end=self.special_tokens.get(IM_END),
        )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See :class:`~mindrlhf.data.tokenizer.Tokenizer`."""
        return [list(ids) for ids in self._core.Encode(list(texts), out_type=int)]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of ``ids``; see :class:`mindrlhf.data.tokenizer.Tokenizer`."""
        parts: list[str] = []
        run: list[int] = []
        for i in map(int, ids):
            if i not in self.control_ids:
                run.append(i)
                continue
            if not skip_special:
                parts += [self._core.Decode(run), self._core.IdToPiece(i)]
                run = []
        return "".join([*parts, self._core.Decode(run)])
