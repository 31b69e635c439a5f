"""Qwen2's byte-level BPE on the Rust ``tokenizers`` library."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers as rust
from tokenizers import decoders, models, normalizers, pre_tokenizers

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
from mindrlhf.utils.errors import DataError, inline_list
from mindrlhf.utils.files import read_json_object

# Control tokens may be in a vocabulary without a merge that makes them.
_LOOKS_SPECIAL = re.compile(r"<.*>|\[.*\]", re.DOTALL)


@dataclass(frozen=True)
class TokenizerConfig:
    """The part of ``tokenizer_config.json`` that is used.

    Attributes:
        added: text of each added token with its id, in id order.
        special: text of the special ones: flagged so, named in a role (``eos_token``), or ChatML's.
        eos, pad: text of these tokens.
    """

    added: Mapping[str, int] = field(default_factory=dict)
    special: frozenset[str] = frozenset(QWEN2_SPECIAL_TOKENS)
    eos: str = END_OF_TEXT
    pad: str = END_OF_TEXT


class Qwen2Tokenizer(Tokenizer):
    """Byte-level BPE with NFC normalisation; the ids equal those of ``transformers``' Qwen2 tokenizer.

    Create it with :meth:`from_vocab` or :meth:`from_json`.
    """

    def __init__(
        self,
        core: rust.Tokenizer,
        added: Mapping[str, int],
        special: Collection[str],
        config: TokenizerConfig,
        source: str,
    ) -> None:
        # Special to the core, which then finds none of them in a text: encode_markup does.
        core.add_special_tokens([rust.AddedToken(text, special=True, normalized=False) for text in added])
        core.encode_special_tokens = True
        self._core = core
        self.size = int(core.get_vocab_size(with_added_tokens=True))
        self.added_tokens = dict(added)
        self.special_tokens = {text: number for text, number in added.items() if text in special}
        self.special = _special_ids(self.special_tokens, config, source)

    @classmethod
    def from_vocab(
        cls, vocab_path: Path, merges_path: Path, config_path: Path | None = None
    ) -> Qwen2Tokenizer:
        """Reads ``vocab.json``, ``merges.txt`` and, when given, ``tokenizer_config.json``.

        Raises:
            DataError: a file is corrupt, or the files do not fit together.
        """
        vocab = read_vocab(vocab_path)
        config = read_tokenizer_config(config_path) if config_path is not None else TokenizerConfig()
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
        return cls(core, added, config.special, config, str(config_path or vocab_path))

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
        tokens = dict(sorted(core.get_added_tokens_decoder().items()))
        config = read_tokenizer_config(config_path) if config_path is not None else TokenizerConfig()
        special = {*config.special, *(token.content for token in tokens.values() if token.special)}
        added = {token.content: number for number, token in tokens.items()}
        return cls(core, added, special, config, str(path))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; see :class:`mindrlhf.data.tokenizer.Tokenizer`."""
        encodings = self._core.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of ``ids``; see :class:`mindrlhf.data.tokenizer.Tokenizer`."""
        kept = [int(i) for i in ids if not (skip_special and int(i) in self.control_ids)]
        return str(self._core.decode(kept, skip_special_tokens=False))


def _special_ids(tokens: Mapping[str, int], config: TokenizerConfig, source: str) -> SpecialIds:
    pad = config.pad
    end_of_text = tokens.get(END_OF_TEXT, tokens.get(config.eos))
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


def read_vocab(path: Path) -> dict[str, int]:
    """Token text to id from ``vocab.json``; ids are exactly 0 .. n - 1.

    Raises:
        DataError: a token or an id occurs twice, an id is not an integer, or ids have a gap.
    """
    vocab = read_json_object(path, DataError)
    wrong = [f"{token!r}: {value!r}" for token, value in vocab.items() if type(value) is not int]
    if wrong:
        raise DataError(f"{path}: ids that are not integers: {inline_list(wrong)}")
    if not vocab:
        raise DataError(f"{path}: holds no token")
    ids = sorted(vocab.values())
    repeated = sorted({low for low, high in itertools.pairwise(ids) if low == high})
    if repeated:
        raise DataError(f"{path}: ids used by two tokens: {inline_list(repeated)}")
    if ids[0] != 0 or ids[-1] != len(ids) - 1:
        gap = next(wanted for wanted, found in enumerate(ids) if wanted != found)
        raise DataError(
            f"{path}: {len(ids)} tokens must have the ids 0..{len(ids) - 1} without a gap, "
            f"but id {gap} is missing (smallest {ids[0]}, largest {ids[-1]})"
        )
    return vocab


def read_merges(path: Path, vocab: Mapping[str, int], added: Mapping[str, int]) -> list[tuple[str, str]]:
    """The merge rules of ``merges.txt`` in order, with or without the ``#version`` line on top.

    Args:
        path: the merges file.
        vocab: token text to id.
        added: added tokens, which no merge has to make.

    Raises:
        DataError: a line is not two tokens, a merge uses or makes a token that the vocabulary does not
            have, or no merge makes a token of the vocabulary (a truncated or foreign merges file).
    """
    merges: list[tuple[str, str]] = []
    faults: list[str] = []
    # Only \n ends a line: other characters that Unicode counts as line ends may be part of a token.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            faults.append(f"line {number}: {line[:60]!r} is not two tokens")
            continue
        unknown = [token for token in (left, right, left + right) if token not in vocab]
        if unknown:
            faults.append(f"line {number}: {unknown[0][:60]!r} is not in the vocabulary")
        merges.append((left, right))
    if faults:
        raise DataError(
            f"{path}: {len(faults)} bad merges: {inline_list(faults)}; does it belong to another vocabulary?"
        )
    made = {left + right for left, right in merges}
    orphans = [
        token
        for token in vocab
        if len(token) > 1 and token not in made and token not in added and not _LOOKS_SPECIAL.fullmatch(token)
    ]
    if orphans:
        raise DataError(
            f"{path}: no merge makes {len(orphans)} tokens of the vocabulary "
            f"({inline_list(map(repr, orphans))}); the file is cut short or belongs to another vocabulary"
        )
    return merges


def token_text(value: object) -> str | None:
    """The text of a token in ``tokenizer_config.json``: a string, or an object with its content."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def read_tokenizer_config(path: Path) -> TokenizerConfig:
    """The added tokens, end and padding tokens of ``tokenizer_config.json``.

    Raises:
        DataError: not JSON, or an added token has no id, no text, or the text or id of another one.
    """
    content = read_json_object(path, DataError)
    entries = content.get("added_tokens_decoder") or {}
    if not isinstance(entries, Mapping):
        raise DataError(f"{path}: added_tokens_decoder is {type(entries).__name__}, expected an object")
    added: dict[str, int] = {}
    named = [value for key, value in content.items() if key.endswith("_token")]
    more = content.get("additional_special_tokens")
    named += more if isinstance(more, list) else []
    special = {*QWEN2_SPECIAL_TOKENS, *filter(None, map(token_text, named))}
    for key, value in entries.items():
        text = token_text(value)
        if not key.isdecimal() or not text:
            raise DataError(f"{path}: added_tokens_decoder[{key!r}] is not an id with a token's content")
        if text in added:
            raise DataError(f"{path}: added token {text!r} has two ids, {added[text]} and {key}")
        added[text] = int(key)
        if not isinstance(value, Mapping) or value.get("special"):
            special.add(text)
    if len(set(added.values())) < len(added):
        raise DataError(f"{path}: added_tokens_decoder gives one id to two tokens")
    return TokenizerConfig(
        added=dict(sorted(added.items(), key=lambda item: item[1])),
        special=frozenset(special),
        eos=token_text(content.get("eos_token")) or END_OF_TEXT,
        pad=token_text(content.get("pad_token")) or END_OF_TEXT,
    )


def place_added_tokens(config: TokenizerConfig, vocab: Mapping[str, int], source: str) -> dict[str, int]:
    """Ids of all added tokens: those of the config, else Qwen2's three, directly after the vocabulary.

    Args:
        config: the tokenizer config.
        vocab: token text to id, ids 0 .. n - 1.
        source: names the config in an error.

    Raises:
        DataError: an added id contradicts the vocabulary, or leaves a gap after it.
    """
    added = dict(config.added)
    following = len(vocab)
    for text, wanted in sorted(added.items(), key=lambda item: item[1]):
        if text in vocab:
            expected = vocab[text]
        else:
            expected = following
            following += 1
        if wanted != expected:
            raise DataError(
                f"{source}: added token {text!r} has id {wanted}, but with a vocabulary of {len(vocab)} "
                f"tokens it must be {expected}; the config belongs to another vocabulary"
            )
    for text in QWEN2_SPECIAL_TOKENS if not added else ():
        if text in vocab:
            added[text] = vocab[text]
        else:
            added[text] = following
            following += 1
    return added
