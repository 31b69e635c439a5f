"""Hugging Face Qwen2 directory <-> one MindSpore weights file, tensor by tensor."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindrlhf.checkpoint.element_types import DType, parse_dtype
from mindrlhf.checkpoint.hf_config import (
    CONFIG_NAME,
    HF_WEIGHTS_NAME,
    differences,
    finish_hf_config,
    hf_config_from_model,
    model_config_from_hf,
    read_hf_config,
    write_json,
)
from mindrlhf.checkpoint.shards import find_weights, open_full, open_parts
from mindrlhf.checkpoint.sources import CastSource, RenamedSource, WeightSource, closed_on_error, select
from mindrlhf.checkpoint.weight_checks import inferred
from mindrlhf.checkpoint.weight_files import (
    HF_SAFETENSORS,
    INDEX_SUFFIX,
    has_hf_weights,
    weights_output,
    write_weights,
)
from mindrlhf.configs.keys import ModelConfig
from mindrlhf.configs.load import load_run_config
from mindrlhf.models.families import family_of
from mindrlhf.utils.errors import CheckpointError
from mindrlhf.utils.files import atomic_directory, read_json_object
from mindrlhf.utils.logging import get_logger
from mindrlhf.utils.outputs import Output, check_outputs, directory_of

_YAML_SUFFIXES = (".yaml", ".yml")

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
)
_GENERATION_NAME = "generation_config.json"
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", re.IGNORECASE)


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion wrote."""

    files: tuple[Path, ...]
    tensors: int
    parameters: int
    nbytes: int

    def __str__(self) -> str:
        files = ", ".join(str(file) for file in self.files)
        return (
            f"{self.tensors} tensors, {self.parameters:,} parameters, {self.nbytes / 1e9:.2f} GB -> {files}"
        )


def hf_to_mindspore(
    input_dir: Path, output_file: Path, *, dtype: DType | None = None, overwrite: bool = False
) -> ConversionReport:
    """Converts a Hugging Face directory to a file with canonical names.

    Args:
        input_dir: ``config.json`` beside ``model.safetensors``, safetensors or torch shards with an index,
            or ``pytorch_model.bin``.
        output_file: ``.ckpt`` or ``.safetensors``.
        dtype: type of all weights; ``None`` keeps each as it is.
        overwrite: whether ``output_file`` may be replaced.

    Raises:
        CheckpointError: weights that are missing, extra or misshapen, all of them; values that do not fit
            ``dtype``.
        MindRLHFError: the output exists, or would take the place of the input.
    """
    check_outputs([weights_output("output", output_file, overwrite=overwrite)], [("input", input_dir)])
    if not input_dir.is_dir():
        raise CheckpointError(f"{input_dir} is not a directory: expected a Hugging Face model directory")
    where = str(input_dir / CONFIG_NAME)
    full, _ = open_full(input_dir, model_config_from_hf(read_hf_config(input_dir), where), where)
    with CastSource(full, dtype) as source:
        write_weights(output_file, source, description=f"writing {output_file.name}")
        return _report(source, (output_file,))


