"""What a path given to ``--checkpoint`` holds: weights, their sizes and a tokenizer, wherever they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from mindrlhf.checkpoint.element_types import BY_NAME, to_mindspore
from mindrlhf.checkpoint.hf_config import CONFIG_NAME, model_config_from_hf, read_hf_config
from mindrlhf.checkpoint.shards import open_full, rank_directories
from mindrlhf.checkpoint.sources import CastSource, LocalSource
from mindrlhf.checkpoint.weight_files import has_hf_weights
from mindrlhf.configs.load import load_run_config
from mindrlhf.configs.schema import ContextConfig, ModelConfig, ParallelConfig
from mindrlhf.data.tokenizer import Tokenizer
from mindrlhf.data.tokenizer_loading import load_tokenizer
from mindrlhf.models.families import family_of
from mindrlhf.parallel.layout import Mesh, mesh_of
from mindrlhf.utils.errors import CheckpointError, DataError
from mindrlhf.utils.provenance import CONFIG_FILE

POLICY = "policy"
"""Directory of the policy's weights in RUN/iteration_NNNNNN."""
_TOKENIZER_FILES = ("vocab.json", "tokenizer.json", "*.model", "*.tiktoken")


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model, and what else is recorded with them.

    Attributes:
        model: the sizes.
        mesh: over which rank directories are split; ``None`` when it is not recorded.
        context: the device.
        where: the file that says so.
    """

    model: ModelConfig
    mesh: Mesh | None
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
        source, _ = open_full(self.weights, self.sizes.model, self.sizes.mesh)
        with source:
            names = family_of(self.sizes.model).layouts
            wanted = names.parameter_layouts(self.sizes.model, mesh)
            if names.LM_HEAD in wanted and names.LM_HEAD not in source.tensors:
                raise CheckpointError(
                    f"{self.weights}: no {names.LM_HEAD}, so this is a reward model or a critic, which "
                    "cannot generate text; give a policy"
                )
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
        path: a Hugging Face directory, a full file, rank directories, an ``iteration_NNNNNN`` directory of
            PPO (stands for its ``policy/``), or the directory of a run (its last weights).
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
    weights = _weights_of(path)
    sizes = _own_sizes(weights, config, device_target)
    if sizes is None and fallback is not None:
        sizes = fallback.sizes
    if sizes is None:
        raise CheckpointError(
            f"{path} does not say the model's sizes: give --config with the YAML it was made with (for rank "
            "directories the one whose parallel_config split them), or with a config.json"
        )
    tokenizer = _tokenizer(path, weights, tokenizer_path, fallback)
    if tokenizer.size > sizes.model.vocab_size:
        raise DataError(
            f"the tokenizer for {path} has {tokenizer.size} tokens, more than the vocab_size "
            f"{sizes.model.vocab_size} of {sizes.where}; give the model's own with --tokenizer_path"
        )
    return SavedModel(str(path), weights, sizes, tokenizer)


def _weights_of(path: Path) -> Path:
    """The file or directory below ``path`` that holds weights of a language model."""
    if not path.is_dir() or has_hf_weights(path) or rank_directories(path):
        return path
    if (path / POLICY).is_dir():
        return path / POLICY
    iterations = sorted(found for found in path.glob("iteration_[0-9]*") if (found / POLICY).is_dir())
    if iterations:
        return iterations[-1] / POLICY
    return path / "final" if rank_directories(path / "final") else path


def _own_sizes(weights: Path, config: Path | None, device_target: str | None) -> Sizes | None:
    """Sizes from beside the weights, else from ``--config``, else from the record of a PPO checkpoint."""
    if (weights / CONFIG_NAME).is_file():
        return _hf_sizes(weights, device_target)
    if config is not None and config.suffix in (".yaml", ".yml"):
        run = load_run_config(config, device_target=device_target)
        return Sizes(run.model, mesh_of(run), run.context, str(config))
    if config is not None:
        return _hf_sizes(config, device_target)
    if weights.name == POLICY:
        return _recorded_sizes(weights.parent / CONFIG_FILE, device_target)
    return None


def _hf_sizes(path: Path, device_target: str | None) -> Sizes:
    model = model_config_from_hf(read_hf_config(path), str(path))
    return Sizes(model, None, ContextConfig(device_target=device_target or "CPU"), str(path))


def _recorded_sizes(record: Path, device_target: str | None) -> Sizes | None:
    """Sizes and split of the trained policy from the ``config.json`` of a PPO checkpoint."""
    try:
        train = json.loads(record.read_text(encoding="utf-8"))["configuration"]["train"]
        # The matmul type belongs to the training job: this may be another device or processor.
        model = _dataclass(ModelConfig, train["model"] | {"matmul_dtype": "float32"})
        parallel = _dataclass(ParallelConfig, train["parallel"])
        context = ContextConfig(device_target=device_target or train["context"]["device_target"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Sizes(model, Mesh(parallel.data_parallel, parallel.model_parallel), context, str(record))


def _dataclass(kind: type[Any], values: dict[str, Any]) -> Any:
    known = {field.name for field in fields(kind)}
    return kind(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items() if key in known})


def _tokenizer(path: Path, weights: Path, given: Path | None, fallback: SavedModel | None) -> Tokenizer:
    if weights.is_dir() and any(any(weights.glob(name)) for name in _TOKENIZER_FILES):
        return load_tokenizer(weights)
    if given is not None:
        return load_tokenizer(given)
    if fallback is not None:
        return fallback.tokenizer
    raise DataError(f"{path} brings no tokenizer: give --tokenizer_path")
