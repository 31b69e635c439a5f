"""Does a checkpoint's configuration fit the job that wants to go on from it?"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mindrlhf.configs.schema import JobConfig
from mindrlhf.parallel.layout import Mesh
from mindrlhf.utils.errors import CheckpointError
from mindrlhf.utils.logging import get_logger
from mindrlhf.utils.provenance import CONFIG_FILE, plain

logger = get_logger(__name__)

# With another value, the weights, moments or orders that were saved mean something else.
_FIXED = re.compile(
    r"(train|critic)\.model\.(vocab_size|hidden_size|num_layers|num_heads|n_kv_heads|intermediate_size"
    r"|rms_norm_eps|theta|qkv_has_bias|tie_word_embeddings)"
    r"|(train|critic)\.optimizer\.type"
    r"|ppo\.(critic|seed|shuffle)"
)
_LAYOUT = re.compile(r"\w+\.parallel\.\w+")
# The reference and the generating policy have the sizes of the trained one, see check_job; paths may move.
_UNIMPORTANT = re.compile(r"\w+\.(path|ignored.*)")
_MISSING = "(not there)"


def check_compatible(directory: Path, job: JobConfig) -> None:
    """Refuses a checkpoint of another kind of job, and logs what has changed otherwise.

    Raises:
        CheckpointError: names every key that must not change, with both values; or the checkpoint's
            configuration cannot be read.
    """
    before = _flat(read_configuration(directory))
    now = _flat(json.loads(json.dumps(plain(job))))
    changed = {
        key: f"{key}: {before.get(key, _MISSING)} in the checkpoint, {now.get(key, _MISSING)} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key, _MISSING) != now.get(key, _MISSING) and not _UNIMPORTANT.fullmatch(key)
    }
    if before.get("ppo.critic") == now.get("ppo.critic") == "shared":
        changed = {key: line for key, line in changed.items() if not key.startswith("critic.")}
    refused = [line for key, line in changed.items() if _FIXED.fullmatch(key)]
    if refused:
        raise CheckpointError(
            f"{directory} cannot be resumed by this job, {len(refused)} difference(s); give the "
            f"configuration that made it ({CONFIG_FILE} in it), or start anew in another --save_ckpt_dir:"
            + "".join(f"\n  - {line}" for line in refused)
        )
    resharded = [line for key, line in changed.items() if _LAYOUT.fullmatch(key)]
    if resharded:
        logger.info("the layout has changed, the checkpoint is resharded: %s", "; ".join(resharded))
    others = [line for key, line in changed.items() if not _LAYOUT.fullmatch(key)]
    if others:
        logger.info("the configuration has changed since the checkpoint: %s", "; ".join(others))


def read_configuration(directory: Path) -> dict[str, Any]:
    """The resolved configuration that made a checkpoint.

    Raises:
        CheckpointError: it is not there, or damaged.
    """
    path = directory / CONFIG_FILE
    try:
        configuration = json.loads(path.read_text(encoding="utf-8"))["configuration"]
        if not isinstance(configuration, dict):
            raise TypeError("its configuration is no mapping")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}), so this is no whole checkpoint; resume from another one"
        ) from error
    return configuration


def stored_meshes(directory: Path) -> dict[str, Mesh]:
    """The meshes over which a checkpoint's ``policy`` and ``critic`` are split.

    Raises:
        CheckpointError: its configuration does not say so.
    """
    configuration = read_configuration(directory)
    try:
        splits = {
            name: configuration[role]["parallel"]
            for name, role in (("policy", "train"), ("critic", "critic"))
        }
        return {
            name: Mesh(int(split["data_parallel"]), int(split["model_parallel"]))
            for name, split in splits.items()
        }
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{directory / CONFIG_FILE}: names no layout ({error!r})") from error


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    return dict(_entries(content, prefix))


def _entries(content: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _entries(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
