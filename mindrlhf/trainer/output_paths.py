"""All that a training program writes, held against all that it reads; needs no MindSpore."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mindrlhf.checkpoint.conversion import hf_output
from mindrlhf.checkpoint.manifest import MANIFEST_FILE
from mindrlhf.checkpoint.weight_files import weights_output
from mindrlhf.configs.fields import keys_of
from mindrlhf.configs.flags import PPOOptions, RunOptions
from mindrlhf.data.mindrecord import index_path, record_outputs, step_path
from mindrlhf.utils.errors import MindRLHFError
from mindrlhf.utils.outputs import Output, check_outputs, check_place
from mindrlhf.utils.provenance import read_provenance
from mindrlhf.utils.result_files import CONFIG_FILE

_RESULTS = re.compile(r"\w*(iteration|step)_\d+|final|tensorboard|wandb|swanlog|\w+\.(jsonl|json|png|md)")
"""What a run writes in ``--save_ckpt_dir``."""
_KINDS: dict[str, Callable[..., Output]] = {"--export_hf_dir": hf_output, "--save_full_ckpt": weights_output}


def check_strategy_outputs(options: PPOOptions, directory: Path) -> None:
    """Holds the directory of the strategy files against all that the flags name."""
    check_outputs([Output("output", directory, names=re.compile(r"\w+_strategy"))], _paths(options).items())


def check_run_outputs(options: RunOptions, save: Path, unit: str) -> None:
    """Holds all that a run writes against all that it reads, and against what is there."""
    for place in (save, *save.absolute().parents):
        if (place / MANIFEST_FILE).is_file():
            raise MindRLHFError(f"--save_ckpt_dir {save}: {place} is a checkpoint; give another directory")
    paths, replaces = _paths(options), replaceable(options, save)
    outputs, there = [Output("--save_ckpt_dir", save, names=_RESULTS)], []
    for flag, overwrite in replaces.items():
        path = paths.pop(flag)
        if flag in _KINDS:
            outputs.append(output_of(flag, path, overwrite=overwrite))
            continue
        of_a_step = re.escape(step_path(path, unit, "@").name).replace("@", r"\d+")
        outputs.append(Output(flag, path.parent, names=re.compile(rf"{of_a_step}(\.db)?")))
        found = {file for file in path.parent.glob("*") if re.fullmatch(of_a_step, file.name)}
        for file in sorted({step_path(path, unit, f"{1:06d}"), *found}):
            there += record_outputs(flag, file, overwrite=overwrite)
    if options.continues_in(save):
        paths.pop("--resume_from", None)
    indices = [(flag, index_path(path)) for flag, path in paths.items() if flag.endswith("_dataset_dir")]
    check_outputs(outputs, [*paths.items(), *indices])
    for output in there:
        check_place(output)


def replaceable(options: RunOptions, save: Path) -> dict[str, bool]:
    """The flag of each further output that is given -> whether one that exists may be replaced.

    It may with ``--overwrite``; and by a run that is continued when its own ``config.json`` names it.
    """
    own = read_provenance(save / CONFIG_FILE).get("outputs", {}) if options.continues_in(save) else {}
    return {
        flag: options.overwrite or own.get(flag) == path for flag, path in further_outputs(options).items()
    }


def further_outputs(options: RunOptions) -> dict[str, str]:
    """The flag of each output besides ``--save_ckpt_dir`` -> where it lies, as ``config.json`` keeps it."""
    paths = _paths(options)
    return {flag: os.path.realpath(paths[flag]) for flag in (*_KINDS, "--save_data_file") if flag in paths}


def output_of(flag: str, path: Path, *, overwrite: bool) -> Output:
    """``--export_hf_dir`` or ``--save_full_ckpt``."""
    return _KINDS[flag](flag, path, overwrite=overwrite)


def _paths(options: RunOptions) -> dict[str, Path]:
    """The paths among the options by their flags, except for ``--save_ckpt_dir``."""
    declaration: Any = type(options)
    return {
        key.flag or f"--{name}": path
        for name, key in keys_of(declaration).items()
        if isinstance(path := getattr(options, name), Path) and name != "save_ckpt_dir"
    }
