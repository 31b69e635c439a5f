"""Loads a tokenizer from whatever files it has."""

from __future__ import annotations

from pathlib import Path

from mindrlhf.data.tokenizer import Tokenizer
from mindrlhf.data.tokenizer_qwen2 import Qwen2Tokenizer
from mindrlhf.utils.errors import DataError


def load_tokenizer(
    path: str | Path | None = None,
    *,
    vocab_path: str | Path | None = None,
    merges_path: str | Path | None = None,
    config_path: str | Path | None = None,
) -> Tokenizer:
    """Loads a tokenizer, by what its files are.

    Args:
        path: a directory with ``vocab.json`` + ``merges.txt`` (or only ``tokenizer.json``), with
            ``tokenizer_config.json`` if present; or a sentencepiece ``.model`` file; or a
            ``.tiktoken`` ranks file; or a directory with one of these two.
        vocab_path, merges_path: the two files of a byte-level BPE, in place of ``path``.
        config_path: a ``tokenizer_config.json`` for the added tokens; without one the tokens
            ``<|endoftext|>``, ``<|im_start|>``, ``<|im_end|>`` follow directly after the vocabulary.

    Raises:
        DataError: a file is missing, corrupt, or does not fit the others.
    """
    config = None if config_path is None else _existing(config_path, "tokenizer config")
    if path is not None:
        if vocab_path is not None or merges_path is not None:
            raise DataError(
                f"tokenizer: both {path} and {vocab_path or merges_path} are given; give a tokenizer path, "
                "or a vocabulary with its merges file"
            )
        return _load_from_path(_existing(path, "tokenizer"), config)
    if vocab_path is None or merges_path is None:
        missing = "vocabulary (vocab.json)" if vocab_path is None else "merges file (merges.txt)"
        raise DataError(f"tokenizer: no {missing} given; give both, or a tokenizer path")
    return Qwen2Tokenizer.from_vocab(
        _existing(vocab_path, "vocabulary"), _existing(merges_path, "merges file"), config
    )


def _existing(path: str | Path, kind: str) -> Path:
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such {kind}; give the path of an existing one")
    return path


def _load_from_path(path: Path, config: Path | None) -> Tokenizer:
    if path.is_dir():
        return _load_from_directory(path, config)
    if path.suffix == ".model":
        from mindrlhf.data.tokenizer_sentencepiece import SentencePieceTokenizer

        return SentencePieceTokenizer(path)
    if path.suffix == ".tiktoken":
        from mindrlhf.data.tokenizer_tiktoken import TiktokenTokenizer

        return TiktokenTokenizer(path)
    if path.name == "tokenizer.json":
        return Qwen2Tokenizer.from_json(path, config)
    raise DataError(
        f"{path}: not a tokenizer; give a directory with vocab.json and merges.txt, a sentencepiece .model, "
        "or a .tiktoken ranks file"
    )


def _load_from_directory(directory: Path, config: Path | None) -> Tokenizer:
    beside = directory / "tokenizer_config.json"
    config = config or (beside if beside.is_file() else None)
    vocab, merges = directory / "vocab.json", directory / "merges.txt"
    if vocab.is_file() and merges.is_file():
        return Qwen2Tokenizer.from_vocab(vocab, merges, config)
    singles = [directory / "tokenizer.json", *sorted(directory.glob("*.model"))]
    singles = [file for file in [*singles, *sorted(directory.glob("*.tiktoken"))] if file.is_file()]
    if len(singles) == 1:
        return _load_from_path(singles[0], config)
    found = ", ".join(file.name for file in singles) or "nothing of the kind"
    raise DataError(
        f"{directory}: holds no vocab.json with merges.txt, and not exactly one of tokenizer.json, *.model, "
        f"*.tiktoken (found {found})"
    )
