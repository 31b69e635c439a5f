"""The demo tokenizer, which several packages' tests use."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from mindrlhf.data.tokenizer import Tokenizer
from mindrlhf.data.tokenizer_loading import load_tokenizer


@pytest.fixture(scope="session")
def demo_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> Path:
    """vocab.json, merges.txt, tokenizer_config.json of the demo tokenizer."""
    directory = tmp_path_factory.mktemp("demo") / "tokenizer"
    scripts = str(repo_root / "scripts")
    sys.path.insert(0, scripts)
    try:
        runpy.run_path(f"{scripts}/make_demo_inputs.py")["write_tokenizer"](directory)
    finally:
        sys.path.remove(scripts)
    return directory


@pytest.fixture(scope="session")
def demo_tokenizer(demo_tokenizer_dir: Path) -> Tokenizer:
    """The demo tokenizer: 1021 ordinary tokens, then the three of ChatML."""
    return load_tokenizer(demo_tokenizer_dir)
