"""From one layout of weights to another: full file, rank directories, or between two splits."""

from __future__ import annotations

from pathlib import Path

from mindrlhf.checkpoint.hf_config import (
    CONFIG_NAME,
    check_same_model,
    finish_hf_config,
    hf_config_from_model,
    model_config_from_hf,
    read_hf_config,
)
from mindrlhf.checkpoint.shards import find_weights, open_full, rank_directories, ranks_output, split_to_ranks
from mindrlhf.checkpoint.weight_files import CKPT, weights_output, write_weights
from mindrlhf.configs.keys import ModelConfig
from mindrlhf.configs.load import load_run_config
from mindrlhf.parallel.layout import Mesh, mesh_of
from mindrlhf.utils.errors import CheckpointError
from mindrlhf.utils.outputs import check_outputs


def transform_checkpoint(
    input_path: Path,
    output_path: Path,
    *,
    input_config: Path | None = None,
    output_config: Path | None = None,
    suffix: str = CKPT,
    overwrite: bool = False,
) -> list[Path]:
    """Rewrites a checkpoint for another layout, bit for bit.

    Args:
        input_path: a full file or Hugging Face directory, the directory of rank directories, a checkpoint, or
            the results of a run.
        output_path: a full file, or the directory to make rank directories in.
        input_config: a YAML of the model, needed for rank directories without ``config.json`` when there is
            no ``output_config``.
        output_config: the YAML to split the output for; ``None``: one full file.
        suffix: of rank files, ``.ckpt`` or ``.safetensors``.
        overwrite: whether the output may be replaced.

    Returns:
        the files written.

    Raises:
        CheckpointError: nothing states the sizes, or nothing would change; YAMLs of different models, or
            weights that do not fit.
        MindRLHFError: the output exists, or would take the place of an input.
        ConfigError: a YAML has faults.
    """
    input_path = find_weights(input_path)
    is_split = bool(rank_directories(input_path))
    if input_config is not None and not is_split:
        raise CheckpointError(
            f"{input_path} holds no rank_0, rank_1, ...: a full input needs no --input_config"
        )
    if output_config is None and not is_split:
        raise CheckpointError("full to full changes nothing: give --output_config, or ranks as the --input")
    model, where, target = _model_and_target(input_path, input_config, output_config)
    output = weights_output if target is None else ranks_output
    check_outputs(
        [output("--output", output_path, overwrite=overwrite)],
        [("--input", input_path), ("--input_config", input_config), ("--output_config", output_config)],
    )
    source, layouts = open_full(input_path, model, where)
    with source:
        if target is None:
            write_weights(output_path, source, description=f"writing {output_path.name}")
            return [output_path]
        has_config = (input_path / CONFIG_NAME).is_file()
        config = read_hf_config(input_path) if has_config else hf_config_from_model(model)
        return split_to_ranks(
            source,
            {name: layout.on(target) for name, layout in layouts.items()},
            output_path,
            finish_hf_config(config, layouts, next(iter(source.tensors.values())).dtype),
            suffix=suffix,
            overwrite=overwrite,
            description="writing",
        )


def _model_and_target(
    input_path: Path, input_config: Path | None, output_config: Path | None
) -> tuple[ModelConfig, str, Mesh | None]:
    """The model, the file that states it, and the mesh to split it over; ``None``: one full file."""
    runs = [load_run_config(path) for path in (input_config, output_config) if path is not None]
    if not runs and not (input_path / CONFIG_NAME).is_file():
        raise CheckpointError(f"{input_path} does not say the model's sizes: give its YAML as --input_config")
    if not runs:
        return model_config_from_hf(read_hf_config(input_path), str(input_path)), str(input_path), None
    first, last = runs[0], runs[-1]
    check_same_model(first.model, last.model, str(first.path), str(last.path))
    return first.model, str(first.path), None if output_config is None else mesh_of(last)
