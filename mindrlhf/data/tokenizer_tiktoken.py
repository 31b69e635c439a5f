"""A tiktoken ranks file (Qwen's first generation) as a tokenizer of the library."""

from __future__ import annotations

import base64
import binascii
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import tiktoken

from mindrlhf.data.tokenizer import (
    END_OF_TEXT,
    IM_END,
    IM_START,
    QWEN2_SPECIAL_TOKENS,
    QWEN_SPLIT_PATTERN,
    SpecialIds,
    Tokenizer,
    read_text,
)
from mindrlhf.utils.errors import DataError


class TiktokenTokenizer(Tokenizer):
    """Byte-pair ranks, one ``base64-token rank`` per line, cut by Qwen's pattern after NFC.

    The control tokens ``<|endoftext|>``, ``<|im_start|>``, ``<|im_end|>`` follow directly after the ranks.

    Raises:
        DataError: a line is not a token with its rank, a token or rank occurs twice, ranks have a gap,
            or one of the 256 single bytes is missing.
    """

    def __init__(self, path: Path) -> None:
        ranks = read_ranks(path)
        tokens = {text: len(ranks) + i for i, text in enumerate(QWEN2_SPECIAL_TOKENS)}
        self._core = tiktoken.Encoding(
            path.stem, pat_str=QWEN_SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=tokens
        )
        self.size = int(self._core.n_vocab)
        self.added_tokens = self.special_tokens = tokens
        self.special = SpecialIds(
            end_of_text=tokens[END_OF_TEXT],
            pad=tokens[END_OF_TEXT],
            turn_start=tokens[IM_START],
            turn_end=tokens[IM_END],
        )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See :class:`~mindrlhf.data.tokenizer.Tokenizer`."""
        return self._core.encode_ordinary_batch([unicodedata.normalize("NFC", text) for text in texts])

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """See :class:`~mindrlhf.data.tokenizer.Tokenizer`."""
        kept = [int(i) for i in ids if not (skip_special and int(i) in self.control_ids)]
        return str(self._core.decode(kept))


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token bytes to rank from a ``.tiktoken`` file; ranks are exactly 0 .. n - 1.

    Raises:
        DataError: as for :class:`TiktokenTokenizer`.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            encoded, rank = line.split()
            token, value = base64.b64decode(encoded, validate=True), int(rank)
        except (ValueError, binascii.Error) as error:
            raise DataError(f"{path}:{number}: {line[:60]!r} is not a base64 token and its rank") from error
        if token in ranks:
            raise DataError(
                f"{path}:{number}: token {token!r} occurs twice, with ranks {ranks[token]} and {value}"
            )
        ranks[token] = value
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise DataError(
            f"{path}: {len(missing)} of the 256 single bytes have no rank, first 0x{missing[0]:02x}"
        )
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise DataError(
            f"{path}: the {len(ranks)} ranks are not 0..{len(ranks) - 1} (largest {max(ranks.values())})"
        )
    return ranks
