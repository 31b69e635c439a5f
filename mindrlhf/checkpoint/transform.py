"""From one layout of weights to another: full file, rank directories, or between two splits."""

from __future__ import annotations

from pathlib import Path

from mindrlhf.checkpoint.hf_config import check_same_model
from mindrlhf.checkpoint.shards import open_full, rank_directories, ranks_output, split_to_ranks
from mindrlhf.checkpoint.weight_files import CKPT, weights_output, write_weights
from mindrlhf.configs.load import load_run_config
from mindrlhf.configs.schema import ModelConfig, RunConfig
from mindrlhf.parallel.layout import mesh_of
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
        input_path: a full file or Hugging Face directory, or the directory of rank directories.
        output_path: a full file, or the directory to make rank directories in.
        input_config: the YAML that split the input; ``None``: the input is full.
        output_config: the YAML to split the output for; ``None``: one full file.
        suffix: of rank files, ``.ckpt`` or ``.safetensors``.
        overwrite: whether the output may be replaced.

    Returns:
        the files written.

    Raises:
        CheckpointError: no YAML at all, YAMLs of different models, or weights that do not fit.
        MindRLHFError: the output exists, or would take the place of an input.
        ConfigError: a YAML has faults.
    """
    source_run = None if input_config is None else load_run_config(input_config)
    target_run = None if output_config is None else load_run_config(output_config)
    model = _common_model(source_run, target_run)
    if source_run is not None and not rank_directories(input_path):
        raise CheckpointError(
            f"{input_path} holds no rank_0, rank_1, ...: a full input needs no --input_config"
        )
    output = weights_output if target_run is None else ranks_output
    check_outputs(
        [output("--output", output_path, overwrite=overwrite)],
        [("--input", input_path), ("--input_config", input_config), ("--output_config", output_config)],
    )
    source, layouts = open_full(input_path, model, None if source_run is None else mesh_of(source_run))
    with source:
        if target_run is None:
            write_weights(output_path, source, description=f"writing {output_path.name}")
            return [output_path]
        target = mesh_of(target_run)
        return split_to_ranks(
            source,
            {name: layout.on(target) for name, layout in layouts.items()},
            output_path,
            suffix=suffix,
            overwrite=overwrite,
            description="writing",
        )


def _common_model(source: RunConfig | None, target: RunConfig | None) -> ModelConfig:
    runs = [run for run in (source, target) if run is not None]
    if not runs:
        raise CheckpointError("full to full changes nothing: give --input_config, --output_config or both")
    check_same_model(runs[0].model, runs[-1].model, str(runs[0].path), str(runs[-1].path))
    return runs[0].model
