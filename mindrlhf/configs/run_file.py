"""One MindFormers YAML: sections -> checked values -> :class:`RunConfig`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindrlhf.configs import keys
from mindrlhf.configs.faults import Faults, did_you_mean, shown
from mindrlhf.configs.optimizer import read_lr_schedule, read_optimizer
from mindrlhf.configs.rules import Rule, join, read_section
from mindrlhf.configs.schema import ContextConfig, ModelConfig, ParallelConfig, RunConfig, RunnerConfig
from mindrlhf.configs.yaml_file import read_mapping
from mindrlhf.utils.logging import get_logger


@dataclass
class RunDraft:
    """The valid values of one YAML; keys with a fault are absent, so checks run on what is there."""

    path: Path
    readable: bool = False
    context: dict[str, Any] = field(default_factory=dict)
    parallel: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    lr_schedule: dict[str, Any] = field(default_factory=dict)
    runner: dict[str, Any] = field(default_factory=dict)
    sections: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    @property
    def world_size(self) -> int | None:
        """Ranks of the split, ``None`` when a size has a fault."""
        sizes = self.parallel.get("data_parallel"), self.parallel.get("model_parallel")
        return None if sizes[0] is None or sizes[1] is None else sizes[0] * sizes[1]

    def build(self) -> RunConfig:
        """The configuration; only for a draft without faults."""
        return RunConfig(
            path=self.path,
            context=ContextConfig(**self.context),
            parallel=ParallelConfig(**self.parallel),
            model=ModelConfig(**self.model),
            optimizer=self.optimizer,
            lr_schedule=self.lr_schedule,
            runner=RunnerConfig(**self.runner),
            ignored=self.ignored,
        )


def read_run(path: Path, faults: Faults, *, device_target: str | None, single_process: bool) -> RunDraft:
    """Reads one YAML; everything wrong within the file becomes a fault.

    Args:
        path: the YAML.
        faults: collects what is wrong.
        device_target: replaces ``context.device_target``.
        single_process: replaces the split by data_parallel 1, model_parallel 1.
    """
    draft = RunDraft(path)
    root = read_mapping(path, faults)
    if root is None:
        return draft
    draft.readable = True
    draft.sections = tuple(key for key in root if isinstance(key, str) and root[key] is not None)
    draft.ignored = tuple(key for key in root if key in keys.IGNORED_SECTIONS)
    if draft.ignored:
        get_logger(__name__).info("%s: not used by PPO: %s", path, ", ".join(draft.ignored))
    _check_top_level(root, str(path), faults)
    draft.context = _read_context(root, path, faults, device_target)
    draft.parallel = _read_parallel(root, path, faults, single_process)
    draft.model = _read_model(root, path, faults)
    _fit_to_device(draft)
    if (section := _section(root, "runner_config", path, faults)) is not None:
        where = join(str(path), "runner_config")
        draft.runner = read_section(section, keys.RUNNER_RULES, faults, where, accepted=keys.RUNNER_ACCEPTED)
    if (section := _section(root, "optimizer", path, faults)) is not None:
        draft.optimizer = read_optimizer(section, join(str(path), "optimizer"), faults)
    if (section := _section(root, "lr_schedule", path, faults)) is not None:
        draft.lr_schedule = read_lr_schedule(section, join(str(path), "lr_schedule"), faults)
    return draft


def _section(
    parent: Mapping[Any, Any], name: str, path: Path | str, faults: Faults, *, required: bool = False
) -> dict[Any, Any] | None:
    """The mapping ``name`` of ``parent``; ``None`` when absent, or with a fault when it is no mapping."""
    where = join(str(path), name)
    value = parent.get(name)
    if value is None:
        if required:
            faults.add(where, "missing", "add this section")
        return None
    if not isinstance(value, dict):
        faults.add(where, f"wrong type ({shown(value)})", "must be a section with keys of its own")
        return None
    return value


def _check_top_level(root: Mapping[Any, Any], where: str, faults: Faults) -> None:
    known = [*keys.USED_SECTIONS, *keys.IGNORED_SECTIONS, *keys.TOP_NEUTRAL]
    for key in root:
        if key not in known:
            remedy = did_you_mean(str(key), known, "MindFormers has no such section; remove it")
            faults.add(join(where, key), "unknown section", remedy)
    check_neutral(root, keys.TOP_NEUTRAL, where, faults)
    if isinstance(root.get("moe_config"), dict):
        check_neutral(root["moe_config"], keys.MOE_NEUTRAL, join(where, "moe_config"), faults)


def check_neutral(
    section: Mapping[Any, Any], neutral: Mapping[str, Iterable[Any]], where: str, faults: Faults
) -> None:
    """A fault for each key that asks for something PPO here cannot do."""
    for key, allowed in neutral.items():
        # False == 0 == 0.0 in Python, which is what is wanted here: any of them is neutral.
        if key in section and section[key] not in allowed:
            faults.add(
                join(where, key),
                f"PPO cannot honour this ({shown(section[key])})",
                f"remove it or set it to {next(iter(allowed))}",
            )


def _read_context(
    root: Mapping[Any, Any], path: Path, faults: Faults, device_target: str | None
) -> dict[str, Any]:
    section = _section(root, "context", path, faults, required=True)
    if section is None:
        return {}
    where = join(str(path), "context")
    if device_target is not None:
        section = section | {"device_target": device_target}
    values = read_section(section, keys.CONTEXT_RULES, faults, where, accepted=keys.CONTEXT_ACCEPTED)
    mode = section.get("mode", 0)
    if isinstance(mode, bool) or not isinstance(mode, int | str) or mode not in keys.MODES:
        faults.add(join(where, "mode"), f"not allowed ({shown(mode)})", "must be 0 (graph) or 1 (pynative)")
    else:
        values["mode"] = keys.MODES[mode]
    values["extra"] = {key: section[key] for key in keys.CONTEXT_ACCEPTED if key in section and key != "mode"}
    return values


def _read_parallel(
    root: Mapping[Any, Any], path: Path, faults: Faults, single_process: bool
) -> dict[str, Any]:
    section = _section(root, "parallel_config", path, faults, required=True)
    if section is None:
        return {}
    where = join(str(path), "parallel_config")
    values = read_section(
        section,
        keys.PARALLEL_RULES,
        faults,
        where,
        accepted=(*keys.PARALLEL_ACCEPTED, *keys.PARALLEL_NEUTRAL),
    )
    check_neutral(section, keys.PARALLEL_NEUTRAL, where, faults)
    if single_process and set(values.values()) != {1}:
        get_logger(__name__).info(
            "%s: one process, so data_parallel 1 and model_parallel 1 replace the split", path
        )
        values = {"data_parallel": 1, "model_parallel": 1}
    return values


_MODEL_SECTION_RULES = {"arch": Rule(kind="mapping", nullable=True)}
_MODEL_TYPES = ("LlamaConfig",)


def _read_model(root: Mapping[Any, Any], path: Path, faults: Faults) -> dict[str, Any]:
    outer = _section(root, "model", path, faults, required=True)
    if outer is None:
        return {}
    where = join(str(path), "model")
    read_section(outer, _MODEL_SECTION_RULES, faults, where, accepted=("model_config",))
    section = _section(outer, "model_config", where, faults, required=True)
    if section is None:
        return {}
    where = join(where, "model_config")
    values = read_section(
        section, keys.MODEL_RULES, faults, where, accepted=(*keys.MODEL_ACCEPTED, *keys.MODEL_NEUTRAL)
    )
    check_neutral(section, keys.MODEL_NEUTRAL, where, faults)
    if section.get("type") not in _MODEL_TYPES:
        faults.add(
            join(where, "type"), f"not supported ({shown(section.get('type'))})", "must be LlamaConfig"
        )
    if section.get("n_kv_heads") is None and "num_heads" in values:
        values["n_kv_heads"] = values["num_heads"]
    return values


def _fit_to_device(draft: RunDraft) -> None:
    """Puts aside what has no kernels: on CPU all types but float32, off Ascend flash attention."""
    target = draft.context.get("device_target")
    changes: dict[str, Any] = {}
    if target == "CPU":
        changes |= {key: "float32" for key in keys.DTYPE_KEYS if draft.model.get(key, "float32") != "float32"}
    if target in ("CPU", "GPU") and draft.model.get("use_flash_attention"):
        changes["use_flash_attention"] = False
    if changes:
        listed = ", ".join(f"{key} {value}" for key, value in changes.items())
        get_logger(__name__).info("%s: on %s model_config runs with %s", draft.path, target, listed)
        draft.model |= changes
