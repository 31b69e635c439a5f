"""Sections ``optimizer`` and ``lr_schedule``, checked without importing MindFormers.

Their classes and arguments are MindFormers'; its ``build_lr`` builds the schedules. It swallows unknown
arguments or fails late, so the arguments are checked here; a test compares the tables with the real
signatures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from annotated_types import Len, Lt
from pydantic import BeforeValidator, Strict

from mindrlhf.configs.faults import Faults, did_you_mean, shown
from mindrlhf.configs.fields import (
    Count,
    CountOrMinusOne,
    Flag,
    Fraction,
    Key,
    Natural,
    NotNegative,
    Positive,
    Text,
    Words,
    join,
    read_section,
)

_RATE = Key(NotNegative)
_REQUIRED_RATE = Key(NotNegative, required=True)
_STEPS = Key(Natural, nullable=True)
_TOTAL_STEPS = Key(CountOrMinusOne, nullable=True)  # -1: the optimizer steps of the job
_RATIO = Key(Fraction, nullable=True)
_POSITIVE = Key(Positive)
_OFF = Key(Annotated[Literal[False], Words("False")])


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


_BETAS = Annotated[
    tuple[Annotated[Positive, Lt(1)], ...],
    BeforeValidator(_tuple),
    Strict(),
    Len(2, 2),
    Words("a list of numbers of length 2 > 0 and < 1"),
]

# Only optimizers that treat each element by itself: a shard is then updated as the whole tensor would be.
OPTIMIZERS: dict[str, dict[str, Key]] = {
    "AdamW": {
        "learning_rate": _RATE,
        "betas": Key(_BETAS),
        "eps": _POSITIVE,
        "weight_decay": _RATE,
        "use_fused": _OFF,  # the step is in place and tensor by tensor anyway
        "swap": Key(Flag),  # states in host memory
    }
}

_WARM_UP = {
    "learning_rate": _REQUIRED_RATE,
    "warmup_steps": _STEPS,
    "warmup_lr_init": _RATE,
    "warmup_ratio": _RATIO,
    "total_steps": _TOTAL_STEPS,
}
LR_SCHEDULES: dict[str, dict[str, Key]] = {
    "ConstantWarmUpLR": _WARM_UP,
    "LinearWithWarmUpLR": _WARM_UP,
    "CosineWithWarmUpLR": {
        **_WARM_UP,
        "num_cycles": _POSITIVE,
        "lr_end": _RATE,
        "decay_steps": _STEPS,
        "decay_ratio": _RATIO,
    },
    "CosineWithRestartsAndWarmUpLR": {
        **_WARM_UP,
        "num_cycles": _POSITIVE,
        "lr_end": _RATE,
        "decay_steps": _STEPS,
    },
    "PolynomialWithWarmUpLR": {**_WARM_UP, "lr_end": _RATE, "power": _POSITIVE, "decay_steps": _STEPS},
    "ConstantWithCoolDownLR": {
        **_WARM_UP,
        "keep_steps": _STEPS,
        "decay_steps": _STEPS,
        "decay_ratio": _RATIO,
        "num_cycles": _POSITIVE,
        "lr_end1": _RATE,
        "final_steps": _STEPS,
        "lr_end2": Key(NotNegative, nullable=True),
    },
    "WarmUpStableDecayLR": {
        **_WARM_UP,
        "lr_end": _RATE,
        "decay_start_steps": _STEPS,
        "decay_start_ratio": _RATIO,
    },
    "CosineAnnealingLR": {"base_lr": _REQUIRED_RATE, "t_max": Key(Count, required=True), "eta_min": _RATE},
    "CosineAnnealingWarmRestarts": {
        "base_lr": _REQUIRED_RATE,
        "t_0": Key(Count, required=True),
        "t_mult": Key(Count),
        "eta_min": _RATE,
    },
}
LR_ALIASES = {
    "constant_with_warmup": "ConstantWarmUpLR",
    "linear": "LinearWithWarmUpLR",
    "cosine": "CosineWithWarmUpLR",
    "cosine_with_restarts": "CosineWithRestartsAndWarmUpLR",
    "polynomial": "PolynomialWithWarmUpLR",
    "cosine_annealing": "CosineAnnealingLR",
    "cosine_annealing_warm_restarts": "CosineAnnealingWarmRestarts",
}


def read_optimizer(section: Mapping[Any, Any], where: str, faults: Faults) -> dict[str, Any]:
    """The optimizer's ``type`` and arguments, in the types that MindFormers expects."""
    values = _read_typed(section, OPTIMIZERS, {}, where, faults)
    if "betas" in values:
        values["betas"] = list(values["betas"])
    return values


