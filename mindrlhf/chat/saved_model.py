"""What a path given to ``--checkpoint`` holds: weights, their sizes and a tokenizer, wherever they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindrlhf.checkpoint.element_types import BY_NAME, to_mindspore
from mindrlhf.checkpoint.hf_config import (
    CONFIG_NAME,
    NO_LANGUAGE_MODEL,
    check_described,
    check_language_model,
    check_no_adapter,
    model_config_from_hf,
    read_hf_config,
)
from mindrlhf.checkpoint.shards import find_weights, open_full
from mindrlhf.checkpoint.sources import CastSource, LocalSource
from mindrlhf.configs.keys import ContextConfig, ModelConfig
from mindrlhf.configs.load import load_run_config
from mindrlhf.data.tokenizer import Tokenizer
from mindrlhf.data.tokenizer_loading import load_tokenizer
from mindrlhf.models.families import family_of
from mindrlhf.parallel.layout import Mesh
from mindrlhf.utils.errors import CheckpointError, DataError

_TOKENIZER_FILES = ("vocab.json", "tokenizer.json", "*.model", "*.tiktoken")


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model, and what else is recorded with them.

    Attributes:
        model: the sizes.
        context: the device.
        where: the file that says so.
    """

    model: ModelConfig
    context: ContextConfig
    where: str


@dataclass(frozen=True)
class SavedModel:
    """A language model on disk.

    Attributes:
        name: as the user gave it.
        weights: the file or directory that holds the weights.
        sizes: of the model.
        tokenizer: of the model.
    """

    name: str
    weights: Path
    sizes: Sizes
    tokenizer: Tokenizer

    def shards(self, mesh: Mesh, rank: int) -> Iterator[tuple[str, np.ndarray]]:
        """This rank's canonical tensors over ``mesh``, read one at a time; scalar heads are left out.

        Raises:
            CheckpointError: the weights do not fit the sizes, or are those of a reward model.
        """
        source, _ = open_full(self.weights, self.sizes.model, self.sizes.where)
        with source:
            names = family_of(self.sizes.model).layouts
            wanted = names.parameter_layouts(self.sizes.model, mesh)
            if names.LM_HEAD in wanted and names.LM_HEAD not in source.tensors:
                raise CheckpointError(f"{self.weights} {NO_LANGUAGE_MODEL}")
            local = LocalSource(source, wanted, rank)
            cast = CastSource(local, BY_NAME[self.sizes.model.param_init_type])
            for name in cast.tensors:
                yield name, to_mindspore(cast.read(name))
            cast.check_overflow()


def find_model(
    path: Path,
    *,
    config: Path | None = None,
    tokenizer_path: Path | None = None,
    device_target: str | None = None,
    fallback: SavedModel | None = None,
) -> SavedModel:
    """Determines what ``path`` holds and reads everything except the weights.

    Args:
        path: a Hugging Face directory, a full file, rank directories, a checkpoint of PPO
            (``iteration_NNNNNN``) or SFT (``step_NNNNNN``), or the directory of a run (its last weights).
        config: YAML, ``config.json`` or its directory, for a path that does not include the sizes.
        tokenizer_path: for a path that does not include a tokenizer.
        device_target: replaces that of a YAML; CPU without either.
        fallback: provides sizes and tokenizer where ``path`` and the flags do not.

    Raises:
        CheckpointError: there is nothing at ``path``, or no sizes for it.
        DataError: no tokenizer was found, or it has more tokens than the model.
        ConfigError: the YAML has faults.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    weights = find_weights(path, "policy")
    sizes = _own_sizes(weights, config, device_target)
    if sizes is None and fallback is not None:
        sizes = fallback.sizes
    if sizes is None:
        raise CheckpointError(
            f"{path} does not say the model's sizes: give --config with a YAML of the model or a config.json"
        )
    tokenizer = _tokenizer(path, weights, tokenizer_path, fallback)
    if tokenizer.size > sizes.model.vocab_size:
        raise DataError(
            f"the tokenizer for {path} has {tokenizer.size} tokens, more than the vocab_size "
            f"{sizes.model.vocab_size} of {sizes.where}; give the model's own with --tokenizer_path"
        )
    return SavedModel(str(path), weights, sizes, tokenizer)


def _own_sizes(weights: Path, config: Path | None, device_target: str | None) -> Sizes | None:
    """Sizes from ``--config``, which must fit a ``config.json`` beside the weights; else from that file."""
    check_no_adapter(weights)
    check_language_model(weights)
    if config is not None and config.suffix in (".yaml", ".yml"):
        run = load_run_config(config, device_target=device_target)
        check_described(weights, run.model, str(config))
        return Sizes(run.generator_model, run.context, str(config))
    if (weights / CONFIG_NAME).is_file():
        return _hf_sizes(weights, device_target)
    return None if config is None else _hf_sizes(config, device_target)


def _hf_sizes(path: Path, device_target: str | None) -> Sizes:
    model = model_config_from_hf(read_hf_config(path), str(path))
    return Sizes(model, ContextConfig(device_target=device_target or "CPU"), str(path))


def _tokenizer(path: Path, weights: Path, given: Path | None, fallback: SavedModel | None) -> Tokenizer:
    if weights.is_dir() and any(any(weights.glob(name)) for name in _TOKENIZER_FILES):
        return load_tokenizer(weights)
    if given is not None:
        return load_tokenizer(given)
    if fallback is not None:
        return fallback.tokenizer
    raise DataError(f"{path} brings no tokenizer: give --tokenizer_path")
