"""docs/scaling.md is what scripts/make_scaling.py writes; the part of many workers takes too long here."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_the_table_is_what_the_script_computes() -> None:
    spec = importlib.util.spec_from_file_location("make_scaling", ROOT / "scripts" / "make_scaling.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = module.DOCUMENT.read_text(encoding="utf-8")
    assert written.startswith(module.HEAD), "run scripts/make_scaling.py"
    lines = written.removeprefix(module.HEAD).splitlines()
    assert len(lines) == len(module.SHAPES) * len(module.WORLD_SIZES)
    for name, shape in module.SHAPES.items():
        for world_size in (1, 4, 8, 32):
            assert module.row(name, shape, world_size) in lines, "run scripts/make_scaling.py"
