"""Prompts of the demo: a few hundred, all different, held-out topics apart."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from mindrlhf.utils.errors import MindRLHFError


@pytest.fixture(scope="module")
def demo(import_script: Callable[[str], ModuleType]) -> ModuleType:
    return import_script("demo_prompts")


def test_files(demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, held_out = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"
    arguments = ["demo_prompts.py", "--train_path", str(train), "--held_out_path", str(held_out)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert demo.main() == 0
    texts = {path: [json.loads(line)["prompt"] for line in path.open()] for path in (train, held_out)}
    assert len(set(texts[train])) == len(texts[train]) == 400
    assert len(set(texts[held_out])) == len(texts[held_out]) == 64
    assert not any(topic in text for text in texts[train] for topic in demo.HELD_OUT_TOPICS)
    before = train.read_bytes()
    with pytest.raises(MindRLHFError, match=r"--train_path .*: exists; .*--overwrite"):
        demo.main()
    arguments.append("--overwrite")
    assert demo.main() == 0
    assert train.read_bytes() == before
    monkeypatch.setattr(sys, "argv", [*arguments, "--seed", "1"])
    assert demo.main() == 0
    assert train.read_bytes() != before
    assert sorted(train.read_bytes().splitlines()) == sorted(before.splitlines())
