"""Checks of tokenizers: against the vocabulary of the model, and between all models of a job."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mindrlhf.configs.keys import RunConfig
from mindrlhf.data.tokenizer import Tokenizer
from mindrlhf.data.tokenizer_loading import load_tokenizer
from mindrlhf.utils.errors import MindRLHFError

_PROBE = "What is 12 + 345? It's good; 你好，世界。\n\tRésumé <|im_end|>"
_PROBED_IDS = 512


def load_model_tokenizer(path: Path, config: RunConfig) -> Tokenizer:
    """The tokenizer of ``--tokenizer_path``, checked against the model's vocabulary.

    Raises:
        MindRLHFError: it has more tokens than the model.
    """
    tokenizer = load_tokenizer(path)
    if tokenizer.size > config.model.vocab_size:
        raise MindRLHFError(
            f"--tokenizer_path {path} has {tokenizer.size} tokens, more than the "
            f"model.model_config.vocab_size {config.model.vocab_size} of {config.path}; give the "
            "model's own"
        )
    return tokenizer


def check_one_tokenizer(paths: Mapping[str, Path | None]) -> None:
    """Refuses directories whose tokenizers differ: a reward model would not read what was generated.

    Args:
        paths: flag -> its path; only directories with a tokenizer's files count.

    Raises:
        MindRLHFError: names the flag, a token that differs, and both tokenizers.
        DataError: a tokenizer cannot be read.
    """
    found: dict[Path, str] = {}
    for flag, path in paths.items():
        if path is not None and _holds_tokenizer(path):
            found.setdefault(path.resolve(), f"--{flag} {path}")
    if len(found) < 2:
        return
    tokenizers = [(given, load_tokenizer(path)) for path, given in found.items()]
    (first, ours), *others = tokenizers
    for given, theirs in others:
        if difference := find_difference(ours, theirs):
            raise MindRLHFError(
                f"{given} has another tokenizer than {first} ({difference}); all models of a job read the "
                "same token ids: give models of one tokenizer"
            )


def find_difference(ours: Tokenizer, theirs: Tokenizer) -> str:
    """The first difference between two tokenizers, empty if none; added tokens may be missing at the end."""
    a, b = ours.encode_batch([_PROBE])[0], theirs.encode_batch([_PROBE])[0]
    if a != b:
        at = next(i for i, pair in enumerate(zip([*a, -1], [*b, -1], strict=False)) if pair[0] != pair[1])
        return f"a text is {[*b[: at + 1]][-3:]} ... instead of {[*a[: at + 1]][-3:]} ..."
    count = min(ours.size, theirs.size)
    for number in range(0, count, max(1, count // _PROBED_IDS)):
        texts = theirs.decode([number]), ours.decode([number])
        if texts[0] != texts[1]:
            return f"token {number} is {texts[0]!r} instead of {texts[1]!r}"
    for role in ("turn_start", "turn_end"):
        ids = getattr(theirs.special, role), getattr(ours.special, role)
        if None not in ids and ids[0] != ids[1]:
            return f"{role} is token {ids[0]} instead of {ids[1]}"
    return ""


def _holds_tokenizer(path: Path) -> bool:
    if not path.is_dir():
        return False
    pair = (path / "vocab.json").is_file() and (path / "merges.txt").is_file()
    return pair or (path / "tokenizer.json").is_file()