def mindspore_to_hf(
    input_path: Path,
    output_dir: Path,
    *,
    config: Path | None = None,
    tokenizer_dir: Path | None = None,
    dtype: DType | None = None,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> ConversionReport:
    """Converts MindSpore weights to a directory that transformers loads.

    Args:
        input_path: a file with canonical names, rank directories, a checkpoint, or the results of a run.
        output_dir: the directory to make.
        config: a Hugging Face ``config.json`` or the directory with it, or one of our model YAMLs; defaults
            to the ``config.json`` in ``input_path`` or else in ``tokenizer_dir``.
        tokenizer_dir: where tokenizer files are copied from; defaults to ``config`` when that is a directory.
        dtype: type of all weights; ``None`` keeps each as it is.
        max_shard_bytes: larger models are written as several files with an index.
        overwrite: whether a previous export may be replaced.

    Raises:
        CheckpointError, MindRLHFError: as :func:`hf_to_mindspore`; no config.
    """
    input_path = find_weights(input_path)
    if tokenizer_dir is None and config is not None:
        tokenizer_dir = config if config.is_dir() else None
    if config is None:
        config = _config_beside(tokenizer_dir, input_path)
    is_yaml = config.suffix in _YAML_SUFFIXES
    if is_yaml:
        model = load_run_config(config).model
    else:
        model = model_config_from_hf(read_hf_config(config), str(config))
    return export_hf(
        input_path,
        output_dir,
        model,
        dtype=dtype,
        hf_config=None if is_yaml else config,
        tokenizer_dir=tokenizer_dir,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
    )


def export_hf(
    weights_path: Path,
    output_dir: Path,
    model: ModelConfig,
    *,
    dtype: str | DType | None = None,
    tokenizer_dir: Path | None = None,
    hf_config: Path | None = None,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    overwrite: bool = False,
    leave_out: Collection[str] = (),
) -> ConversionReport:
    """Writes MindSpore weights as a directory that transformers loads.

    Args:
        weights_path: a full file with canonical names, or rank directories.
        output_dir: appears when complete.
        model: sizes of the model.
        dtype: type of all weights ("fp32", "fp16", "bf16" or the long names); ``None`` keeps each as it is.
        tokenizer_dir: where tokenizer files and ``generation_config.json`` are copied from.
        hf_config: base of the written ``config.json``; defaults to the one in ``tokenizer_dir`` if it
            describes the same model, else one is made from ``model``.
        max_shard_bytes: larger models are written as several files with an index.
        overwrite: whether a previous export may be replaced.
        leave_out: canonical names that are not exported, such as a policy's value head.

    Raises:
        CheckpointError: weights that do not fit ``model``.
        MindRLHFError: the output exists, or would take the place of an input.
    """
    weights_path, output_dir = Path(weights_path), Path(output_dir)
    wanted = parse_dtype(dtype) if isinstance(dtype, str) else dtype
    check_outputs(
        [hf_output("output", output_dir, overwrite=overwrite)],
        [("input", weights_path), ("config", hf_config), ("tokenizer", tokenizer_dir)],
    )
    _check_tokenizer_dir(tokenizer_dir)
    base = _base_config(model, hf_config, tokenizer_dir)
    generation = _generation_config(model, base, hf_config, tokenizer_dir)
    stored, _ = open_full(weights_path, model)
    with stored:
        family = family_of(model)
        hf_names = family.weight_names.canonical_to_hf(model.num_layers)
        names = [name for name in stored.tensors if name not in leave_out]
        source = CastSource(RenamedSource(stored, {hf_names[name]: name for name in names}), wanted)
        stored_type = stored.tensors[family.layouts.EMBEDDING].dtype
        config = finish_hf_config(base, names, stored_type if wanted is None else wanted)
        files = write_hf_directory(
            output_dir,
            source,
            config,
            max_shard_bytes=max_shard_bytes,
            tokenizer_dir=tokenizer_dir,
            generation=generation,
        )
        return _report(source, files)


def _base_config(model: ModelConfig, hf_config: Path | None, tokenizer_dir: Path | None) -> Mapping[str, Any]:
    """The base of ``config.json``: the one given, one of this model beside the tokenizer, or a new one."""
    if hf_config is not None:
        return read_hf_config(hf_config)
    if tokenizer_dir is not None and (tokenizer_dir / CONFIG_NAME).is_file():
        beside = read_json_object(tokenizer_dir / CONFIG_NAME, CheckpointError)
        if _describes(beside, model):
            return beside
        # A tokenizer is often taken from a larger model of the family, whose config must not be written.
        get_logger(__name__).info(
            "%s does not describe this model and is not used", tokenizer_dir / CONFIG_NAME
        )
    return hf_config_from_model(model)


def _generation_config(
    model: ModelConfig, base: Mapping[str, Any], hf_config: Path | None, tokenizer_dir: Path | None
) -> Mapping[str, Any]:
    """``generation_config.json``: the one beside the tokenizer or the config, else one of the token ids."""
    for place in filter(None, (tokenizer_dir, hf_config)):
        path = (place if place.is_dir() else place.parent) / _GENERATION_NAME
        if path.is_file():
            return read_json_object(path, CheckpointError)
    ids = {key: base[key] for key in _TOKEN_IDS if base.get(key) is not None}
    return {"pad_token_id": model.pad_token_id, **ids} if "eos_token_id" in ids else ids


def _describes(config: Mapping[str, Any], model: ModelConfig) -> bool:
    if config.get("model_type") != family_of(model).hf_model_type:
        return False
    try:
        return not differences(model_config_from_hf(config, CONFIG_NAME), model)
    except CheckpointError:
        return False


def _config_beside(tokenizer_dir: Path | None, input_path: Path) -> Path:
    for place in (input_path, tokenizer_dir):
        if place is not None and (place / CONFIG_NAME).is_file():
            return place / CONFIG_NAME
    parts, mesh = open_parts(input_path)
    with closed_on_error(parts):
        raise CheckpointError(
            f"{input_path} does not state the number of attention heads ({inferred(parts[0], mesh)}): "
            "give --config with the original config.json (or its directory) or a model YAML"
        )


def _check_tokenizer_dir(tokenizer_dir: Path | None) -> None:
    if tokenizer_dir is None:
        return
    if not tokenizer_dir.is_dir():
        raise CheckpointError(f"{tokenizer_dir} is not a directory: expected one with tokenizer files")
    if not any((tokenizer_dir / file).is_file() for file in (*TOKENIZER_FILES, CONFIG_NAME)):
        raise CheckpointError(f"{tokenizer_dir} has none of the tokenizer files {', '.join(TOKENIZER_FILES)}")


def _report(source: WeightSource, files: tuple[Path, ...]) -> ConversionReport:
    infos = source.tensors.values()
    return ConversionReport(files, len(infos), sum(info.size for info in infos), source.nbytes)


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
        raise CheckpointError(f"{text!r} is not a size: write it like 5GB, 500MB or 2GiB")
    return size


def plan_shards(source: WeightSource, max_shard_bytes: int) -> dict[str, list[str]]:
    """File name -> tensors, filled in order; a tensor larger than the limit gets its own file."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, info in source.tensors.items():
        if groups[-1] and filled + info.nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += info.nbytes
    if len(groups) == 1:
        return {HF_SAFETENSORS: groups[0]}
    count = len(groups)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def hf_output(flag: str, path: Path, *, overwrite: bool = False) -> Output:
    """A Hugging Face directory, for :func:`mindrlhf.utils.outputs.check_outputs`."""
    return Output(flag, path, directory_of("a Hugging Face model", _is_ours, has_hf_weights), overwrite)


def _is_ours(entry: Path) -> bool:
    known = entry.name in (CONFIG_NAME, _GENERATION_NAME, *TOKENIZER_FILES)
    return entry.is_file() and (known or HF_WEIGHTS_NAME.fullmatch(entry.name) is not None)


def write_hf_directory(
    output_dir: Path,
    source: CastSource,
    config: Mapping[str, Any],
    *,
    max_shard_bytes: int,
    tokenizer_dir: Path | None = None,
    generation: Mapping[str, Any] | None = None,
) -> tuple[Path, ...]:
    """Writes a whole Hugging Face directory, which appears when it is complete.

    Args:
        output_dir: must have passed :func:`mindrlhf.utils.outputs.check_outputs`.
        source: tensors under Hugging Face's names.
        config: content of ``config.json``.
        max_shard_bytes: larger models are written as several files with an index.
        tokenizer_dir: where tokenizer files are copied from.
        generation: content of ``generation_config.json``.

    Returns:
        the weights files.
    """
    shards = plan_shards(source, max_shard_bytes)
    try:
        with atomic_directory(output_dir) as temporary:
            for file, names in shards.items():
                write_weights(
                    temporary / file,
                    select(source, names),
                    producer="pt",
                    description=f"writing {file}",
                )
            source.check_overflow()
            if len(shards) > 1:
                weight_map = {name: file for file, names in shards.items() for name in names}
                index = {"metadata": {"total_size": source.nbytes}, "weight_map": weight_map}
                write_json(temporary / (HF_SAFETENSORS + INDEX_SUFFIX), index)
            write_json(temporary / CONFIG_NAME, config)
            if generation is not None:
                write_json(temporary / _GENERATION_NAME, generation)
            if tokenizer_dir is not None:
                for file in TOKENIZER_FILES:
                    if (tokenizer_dir / file).is_file():
                        shutil.copyfile(tokenizer_dir / file, temporary / file)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {output_dir}: {error.strerror or error}; free space, or write elsewhere"
        ) from error
    return tuple(output_dir / file for file in shards)
