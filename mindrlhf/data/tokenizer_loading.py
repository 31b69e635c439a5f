"""Loads a tokenizer from whatever files it has."""

from __future__ import annotations

from pathlib import Path

from mindrlhf.data.prompt_format import turn_markup
from mindrlhf.data.tokenizer import END_OF_TEXT, ChatTemplate, Tokenizer, read_text
from mindrlhf.data.tokenizer_qwen2 import Qwen2Tokenizer, token_text
from mindrlhf.utils.errors import DataError
from mindrlhf.utils.files import read_json_object


def load_tokenizer(
    path: str | Path | None = None,
    *,
    vocab_path: str | Path | None = None,
    merges_path: str | Path | None = None,
    config_path: str | Path | None = None,
) -> Tokenizer:
    """Loads a tokenizer, by what its files are, with its chat template.

    The template is ``chat_template.jinja`` beside the config (without a config, beside the tokenizer), else
    the config's own.

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
        place = _existing(path, "tokenizer")
        if config is None and (place / "tokenizer_config.json").is_file():
            config = place / "tokenizer_config.json"
        tokenizer = _load_from_path(place, config)
    else:
        if vocab_path is None or merges_path is None:
            missing = "vocabulary (vocab.json)" if vocab_path is None else "merges file (merges.txt)"
            raise DataError(f"tokenizer: no {missing} given; give both, or a tokenizer path")
        place = _existing(vocab_path, "vocabulary")
        tokenizer = Qwen2Tokenizer.from_vocab(place, _existing(merges_path, "merges file"), config)
    if config is not None:
        place = config
    tokenizer.chat_template = read_chat_template(place if place.is_dir() else place.parent, config)
    # Some tokens that mark turns are not flagged special, such as DeepSeek's <｜User｜>.
    written = tokenizer.markup.findall(turn_markup(tokenizer.chat_template))
    added = tokenizer.added_tokens
    tokenizer.special_tokens = {**tokenizer.special_tokens, **{text: added[text] for text in written}}
    return tokenizer


def read_chat_template(directory: Path, config: Path | None) -> ChatTemplate | None:
    """The template of ``chat_template.jinja``, else the config's: a text, or one of several with names.

    Args:
        directory: where ``chat_template.jinja`` may be.
        config: a ``tokenizer_config.json``, which also says what the template calls control tokens.

    Raises:
        DataError: a file cannot be read, or none of the named templates is the default.
    """
    content = {} if config is None else read_json_object(config, DataError)
    named = dict.fromkeys(("eos_token", "pad_token", "unk_token"), END_OF_TEXT) | content
    tokens = {name: text for name in named if name.endswith("_token") and (text := token_text(named[name]))}
    file = directory / "chat_template.jinja"
    if file.is_file():
        return ChatTemplate(read_text(file), str(file), tokens)
    found = content.get("chat_template")
    if isinstance(found, list):
        templates = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = templates.get("default", templates)
    if not isinstance(found, str | None):
        raise DataError(
            f"{config}: chat_template is neither a text nor a list with a template of the name default; give "
            "one, or put it into chat_template.jinja"
        )
    return None if found is None else ChatTemplate(found, str(config), tokens)


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
