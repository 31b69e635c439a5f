"""Imports a script the way Python runs it: with its own folder first on the path."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def import_script(repo_root: Path) -> Callable[[str], ModuleType]:
    """Takes the name of a file in scripts/, without its suffix."""

    def load(name: str) -> ModuleType:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(repo_root / "scripts")
            return importlib.import_module(name)

    return load
