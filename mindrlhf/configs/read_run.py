"""One MindFormers YAML: sections -> checked values -> :class:`RunConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindrlhf.configs import mindformers
from mindrlhf.configs.faults import Faults, did_you_mean, shown
from mindrlhf.configs.fields import join, keys_of, read_section
from mindrlhf.configs.keys import ContextConfig, ModelConfig, ParallelConfig, RunConfig, RunnerConfig
from mindrlhf.configs.mindformers import Foreign, check_foreign
from mindrlhf.configs.optimizer_section import read_lr_schedule, read_optimizer
from mindrlhf.configs.read_yaml import read_mapping
from mindrlhf.utils.logging import get_logger

logger = get_logger(__name__)

COMPUTE_TYPES = tuple(
    name for name in keys_of(ModelConfig) if name.endswith(("dtype", "_type")) and name != "param_init_type"
)


@dataclass
class RunDraft:
    """The valid values of one YAML; keys with a fault are absent, so checks run on valid values."""

    path: Path
    readable: bool = False
    context: dict[str, Any] = field(default_factory=dict)
    parallel: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    lr_schedule: dict[str, Any] = field(default_factory=dict)
    runner: dict[str, Any] = field(default_factory=dict)
    recompute: int = 0
    shards_optimizer: bool = False
    splits_rows: bool = False
    micro_batches: int = 1
    sections: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def where(self, key_path: str) -> str:
        """Where a fault of a key is reported."""
        return join(str(self.path), key_path)

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
            recompute=self.recompute,
            shards_optimizer=self.shards_optimizer,
            splits_rows=self.splits_rows,
            micro_batches=self.micro_batches,
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
    draft.sections = tuple(name for name in root if isinstance(name, str) and root[name] is not None)
    draft.ignored = tuple(name for name in root if name in mindformers.IGNORED_SECTIONS)
    reader = _SectionReader(path, faults)
    reader.check_top_level(root)
    context = reader.section(root, "context", required=True)
    if context is not None and device_target is not None:
        context |= {"device_target": device_target}
    draft.context = reader.read(context, "context", ContextConfig, mindformers.CONTEXT)
    parallel = reader.section(root, "parallel_config", required=True)
    draft.parallel = reader.read(parallel, "parallel_config", ParallelConfig, mindformers.PARALLEL)
    if single_process and set(draft.parallel.values()) - {1}:
        logger.info("%s: one process, so data_parallel 1 and model_parallel 1 replace the split", path)
        draft.parallel = {"data_parallel": 1, "model_parallel": 1}
    draft.model = _read_model(root, reader)
    _fit_to_device(draft)
    runner = reader.section(root, "runner_config")
    draft.runner = reader.read(runner, "runner_config", RunnerConfig, mindformers.RUNNER)
    draft.micro_batches = _micro_batches(parallel or {}, draft, reader)
    draft.recompute = _recomputed_layers(root, draft, reader)
    draft.shards_optimizer = reader.flag(root, "parallel.enable_parallel_optimizer")
    draft.splits_rows = reader.flag(root, "parallel_config.use_seq_parallel")
    if (section := reader.section(root, "optimizer")) is not None:
        draft.optimizer = read_optimizer(section, reader.place("optimizer"), faults)
    if (section := reader.section(root, "lr_schedule")) is not None:
        draft.lr_schedule = read_lr_schedule(section, reader.place("lr_schedule"), faults)
    if draft.ignored:
        logger.debug("%s: sections that are not read: %s", path, ", ".join(draft.ignored))
    if reader.without_effect:
        logger.warning("%s: without effect here: %s", path, ", ".join(reader.without_effect))
    return draft


class _SectionReader:
    """Reads the sections of one file, and records what has no effect."""

    def __init__(self, path: Path, faults: Faults) -> None:
        self.path = path
        self.faults = faults
        self.without_effect: list[str] = []

    def place(self, key_path: str) -> str:
        return join(str(self.path), key_path)

    def section(
        self, parent: Mapping[Any, Any], key_path: str, *, required: bool = False
    ) -> dict[Any, Any] | None:
        """The mapping at the end of ``key_path`` in ``parent``; ``None`` when absent or not a mapping."""
        value = parent.get(key_path.rpartition(".")[2])
        if isinstance(value, dict):
            return value
        if value is not None:
            self.faults.add(
                self.place(key_path), f"wrong type ({shown(value)})", "must be a section with keys"
            )
        elif required:
            self.faults.add(self.place(key_path), "missing", "add this section")
        return None

    def read(
        self,
        section: Mapping[Any, Any] | None,
        key_path: str,
        declaration: type,
        foreign: Mapping[str, Foreign],
    ) -> dict[str, Any]:
        """The valid values of the keys that ``declaration`` has."""
        if section is None:
            return {}
        where = self.place(key_path)
        self.check(section, key_path, foreign)
        synonyms = mindformers.SYNONYMS if declaration is ModelConfig else {}
        remedies = {name: f"here it is called {ours}" for name, ours in synonyms.items()}
        keys = keys_of(declaration)
        return read_section(section, keys, self.faults, where, accepted=foreign, remedies=remedies)

    def flag(self, root: Mapping[Any, Any], key_path: str) -> bool:
        """A key that is True or False, not declared in :mod:`mindrlhf.configs.keys`; False when absent."""
        section, _, name = key_path.partition(".")
        of_section = root.get(section)
        value = of_section.get(name) if isinstance(of_section, dict) else None
        if value is None:
            return False
        if not isinstance(value, bool):
            self.faults.add(self.place(key_path), f"wrong type ({shown(value)})", "must be True or False")
        return value is True

    def check(self, section: Mapping[Any, Any], key_path: str, foreign: Mapping[str, Foreign]) -> None:
        """Refuses or records what MindFormers' other keys ask for."""
        where = self.place(key_path) if key_path else str(self.path)
        prefix = f"{key_path}." if key_path else ""
        self.without_effect += [prefix + one for one in check_foreign(section, foreign, where, self.faults)]

    def check_top_level(self, root: Mapping[Any, Any]) -> None:
        """Refuses unknown sections, and what sections that are not read ask for."""
        known = [*mindformers.USED_SECTIONS, *mindformers.IGNORED_SECTIONS, *mindformers.TOP]
        for name in root:
            if name not in known:
                remedy = did_you_mean(str(name), known, "MindFormers has no such section; remove it")
                self.faults.add(join(str(self.path), name), "unknown section", remedy)
        self.check(root, "", mindformers.TOP)
        for name, foreign in mindformers.WITHIN_IGNORED.items():
            if (section := self.section(root, name)) is not None:
                self.check(section, name, foreign)


