"""A tiny random Qwen2 in Hugging Face's format, and the demo tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mindrlhf.data.tokenizer import Tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 32,
    "num_layers": 1,
    "num_heads": 4,
    "n_kv_heads": 2,
    "intermediate_size": 48,
    "seq_length": 256,
    "theta": 10_000.0,
    "eos_token_id": (1023,),
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="session")
def tokenizer_dir(demo_tokenizer_dir: Path) -> Path:
    """vocab.json, merges.txt, tokenizer_config.json of the demo tokenizer (1024 tokens)."""
    return demo_tokenizer_dir


@pytest.fixture(scope="session")
def tokenizer(demo_tokenizer: Tokenizer) -> Tokenizer:
    """The demo tokenizer."""
    return demo_tokenizer


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Callable[..., SimpleNamespace]:
    """Makes a random model: ``.hf`` a directory, ``.full`` a file, ``.arrays`` canonical, ``.model``."""
    import shutil

    from mindrlhf.checkpoint.hf_config import hf_config_from_model
    from mindrlhf.checkpoint.sources import ArraySource
    from mindrlhf.checkpoint.weight_files import write_weights
    from mindrlhf.configs.keys import ModelConfig
    from mindrlhf.models.qwen2.layouts import parameter_layouts
    from mindrlhf.models.qwen2.weight_names import canonical_to_hf
    from mindrlhf.parallel.layout import Mesh

    def make(seed: int, **changes: Any) -> SimpleNamespace:
        model = ModelConfig(**{**SIZES, **changes})
        directory = tmp_path_factory.mktemp("tiny")
        rng = np.random.default_rng(seed)
        arrays = {}
        for name, layout in parameter_layouts(model, Mesh()).items():
            draw = rng.standard_normal(layout.shape, np.float32)
            arrays[name] = np.float32(1) + draw / 10 if "norm" in name else draw * np.float32(0.3)
        names = canonical_to_hf(model.num_layers)
        hf = directory / "hf"
        write_weights(
            hf / "model.safetensors", ArraySource({names[name]: array for name, array in arrays.items()})
        )
        (hf / "config.json").write_text(json.dumps(hf_config_from_model(model)))
        for file in tokenizer_dir.iterdir():
            shutil.copyfile(file, hf / file.name)
        write_weights(directory / "full.ckpt", ArraySource(arrays))
        return SimpleNamespace(model=model, arrays=arrays, hf=hf, full=directory / "full.ckpt")

    return make
