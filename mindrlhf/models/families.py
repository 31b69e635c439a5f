"""The table of model families: where trainer, checkpoints and planner find everything specific to a family.

A family is one folder of :mod:`mindrlhf.models` and one entry here. Its folder has the modules of
:data:`MODULES`, with the names listed there. Importing this table imports none of them: a module is imported
when it is first asked for, and ``layouts``, ``weight_names`` and ``hf_keys`` do not need MindSpore.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from mindrlhf.configs.faults import shown
from mindrlhf.configs.keys import ModelConfig, RunConfig
from mindrlhf.utils.errors import CheckpointError, ConfigError

MODULES: dict[str, tuple[str, ...]] = {
    "layouts": (
        "EMBEDDING", "FINAL_NORM", "LM_HEAD", "layer_prefix", "parameter_layouts", "stored_model_parallel",
    ),
    "weight_names": ("canonical_to_hf", "count_layers", "is_derived", "is_hf"),
    "hf_keys": (
        "CAUSAL_LM", "SEQUENCE_CLASSIFICATION", "finish_hf_config", "hf_config_from_model",
        "model_config_from_hf",
    ),
    "decoder": ("DecoderLayer", "DecoderLayerGradient", "RMSNorm", "SharedInputs"),
    "generator_network": ("FusedDecoder",),
    "generator_weights": ("FusedWeights",),
}  # fmt: skip
"""Module of a family's folder -> names that the rest of the library uses, with the meanings they have in
:mod:`mindrlhf.models.qwen2`."""


@dataclass(frozen=True)
class Family:
    """Where a family of models is found.

    Attributes:
        config_type: ``model.model_config.type`` of its YAMLs, a class of MindFormers.
        hf_model_type: ``model_type`` of its ``config.json``.
        package: its folder.
        layouts: how each parameter is split; canonical names.
        weight_names: canonical names <-> Hugging Face's.
        hf_keys: keys of ``config.json`` <-> :class:`ModelConfig`.
        decoder: the pieces of a decoder, for training and scoring.
        generator_network: the same with a cache, for generation.
        generator_weights: canonical shards <-> the stored parameters of the generator's network.
    """

    config_type: str
    hf_model_type: str
    package: str

    @property
    def layouts(self) -> ModuleType:
        return self._module("layouts")

    @property
    def weight_names(self) -> ModuleType:
        return self._module("weight_names")

    @property
    def hf_keys(self) -> ModuleType:
        return self._module("hf_keys")

    @property
    def decoder(self) -> ModuleType:
        return self._module("decoder")

    @property
    def generator_network(self) -> ModuleType:
        return self._module("generator_network")

    @property
    def generator_weights(self) -> ModuleType:
        return self._module("generator_weights")

    def _module(self, name: str) -> ModuleType:
        return import_module(f"{self.package}.{name}")


FAMILIES: Mapping[str, Family] = {
    "qwen2": Family(config_type="LlamaConfig", hf_model_type="qwen2", package="mindrlhf.models.qwen2"),
}
"""Name, as ``convert_weight.py --model`` takes it -> family."""


def family_of(model: ModelConfig) -> Family:
    """The family that a model belongs to.

    Raises:
        ConfigError: no family has this type.
    """
    for family in FAMILIES.values():
        if family.config_type == model.type:
            return family
    known = " or ".join(sorted({family.config_type for family in FAMILIES.values()}))
    raise ConfigError([f"model.model_config.type: not supported ({shown(model.type)}) - must be {known}"])


def check_families(configs: Iterable[RunConfig]) -> None:
    """Refuses YAMLs of models that belong to no family.

    Raises:
        ConfigError: names every file.
    """
    faults: dict[str, None] = {}
    for config in configs:
        try:
            family_of(config.model)
        except ConfigError as error:
            faults |= {f"{config.path}: {fault}": None for fault in error.faults}
    if faults:
        raise ConfigError(tuple(faults))


def is_model(names: Collection[str]) -> bool:
    """Whether weights with these names, canonical or Hugging Face's, are a model of some family."""
    return any(_has(family, names) for family in FAMILIES.values())


def _has(family: Family, names: Collection[str]) -> bool:
    return family.layouts.EMBEDDING in names or bool(family.weight_names.is_hf(names))


def family_of_names(names: Collection[str]) -> Family:
    """The family whose weights have these names, canonical or Hugging Face's.

    Where none is recognised, the first: no name then belongs to a weight of any family.
    """
    for family in FAMILIES.values():
        if _has(family, names):
            return family
    return next(iter(FAMILIES.values()))


def family_of_hf(model_type: object, where: str) -> Family:
    """The family of a Hugging Face ``config.json``.

    Args:
        model_type: its ``model_type``.
        where: the file, for the message.

    Raises:
        CheckpointError: no family has this type.
    """
    for family in FAMILIES.values():
        if family.hf_model_type == model_type:
            return family
    known = " or ".join(repr(family.hf_model_type) for family in FAMILIES.values())
    raise CheckpointError(
        f"{where}: model_type is {shown(model_type)}, only {known} is supported: give such a model"
    )