def _micro_batches(parallel: Mapping[Any, Any], draft: RunDraft, reader: _SectionReader) -> int:
    """Micro-batches of an optimizer step: MindFormers has a name for them with pipelines, and one without."""
    steps = int(draft.runner.get("gradient_accumulation_steps", 1))
    value = parallel.get("micro_batch_num")
    if value in (None, 1, steps) and not isinstance(value, bool):
        return steps
    place = reader.place("parallel_config.micro_batch_num")
    if type(value) is not int or value < 1:
        reader.faults.add(place, f"wrong type ({shown(value)})", "must be a whole number >= 1")
    elif steps > 1:
        fault = f"differs from runner_config.gradient_accumulation_steps ({value} against {steps})"
        reader.faults.add(place, fault, "both are the micro-batches of a step: give one of them")
    else:
        return value
    return 1


def _recomputed_layers(root: Mapping[Any, Any], draft: RunDraft, reader: _SectionReader) -> int:
    """``recompute_config.recompute``: True for all layers, or a list with their number, from the first on."""
    layers: int = draft.model.get("num_layers", 0)
    section = root.get("recompute_config")
    value = section.get("recompute") if isinstance(section, dict) else None
    if not isinstance(value, list) or not value:
        return layers if value and reader.flag(root, "recompute_config.recompute") else 0
    if len(value) == 1 and type(value[0]) is int and 0 <= value[0] <= layers:
        return int(value[0])
    place = reader.place("recompute_config.recompute")
    reader.faults.add(
        place, f"not supported ({shown(value)})", f"must be True, False or [number of layers, 0 .. {layers}]"
    )
    return 0


def _read_model(root: Mapping[Any, Any], reader: _SectionReader) -> dict[str, Any]:
    outer = reader.section(root, "model", required=True)
    if outer is None:
        return {}
    read_section(outer, {}, reader.faults, reader.place("model"), accepted=("model_config", "arch"))
    if (arch := reader.section(outer, "model.arch")) is not None:
        reader.check(arch, "model.arch", mindformers.ARCH)
        read_section(arch, {}, reader.faults, reader.place("model.arch"), accepted=mindformers.ARCH)
    section = reader.section(outer, "model.model_config", required=True)
    values = reader.read(section, "model.model_config", ModelConfig, mindformers.MODEL)
    if section is None:
        return values
    if section.get("n_kv_heads") is None and "num_heads" in values:
        values["n_kv_heads"] = values["num_heads"]
    return values


def _fit_to_device(draft: RunDraft) -> None:
    """Replaces what has no kernels: types other than float32 on CPU, flash attention off Ascend."""
    target = draft.context.get("device_target")
    changes: dict[str, Any] = {}
    if target == "CPU":
        changes |= {
            name: "float32" for name in COMPUTE_TYPES if draft.model.get(name, "float32") != "float32"
        }
    if target in ("CPU", "GPU") and draft.model.get("use_flash_attention"):
        changes["use_flash_attention"] = False
    if changes:
        listed = ", ".join(f"{name} {value}" for name, value in changes.items())
        logger.info("%s: on %s model_config runs with %s", draft.path, target, listed)
        draft.model |= changes
