"""The PPO hyper-parameters: YAML and ``--set key=value`` -> checked values -> :class:`PPOConfig`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindrlhf.configs.faults import Faults, shown
from mindrlhf.configs.fields import join, keys_of, read_section
from mindrlhf.configs.keys import PPOConfig
from mindrlhf.configs.optimizer_section import LR_SCHEDULES, OPTIMIZERS
from mindrlhf.configs.read_yaml import parse_value, read_mapping

_SCHEDULE = "CosineWithWarmUpLR"
_RATE = "set it as --learning_rate, or as lr_schedule.learning_rate in the YAML of --sft_path_train"
_ELSEWHERE = {
    **{name: f"set it as optimizer.{name} in the YAML of --sft_path_train" for name in OPTIMIZERS["AdamW"]},
    **{
        name: f"set it as lr_schedule.{name} in the YAML of --sft_path_train"
        for name in LR_SCHEDULES[_SCHEDULE]
    },
    "learning_rate": _RATE,
    "lr": _RATE,
}
"""What people set for PPO that stands elsewhere -> what to do."""


@dataclass
class PPODraft:
    """The valid values of the PPO YAML and overrides; keys with a fault are absent."""

    path: Path
    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def where(self, name: str) -> str:
        """Where a fault of a key is reported."""
        return self.sources.get(name, join(str(self.path), name))

    def get(self, *names: str) -> tuple[Any, ...] | None:
        """Values of ``names``, defaults included; ``None`` when one of them has a fault."""
        if any(name not in self.values for name in names):
            return None
        return tuple(self.values[name] for name in names)

    @property
    def without_critic(self) -> bool:
        """Whether it says ``critic: none``."""
        return self.values.get("critic") == "none"

    def build(self) -> PPOConfig:
        """The configuration; only for a draft without faults."""
        return PPOConfig(**self.values)


def read_ppo(path: Path | None, overrides: Sequence[str], faults: Faults) -> PPODraft:
    """Reads the PPO YAML, puts the ``key=value`` overrides in its place, and checks each value by itself.

    Without a path only the overrides are checked, and keys that they leave out are not reported as missing.
    """
    draft = PPODraft(path or Path("--ppo_config"))
    root = None if path is None else read_mapping(path, faults)
    given: dict[Any, Any] = dict(root or {})
    broken: set[str] = set()
    for override in overrides:
        name, separator, text = override.partition("=")
        name = name.strip()
        if not separator or not name:
            faults.add(f"--set {shown(override)}", "not of the form key=value", "write --set key=value")
            continue
        draft.sources[name] = f"--set {name}"
        readable, given[name] = parse_value(text, draft.sources[name], faults)
        if not readable:
            broken.add(name)
    keys = keys_of(PPOConfig)
    checked = {
        name: key for name, key in keys.items() if name not in broken and (root is not None or name in given)
    }
    draft.values = read_section(
        given, checked, faults, str(path), accepted=keys, remedies=_ELSEWHERE, sources=draft.sources
    )
    if root is not None:
        absent = [name for name, key in keys.items() if name not in given and not key.required]
        draft.values |= {name: keys[name].default for name in absent}
    return draft
