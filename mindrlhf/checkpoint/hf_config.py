"""``config.json`` of a Hugging Face model: reading it, and what its family makes of it."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mindrlhf.checkpoint.element_types import DType
from mindrlhf.configs.keys import WEIGHTS_KEYS, ModelConfig
from mindrlhf.models.families import family_of, family_of_hf
from mindrlhf.utils.errors import CheckpointError, bullet_list
from mindrlhf.utils.files import read_json_object
from mindrlhf.utils.provenance import read_provenance
from mindrlhf.utils.result_files import FINAL

CONFIG_NAME = "config.json"
_ADAPTER_NAME = "adapter_config.json"
HF_WEIGHTS_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
NO_LANGUAGE_MODEL = "holds a reward model or a critic, which cannot generate text; give a policy"


def read_hf_config(path: Path) -> dict[str, Any]:
    """The ``config.json`` at ``path``, or in the directory ``path``.

    Raises:
        CheckpointError: missing, not a JSON object, of a run, or not of a known family of models.
    """
    check_no_adapter(path)
    file = path / CONFIG_NAME if path.is_dir() else path
    config = read_json_object(file, CheckpointError)
    if read_provenance(file):
        raise CheckpointError(
            f"{file} is the record of a run, not a model's: name weights in the run, such as its {FINAL}/ or "
            "iteration_NNNNNN/policy"
        )
    family_of_hf(config.get("model_type"), str(file))
    return config


def check_no_adapter(path: Path) -> None:
    """Refuses a directory with a LoRA adapter: its tensors, or those beside it, are not the model alone.

    Raises:
        CheckpointError: says how to make a model of it.
    """
    if (path / _ADAPTER_NAME).is_file():
        raise CheckpointError(
            f"{path} holds a LoRA adapter ({_ADAPTER_NAME}): merge it into its base model with peft's "
            "merge_and_unload(), save that with save_pretrained(), and give the new directory"
        )


def check_language_model(path: Path) -> None:
    """Refuses a directory of weights whose ``config.json``, if it has one, names a reward model or critic.

    Of a model with tied embeddings nothing else tells it from a policy.

    Raises:
        CheckpointError: says what the directory holds.
    """
    if (path / CONFIG_NAME).is_file():
        config = read_hf_config(path)
        keys = family_of_hf(config["model_type"], str(path)).hf_keys
        if config.get("architectures") == [keys.SEQUENCE_CLASSIFICATION]:
            raise CheckpointError(f"{path} {NO_LANGUAGE_MODEL}")


def check_described(path: Path, model: ModelConfig, where: str = "the YAML") -> None:
    """Refuses weights whose ``config.json``, if there is one, describes another model.

    Args:
        path: a directory or a file of weights. A file is described by what is beside it only when it is named
            as in a Hugging Face directory.
        model: what the weights are loaded into.
        where: what says so, for the message.

    Raises:
        CheckpointError: names every value that differs; or as :func:`model_config_from_hf`.
    """
    if HF_WEIGHTS_NAME.fullmatch(path.name) and not read_provenance(path.parent / CONFIG_NAME):
        path = path.parent
    check_no_adapter(path)
    if (path / CONFIG_NAME).is_file():
        stated = model_config_from_hf(read_hf_config(path), str(path / CONFIG_NAME))
        check_same_model(stated, model, str(path / CONFIG_NAME), where)


def check_same_model(first: ModelConfig, second: ModelConfig, where_first: str, where_second: str) -> None:
    """Refuses two descriptions of different models.

    Raises:
        CheckpointError: names every value that differs.
    """
    if faults := differences(first, second):
        raise CheckpointError(
            f"{where_first} and {where_second} describe different models, give files of one model:"
            + bullet_list(faults)
        )


def differences(first: ModelConfig, second: ModelConfig) -> list[str]:
    """``key: value and value`` for each key that models must agree on to share weights, and these do not."""
    return [
        f"{key}: {getattr(first, key)} and {getattr(second, key)}"
        for key in WEIGHTS_KEYS
        if getattr(first, key) != getattr(second, key)
    ]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object as Hugging Face does."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def model_config_from_hf(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The sizes that a ``config.json`` states, with its family's defaults for what it may leave out.

    Raises:
        CheckpointError: sizes are missing or do not fit, or the numerics are not supported; all at once.
    """
    keys = family_of_hf(config.get("model_type"), where).hf_keys
    model: ModelConfig = keys.model_config_from_hf(config, where)
    return model


def hf_config_from_model(model: ModelConfig) -> dict[str, Any]:
    """A ``config.json`` for ``model``."""
    config: dict[str, Any] = family_of(model).hf_keys.hf_config_from_model(model)
    return config


def finish_hf_config(config: Mapping[str, Any], names: Collection[str], dtype: DType) -> dict[str, Any]:
    """``config`` with the architecture and dtype of the weights beside it.

    Args:
        config: a Hugging Face config.
        names: canonical names of the weights, which tell a policy from a reward model.
        dtype: element type of the weights.
    """
    keys = family_of_hf(config.get("model_type"), CONFIG_NAME).hf_keys
    finished: dict[str, Any] = keys.finish_hf_config(config, names, dtype.name)
    return finished
