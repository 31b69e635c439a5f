"""All that a training program writes, held against all that it reads; needs no MindSpore."""

from __future__ import annotations

import re
from glob import escape
from pathlib import Path
from typing import Any

from mindrlhf.checkpoint.conversion import hf_output
from mindrlhf.checkpoint.weight_files import weights_output
from mindrlhf.configs.fields import keys_of
from mindrlhf.configs.flags import PPOOptions, RunOptions
from mindrlhf.data.mindrecord import index_path, record_outputs, step_path
from mindrlhf.utils.outputs import Output, check_outputs

_RESULTS = re.compile(r"\w*(iteration|step)_\d+|final|tensorboard|wandb|swanlog|\w+\.(jsonl|json|png|md)")
"""What a run writes in ``--save_ckpt_dir``."""


def check_strategy_outputs(options: PPOOptions, directory: Path) -> None:
    """Holds the directory of the strategy files against all that the flags name."""
    check_outputs([Output("output", directory, names=re.compile(r"\w+_strategy"))], _paths(options).items())


def check_run_outputs(options: RunOptions, save: Path, unit: str) -> None:
    """Holds all that a run writes against all that it reads.

    A run that is continued may replace what it wrote before.
    """
    continues = options.continues_in(save)
    overwrite = options.overwrite or (
        continues and any(_RESULTS.fullmatch(path.name) for path in save.glob("*"))
    )
    paths = _paths(options)
    outputs = [Output("--save_ckpt_dir", save, names=_RESULTS)]
    for flag, make in (("--export_hf_dir", hf_output), ("--save_full_ckpt", weights_output)):
        if path := paths.pop(flag, None):
            outputs.append(make(flag, path, overwrite=overwrite))
    if path := paths.pop("--save_data_file", None):
        found = path.parent.glob(step_path(Path(escape(path.name)), unit, "*").name)
        for file in sorted({step_path(path, unit, f"{1:06d}"), *found}):
            outputs += record_outputs("--save_data_file", file, overwrite=overwrite)
    if continues:
        paths.pop("--resume_from", None)
    indices = [(flag, index_path(path)) for flag, path in paths.items() if flag.endswith("_dataset_dir")]
    check_outputs(outputs, [*paths.items(), *indices])


def _paths(options: RunOptions) -> dict[str, Path]:
    """The paths among the options by their flags, except for ``--save_ckpt_dir``."""
    declaration: Any = type(options)
    return {
        key.flag or f"--{name}": path
        for name, key in keys_of(declaration).items()
        if isinstance(path := getattr(options, name), Path) and name != "save_ckpt_dir"
    }