# (steps, ratio) of which MindFormers needs one, since neither has a default.
_STEPS_OR_RATIO = {
    name: [("warmup_steps", "warmup_ratio")]
    for name, keys in LR_SCHEDULES.items()
    if "warmup_steps" in keys and name != "CosineWithWarmUpLR"
}
_STEPS_OR_RATIO["WarmUpStableDecayLR"].append(("decay_start_steps", "decay_start_ratio"))
_MUST_DECAY = {"PolynomialWithWarmUpLR": 1e-7, "WarmUpStableDecayLR": 1e-7}  # and their default lr_end


def read_lr_schedule(section: Mapping[Any, Any], where: str, faults: Faults) -> dict[str, Any]:
    """The schedule's ``type`` and arguments; see :func:`completed_schedule` for its ``total_steps``."""
    values = _read_typed(section, LR_SCHEDULES, LR_ALIASES, where, faults)
    name = values.get("type", "")
    for steps, ratio in _STEPS_OR_RATIO.get(name, []):
        if section.get(steps) is None and section.get(ratio) is None:
            faults.add(join(where, steps), "missing", f"give {steps} or {ratio}")
    if name in _MUST_DECAY and "learning_rate" in values:
        end = values.get("lr_end", _MUST_DECAY[name])
        if values["learning_rate"] <= end:
            faults.add(
                join(where, "learning_rate"),
                f"not above lr_end ({values['learning_rate']:g} against {end:g})",
                f"{name} must decay: raise learning_rate or lower lr_end",
            )
    return values


def _read_typed(
    section: Mapping[Any, Any],
    table: Mapping[str, Mapping[str, Key]],
    aliases: Mapping[str, str],
    where: str,
    faults: Faults,
) -> dict[str, Any]:
    named = section.get("type")
    name = aliases.get(named, named) if isinstance(named, str) else None
    if name is None or name not in table:
        at = join(where, "type")
        if named is None:
            faults.add(at, "missing", "give one of " + ", ".join(table))
        else:
            known = [*table, *aliases]
            faults.add(at, f"not supported ({shown(named)})", did_you_mean(str(name), known, _one_of(table)))
        return {}
    return read_section(section, {"type": Key(Text), **table[name]}, faults, where) | {"type": name}


def _one_of(table: Mapping[str, object]) -> str:
    return "use one of " + ", ".join(table)


def completed_schedule(schedule: Mapping[str, Any], total_steps: int) -> dict[str, Any]:
    """``schedule`` with what it leaves out.

    ``total_steps`` is put in where it asks for one and gives none (or -1). Without ``warmup_lr_init`` a
    warm-up of n steps begins with 1/n of its peak: with MindFormers' default, 0, the first step of every job
    would change nothing.
    """
    filled = dict(schedule)
    takes_total = "total_steps" in LR_SCHEDULES[filled["type"]]
    if takes_total and filled.get("total_steps", -1) < 1:
        filled["total_steps"] = total_steps
    ratio, steps = filled.get("warmup_ratio"), filled.get("warmup_steps")
    if ratio is not None:
        steps = int(ratio * filled["total_steps"])
    if steps and "warmup_lr_init" not in filled:
        filled["warmup_lr_init"] = filled["learning_rate"] / steps
    return filled
