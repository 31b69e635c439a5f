"""The names of ``mindrlhf`` itself: explicit, lazy, and free of MindFormers."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mindrlhf

ROOT = Path(__file__).resolve().parents[2]
# The promise is 0.1 s on a quiet machine; the test must hold on a busy one.
GENEROUS_SECONDS = 0.5


def run_python(code: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def names_for_type_checkers() -> dict[str, str]:
    """Name -> module of the imports under ``if TYPE_CHECKING``."""
    tree = ast.parse((ROOT / "mindrlhf" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    return {
        alias.name: str(node.module)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_the_three_lists_of_names_agree() -> None:
    lazy = {name: f"mindrlhf.{module}" for name, module in mindrlhf._HOMES.items()}
    assert lazy == names_for_type_checkers()
    assert sorted([*lazy, "__version__"]) == mindrlhf.__all__
    assert len(set(mindrlhf.__all__)) == len(mindrlhf.__all__) > 40
    assert set(mindrlhf.__all__) <= set(dir(mindrlhf))


def test_importing_the_library_costs_nothing() -> None:
    """The least of three, each in a new process; what Python itself needs to start does not count."""
    code = (
        "import sys, time, json; before = set(sys.modules); t = time.perf_counter(); import mindrlhf;"
        "seconds = time.perf_counter() - t;"
        "print(json.dumps([seconds, sorted({m.split('.')[0] for m in set(sys.modules) - before})]))"
    )
    runs = [run_python(code) for _ in range(3)]
    assert {name for _, modules in runs for name in modules} - sys.stdlib_module_names == {"mindrlhf"}
    assert min(seconds for seconds, _ in runs) < GENEROUS_SECONDS


def test_every_public_name_is_there_and_none_needs_mindformers() -> None:
    code = (
        "import os, sys, json, tempfile; os.environ['GLOG_v'] = '3'; os.chdir(tempfile.mkdtemp());"
        "sys.modules.update(mindformers=None, torch=None);"
        "from mindrlhf import *; import mindrlhf;"
        "left = [n for n in mindrlhf.__all__ if n not in globals()];"
        "others = [n for n in mindrlhf.__all__ if not callable(globals()[n])];"
        "print(json.dumps([left, others, 'transformers' in sys.modules, os.listdir('.')]))"
    )
    left, others, has_transformers, files = run_python(
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"
    )
    assert left == []
    assert others == ["__version__"], "the rest are classes and functions"
    assert not has_transformers
    assert files == []


@pytest.mark.parametrize(
    ("name", "loaded"),
    [("ModelConfig", False), ("load_tokenizer", False), ("export_hf", False), ("gae", False)],
)
def test_names_that_need_no_device_do_not_load_mindspore(name: str, loaded: bool) -> None:
    code = f"import sys, json; from mindrlhf import {name}; print(json.dumps('mindspore' in sys.modules))"
    assert run_python(code) is loaded


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'mindrlhf' has no attribute 'PPOtrainer'"):
        mindrlhf.PPOtrainer  # noqa: B018
    assert mindrlhf.ModelConfig is mindrlhf.ModelConfig
