"""Qwen2's byte-level BPE on the Rust ``tokenizers`` library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers as rust
from tokenizers import decoders, models, normalizers, pre_tokenizers

from mindrlhf.data.tokenizer_files import (
    TokenizerConfig,
    place_added_tokens,
    read_merges,
    read_tokenizer_config,
    read_vocab,
)
from mindrlhf.data.tokenizers import END_OF_TEXT, IM_END, IM_START, QWEN_SPLIT_PATTERN, SpecialIds
from mindrlhf.utils.errors import DataError


class Qwen2Tokenizer:
    """Byte-level BPE with NFC normalisation; the ids equal those of ``transformers``' Qwen2 tokenizer.

    Make it with :meth:`from_vocab` or :meth:`from_json`.
    """

    def __init__(
        self,
        core: rust.Tokenizer,
        special_tokens: Mapping[str, int],
        config: TokenizerConfig | None,
        source: str,
    ) -> None:
        # All added tokens count as control tokens, "special" in the config or not: user text must not
        # be able to write any of them.
        core.add_special_tokens(
            [rust.AddedToken(text, special=True, normalized=False) for text in special_tokens]
        )
        core.encode_special_tokens = True
        self._core = core
        self._special_tokens = dict(special_tokens)
        self._special_ids = frozenset(special_tokens.values())
        self._special = _special_ids(self._special_tokens, config, source)
        self._chat_template = config.chat_template if config is not None else None

    @classmethod
    def from_vocab(
        cls, vocab_path: Path, merges_path: Path, config_path: Path | None = None
    ) -> Qwen2Tokenizer:
        """Reads ``vocab.json``, ``merges.txt`` and, when given, ``tokenizer_config.json``.

        Raises:
            DataError: a file is corrupt, or the files do not fit together.
        """
        vocab = read_vocab(vocab_path)
        config = read_tokenizer_config(config_path) if config_path is not None else None
        added = place_added_tokens(config, vocab, str(config_path))
        merges = read_merges(merges_path, vocab, added)
        core = rust.Tokenizer(models.BPE(vocab=vocab, merges=merges))
        core.normalizer = normalizers.NFC()
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(rust.Regex(QWEN_SPLIT_PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        core.decoder = decoders.ByteLevel()
        return cls(core, added, config, str(config_path or vocab_path))

    @classmethod
    def from_json(cls, path: Path, config_path: Path | None = None) -> Qwen2Tokenizer:
        """Reads a whole ``tokenizer.json`` of the Rust library, as it is.

        Raises:
            DataError: the file is not one, or names no control tokens.
        """
        try:
            core = rust.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{path}: not a tokenizer.json ({error})") from error
        added = {token.content: number for number, token in sorted(core.get_added_tokens_decoder().items())}
        config = read_tokenizer_config(config_path) if config_path is not None else None
        return cls(core, added, config, str(path))

    @property
    def size(self) -> int:
        """Number of ids, added tokens included."""
        return int(self._core.get_vocab_size(with_added_tokens=True))

    @property
    def special(self) -> SpecialIds:
        """The control tokens by role."""
        return self._special

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Text of every added token, with its id."""
        return self._special_tokens

    @property
    def chat_template(self) -> str | None:
        """The template text of the config."""
        return self._chat_template

    def encode_batch(self, texts: Sequence[str], *, parse_special: bool = False) -> list[list[int]]:
        """Ids of each text; see :class:`mindrlhf.data.tokenizers.Tokenizer`."""
        self._core.encode_special_tokens = not parse_special
        encodings = self._core.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of ``ids``; see :class:`mindrlhf.data.tokenizers.Tokenizer`."""
        kept = [int(i) for i in ids if not (skip_special and int(i) in self._special_ids)]
        return str(self._core.decode(kept, skip_special_tokens=False))


def _special_ids(tokens: Mapping[str, int], config: TokenizerConfig | None, source: str) -> SpecialIds:
    eos = (config.eos if config is not None else None) or END_OF_TEXT
    pad = (config.pad if config is not None else None) or END_OF_TEXT
    end_of_text = tokens.get(END_OF_TEXT, tokens.get(eos))
    if end_of_text is None:
        raise DataError(f"{source}: names neither {END_OF_TEXT} nor another end token among its added tokens")
    if pad not in tokens and pad != END_OF_TEXT:
        raise DataError(f"{source}: pad_token {pad!r} is not among the added tokens {', '.join(tokens)}")
    return SpecialIds(
        end_of_text=end_of_text,
        pad=tokens.get(pad, end_of_text),
        turn_start=tokens.get(IM_START),
        turn_end=tokens.get(IM_END),
    )
