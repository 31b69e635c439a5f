"""Writes a Hugging Face model directory: weights, index, config, tokenizer files."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindrlhf.checkpoint.hf_config import CONFIG_NAME
from mindrlhf.checkpoint.hf_directory import INDEX_SUFFIX, SAFETENSORS_NAME
from mindrlhf.checkpoint.source import WeightSource
from mindrlhf.checkpoint.views import CastSource, SelectedSource
from mindrlhf.checkpoint.writing import check_output_directory, write_weights
from mindrlhf.utils.errors import CheckpointError
from mindrlhf.utils.files import atomic_directory

DEFAULT_MAX_SHARD_BYTES = 5 * 10**9

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "generation_config.json",
)

_SHARD_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of a size such as "5GB" (10^9), "500MiB" (2^20) or "1000".

    Raises:
        CheckpointError: anything else, or zero.
    """
    match = _SIZE.fullmatch(text.strip())
    size = 0
    if match:
        unit = (match.group(2) or "").lower()
        base = 1024 if unit.endswith("i") else 1000
        size = int(float(match.group(1)) * base ** ("kmgt".index(unit[0]) + 1 if unit else 0))
    if size < 1:
        raise CheckpointError(f"{text!r} is no size: write it like 5GB, 500MB or 2GiB")
    return size


def plan_shards(source: WeightSource, max_shard_bytes: int) -> dict[str, list[str]]:
    """File name -> tensors, filled in order; a tensor larger than the limit gets a file of its own."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, info in source.tensors.items():
        if groups[-1] and filled + info.nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += info.nbytes
    if len(groups) == 1:
        return {SAFETENSORS_NAME: groups[0]}
    count = len(groups)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def check_hf_output(output_dir: Path, *, overwrite: bool) -> None:
    """Raises :class:`CheckpointError` when ``output_dir`` holds anything that must not be replaced."""
    check_output_directory(output_dir, _is_ours, overwrite=overwrite)


def is_weights_name(name: str) -> bool:
    """Whether ``name`` is one that weights, or their index, have in a Hugging Face directory."""
    return _SHARD_NAME.fullmatch(name) is not None


def _is_ours(entry: Path) -> bool:
    known = entry.name == CONFIG_NAME or entry.name in TOKENIZER_FILES
    return entry.is_file() and (known or is_weights_name(entry.name))


def write_hf_directory(
    output_dir: Path,
    source: CastSource,
    config: Mapping[str, Any],
    *,
    max_shard_bytes: int,
    tokenizer_dir: Path | None,
) -> list[Path]:
    """Writes the whole directory beside its place and moves it there.

    Args:
        output_dir: must have passed :func:`check_hf_output`.
        source: tensors under Hugging Face's names.
        config: content of ``config.json``.
        max_shard_bytes: limit of one weights file.
        tokenizer_dir: where tokenizer files are copied from.

    Returns:
        the weights files.
    """
    shards = plan_shards(source, max_shard_bytes)
    try:
        with atomic_directory(output_dir) as temporary:
            for file, names in shards.items():
                write_weights(
                    temporary / file,
                    SelectedSource(source, names),
                    producer="pt",
                    description=f"writing {file}",
                )
            source.check_overflow()
            if len(shards) > 1:
                weight_map = {name: file for file, names in shards.items() for name in names}
                index = {"metadata": {"total_size": source.nbytes}, "weight_map": weight_map}
                _write_json(temporary / (SAFETENSORS_NAME + INDEX_SUFFIX), index)
            _write_json(temporary / CONFIG_NAME, config)
            if tokenizer_dir is not None:
                for file in TOKENIZER_FILES:
                    if (tokenizer_dir / file).is_file():
                        shutil.copyfile(tokenizer_dir / file, temporary / file)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {output_dir}: {error.strerror or error}; free space, or write elsewhere"
        ) from error
    return [output_dir / file for file in shards]


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
