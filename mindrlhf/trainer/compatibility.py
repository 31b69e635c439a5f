"""Does a checkpoint's configuration fit the job that wants to go on from it?"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindrlhf.parallel.layout import Mesh
from mindrlhf.utils.errors import CheckpointError
from mindrlhf.utils.logging import get_logger
from mindrlhf.utils.provenance import CONFIG_FILE, plain

logger = get_logger(__name__)

MODEL_KEYS = (
    r"model\.(vocab_size|hidden_size|num_layers|num_heads|n_kv_heads|intermediate_size|rms_norm_eps|theta"
    r"|qkv_has_bias|tie_word_embeddings)"
)
"""What makes a model another one, as a part of a regular expression."""


@dataclass(frozen=True)
class Kind:
    """What the checkpoints of a kind of job are like.

    Attributes:
        unit: what the job counts, ``iteration`` or ``step``; its checkpoints are named after it.
        parts: name of each model that is trained -> where the configuration has its YAML, a dotted path.
        fixed: keys that must stay: with another value, the weights, moments or orders that were saved mean
            something else.
        unimportant: keys that nobody needs to hear of.
    """

    unit: str
    parts: Mapping[str, str]
    fixed: re.Pattern[str]
    unimportant: re.Pattern[str]


PPO_JOB = Kind(
    unit="iteration",
    parts={"policy": "train", "critic": "critic"},
    fixed=re.compile(
        rf"(train|critic)\.{MODEL_KEYS}|(train|critic)\.optimizer\.type|ppo\.(critic|seed|shuffle)|stage"
    ),
    # Reference and generating policy have the sizes of the trained one, see check_job; paths may move.
    unimportant=re.compile(r"\w+\.(path|ignored.*)"),
)
_LAYOUT = re.compile(r"[\w.]+\.parallel\.\w+")
_MISSING = "(not there)"


def check_compatible(directory: Path, job: Any, kind: Kind = PPO_JOB, *, quiet: bool = False) -> None:
    """Refuses a checkpoint of another kind of job, and logs what has changed otherwise.

    Args:
        directory: the checkpoint.
        job: the present configuration, a dataclass or a mapping.
        kind: of the job.
        quiet: whether what has changed was told of already.

    Raises:
        CheckpointError: names every key that must not change, with both values; or the checkpoint's
            configuration cannot be read.
    """
    before = _flat(read_configuration(directory))
    now = _flat(json.loads(json.dumps(plain(job))))
    changed = {
        key: f"{key}: {before.get(key, _MISSING)} in the checkpoint, {now.get(key, _MISSING)} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key, _MISSING) != now.get(key, _MISSING) and not kind.unimportant.fullmatch(key)
    }
    if before.get("ppo.critic") == now.get("ppo.critic") == "shared":
        changed = {key: line for key, line in changed.items() if not key.startswith("critic.")}
    refused = [line for key, line in changed.items() if kind.fixed.fullmatch(key)]
    if refused:
        raise CheckpointError(
            f"{directory} cannot be resumed by this job, {len(refused)} difference(s); give the "
            f"configuration that made it ({CONFIG_FILE} in it), or start anew in another --save_ckpt_dir:"
            + "".join(f"\n  - {line}" for line in refused)
        )
    if quiet:
        return
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


def stored_meshes(directory: Path, kind: Kind = PPO_JOB) -> dict[str, Mesh]:
    """The mesh over which each model of a checkpoint is split, for PPO ``policy`` and ``critic``.

    Raises:
        CheckpointError: its configuration does not say so.
    """
    configuration = read_configuration(directory)
    try:
        return {name: _mesh_at(configuration, place) for name, place in kind.parts.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{directory / CONFIG_FILE}: names no layout ({error!r})") from error


def _mesh_at(configuration: Mapping[str, Any], place: str) -> Mesh:
    """The mesh of the YAML at a dotted path of a configuration."""
    section: Any = configuration
    for key in (*place.split("."), "parallel"):
        section = section[key]
    return Mesh(int(section["data_parallel"]), int(section["model_parallel"]))


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    return dict(_entries(content, prefix))


def _entries(content: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _entries(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
