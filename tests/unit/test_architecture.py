"""The rules of the house, held against every source file: imports, no print, small files, docstrings."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_LINES = 1000  # a file is as long as its one subject; this only forbids the absurd

# Package -> packages of mindrlhf it may import.
ALLOWED = {
    "utils": {"utils"},
    "algorithms": {"algorithms"},
    "configs": {"utils", "algorithms", "configs"},
    "kernels": {"utils", "kernels"},
    "parallel": {"utils", "configs", "kernels", "parallel"},
    "models": {"utils", "configs", "kernels", "parallel", "models"},
    "checkpoint": {"utils", "configs", "parallel", "models", "checkpoint"},
    "data": {"utils", "configs", "data"},
    "runtime": {"utils", "configs", "kernels", "parallel", "runtime"},
    "report": {"utils", "report"},
    "planning": {"utils", "algorithms", "configs", "parallel", "models", "planning"},
}
ALLOWED["trainer"] = {*ALLOWED, "trainer"} - {"report", "planning"}
ALLOWED["chat"] = {*ALLOWED["trainer"], "chat"}
# The public names, imported when first used; the commands.
ALLOWED["__init__"] = set(ALLOWED)
ALLOWED["cli"] = {*ALLOWED, "cli"}
HEAVY = {"mindspore", "mindformers", "torch", "transformers"}
# Packages that scripts without a model use: they must start at once.
LIGHT = {"utils", "configs", "report", "planning", "__init__"}
# Called by MindSpore, not by people; MindSpore documents them.
FRAMEWORK_METHODS = {"construct", "bprop"}

LIBRARY = sorted((ROOT / "mindrlhf").rglob("*.py"))
SOURCES = sorted(path for top in ("mindrlhf", "examples", "scripts") for path in (ROOT / top).rglob("*.py"))


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _package(path: Path) -> str:
    """``utils`` for mindrlhf/utils/x.py, ``__init__`` for mindrlhf/__init__.py."""
    part = path.relative_to(ROOT / "mindrlhf").parts[0]
    return part.removesuffix(".py")


def _imports(source: str, package: str) -> Iterator[tuple[int, str, bool]]:
    """Line, full module name and whether it is at module level, for each import in ``source``."""
    return _imports_of(ast.parse(source), package)


def _imports_of(tree: ast.Module, package: str) -> Iterator[tuple[int, str, bool]]:
    deferred = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(filter(None, ["mindrlhf", package if node.level == 1 else "", base]))
            # `from mindrlhf import data` imports a package, too.
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield node.lineno, name, id(node) not in deferred


def import_faults(source: str, package: str) -> list[str]:
    """What the imports of a file in mindrlhf/``package`` do against the rules."""
    faults = []
    for line, name, at_module_level in _imports(source, package):
        top, *rest = name.split(".")
        if top == "mindrlhf":
            if not rest or rest[0] not in ALLOWED[package] | {"__version__"}:
                faults.append(f"{line}: {package} must not import {name}")
        elif top in {"examples", "scripts", "tests"}:
            faults.append(f"{line}: the library must not import {name}")
        elif package == "algorithms" and top not in {"numpy", "mindspore", *sys.stdlib_module_names}:
            faults.append(f"{line}: algorithms imports only numpy and mindspore, not {name}")
        elif package in LIGHT and top in HEAVY:
            faults.append(f"{line}: {package} must stay light, not import {name}")
        elif at_module_level and top in HEAVY - {"mindspore"}:
            faults.append(f"{line}: import {name} inside the function that needs it")
    return faults


def docstring_faults(source: str) -> list[str]:
    """Public functions, classes and methods of ``source`` that have no docstring.

    A property may be described under ``Attributes:`` of its class instead.
    """
    faults: list[str] = []

    def visit(body: list[ast.stmt], owner: str, owner_docstring: str) -> None:
        for node in body:
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                continue
            if node.name.startswith("_") or (owner and node.name in FRAMEWORK_METHODS):
                continue
            is_property = any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list)
            described_above = is_property and re.search(rf"^\s*{node.name}: ", owner_docstring, re.MULTILINE)
            if ast.get_docstring(node) is None and not described_above:
                faults.append(f"{node.lineno}: {owner}{node.name} has no docstring")
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{node.name}.", ast.get_docstring(node) or "")

    tree = ast.parse(source)
    if tree.body and ast.get_docstring(tree) is None:
        faults.append("1: the module has no docstring")
    visit(tree.body, "", "")
    return faults


def print_faults(source: str) -> list[str]:
    """Calls of print in ``source``."""
    return [
        f"{node.lineno}: print; use a logger"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def test_there_is_something_to_check() -> None:
    assert len(LIBRARY) > 20
    assert {_package(path) for path in LIBRARY} <= set(ALLOWED)


@pytest.mark.parametrize("path", LIBRARY, ids=_name)
def test_imports_point_one_way(path: Path) -> None:
    assert import_faults(path.read_text(encoding="utf-8"), _package(path)) == []


@pytest.mark.parametrize("path", LIBRARY, ids=_name)
def test_no_print_in_the_library(path: Path) -> None:
    assert print_faults(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", LIBRARY, ids=_name)
def test_public_names_have_docstrings(path: Path) -> None:
    assert docstring_faults(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_files_can_be_read_in_one_sitting(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{_name(path)} has {lines} lines; split it (at most {MAX_LINES})"


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def run_time_imports(source: str, package: str) -> set[str]:
    """Full names that ``source`` imports, but for those that only type checkers see."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = [ast.Pass()]
    return {name for _, name, _ in _imports_of(tree, package)}


