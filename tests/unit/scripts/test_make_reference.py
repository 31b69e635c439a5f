"""The reference of flags and keys against the code that it is written from."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "make_reference.py"


@pytest.fixture(scope="module")
def make_reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_reference", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_file_is_what_the_script_writes(make_reference: ModuleType) -> None:
    written = make_reference.REFERENCE.read_text(encoding="utf-8")
    assert written == make_reference.reference(), "run scripts/make_reference.py"
    for path in make_reference.SETTINGS:
        text = path.read_text(encoding="utf-8")
        assert text == make_reference.settings_file(text), f"{path}: run scripts/make_reference.py"


def test_every_key_and_flag_is_explained(make_reference: ModuleType) -> None:
    rows = [line for line in make_reference.reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 150
    cells = [[cell.strip() for cell in row.replace("\\|", "").strip("|").split("|")] for row in rows]
    assert [row for row in cells if len(row[-1]) < 3] == []
    assert {len(row) for row in cells} == {3, 4}