def import_circles(sources: dict[str, str]) -> list[str]:
    """Modules that import themselves by way of others; imports for type checkers alone do not count.

    Args:
        sources: module -> its source.
    """
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        names = run_time_imports(source, module.split(".")[1] if "." in module else "")
        # `from a.b import c` names c in module a.b, or module a.b.c.
        found = {name if name in sources else name.rpartition(".")[0] for name in names}
        graph[module] = (found & sources.keys()) - {module, "mindrlhf"}  # the package imports on demand
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_file_imports_itself_by_way_of_others() -> None:
    assert import_circles({_module(path): path.read_text(encoding="utf-8") for path in LIBRARY}) == []


def test_a_family_of_models_is_reached_through_the_table_alone() -> None:
    """So a second family touches nothing but its folder and the table."""
    families = {path.name for path in (ROOT / "mindrlhf" / "models").iterdir() if path.is_dir()}
    inside = {f"mindrlhf.models.{name}" for name in families}
    for path in LIBRARY:
        module = _module(path)
        if module != "mindrlhf" and not any(module.startswith(family) for family in inside):
            found = [name for _, name, _ in _imports(path.read_text(encoding="utf-8"), _package(path))]
            assert not [name for name in found if any(name.startswith(family) for family in inside)], module


def test_importing_the_packages_stays_light() -> None:
    """`import mindrlhf`, and its packages, must not cost the seconds that MindSpore takes."""
    packages = ["mindrlhf", *(f"mindrlhf.{name}" for name in ALLOWED if (ROOT / "mindrlhf" / name).is_dir())]
    check = f"import sys, {', '.join(packages)}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.strip() == ""


@pytest.mark.parametrize(
    ("package", "source", "fault"),
    [
        ("utils", "from mindrlhf.configs.keys import ModelConfig", "must not import"),
        ("configs", "from mindrlhf.parallel import layout", "must not import"),
        ("parallel", "def f():\n    import mindrlhf.models.generator", "must not import"),
        ("data", "from mindrlhf import models", "must not import"),
        ("checkpoint", "import mindrlhf.trainer.loop as m", "must not import"),
        ("models", "from ..checkpoint import load", "must not import"),
        ("algorithms", "from mindrlhf.utils.sizes import exact_div", "must not import"),
        ("algorithms", "import scipy.stats", "only numpy and mindspore"),
        ("trainer", "import scripts.quickstart", "library must not"),
        ("configs", "def f():\n    import mindspore", "stay light"),
        ("data", "from transformers import AutoTokenizer", "inside the function"),
        ("trainer", "import mindformers", "inside the function"),
    ],
)
def test_import_rule_can_fail(package: str, source: str, fault: str) -> None:
    (found,) = import_faults(source, package)
    assert fault in found


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("models", "from . import infer\nfrom mindrlhf.parallel.layout import Mesh\nimport mindspore as ms"),
        ("checkpoint", "def f():\n    import torch, transformers"),
        ("algorithms", "from collections.abc import Mapping\nimport numpy as np\nfrom mindspore import ops"),
        ("trainer", "from mindrlhf.data.prompts import PromptStream\nfrom mindrlhf import __version__"),
    ],
)
def test_import_rule_lets_good_files_through(package: str, source: str) -> None:
    assert import_faults(source, package) == []


def test_other_rules_can_fail() -> None:
    late = "def f():\n    from mindrlhf.a.y import g\n"
    assert import_circles({"mindrlhf.a.x": late, "mindrlhf.a.y": "from mindrlhf.a import x\n"})
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mindrlhf.a.y import G\n"
    assert not import_circles({"mindrlhf.a.x": typed, "mindrlhf.a.y": "from mindrlhf.a import x\n"})
    assert print_faults("def f():\n    print(1)\n") == ["2: print; use a logger"]
    methods = "    def b(self): ...\n    def _c(self): ...\n    def construct(self): ...\n"
    source = f'"""M."""\nclass A:\n    """A."""\n{methods}'
    assert docstring_faults(source) == ["4: A.b has no docstring"]
    properties = "    @property\n    def b(self): ...\n    @property\n    def d(self): ...\n"
    source = f'"""M."""\nclass A:\n    """A.\n\n    Attributes:\n        b: bee.\n    """\n{properties}'
    assert docstring_faults(source) == ["11: A.d has no docstring"]
    assert docstring_faults("def f(): ...") == ["1: the module has no docstring", "1: f has no docstring"]
