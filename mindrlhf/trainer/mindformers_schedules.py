"""MindFormers' builder of learning-rate schedules, without the rest of MindFormers.

``import mindformers`` imports all of it, and torch, datasets, scipy and pandas where they are installed: 4 s
of processor time per worker. The builder needs 0.2 s.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import metadata
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from types import ModuleType
from typing import Any

_PACKAGES = ("mindformers", "mindformers.core")


def load_build_lr() -> Callable[..., Any]:
    """MindFormers' ``build_lr``.

    The code of the two packages above them does not run until another name is imported from them, such as by
    ``from mindformers import AutoTokenizer``.
    """
    if _PACKAGES[0] not in sys.modules:
        _register(_PACKAGES[0])
    # Imported here because it makes a directory for logs, see LOCAL_DEFAULT_PATH in runtime/launching.py.
    from mindformers.core.lr import build_lr

    return build_lr


def _register(name: str) -> None:
    """Registers ``mindformers`` and ``mindformers.core`` so that modules in them can be imported."""
    spec = PathFinder.find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        return  # the import below says that it is not installed
    package = _lazy_package(spec)
    package.__version__ = metadata.version(name)  # type: ignore[attr-defined]
    core = PathFinder.find_spec(_PACKAGES[1], package.__path__)
    if core is None or core.submodule_search_locations is None:
        return  # another MindFormers, which is imported as a whole
    sys.modules[name] = package
    sys.modules[_PACKAGES[1]] = _lazy_package(core)
    package.core = sys.modules[_PACKAGES[1]]  # type: ignore[attr-defined]


def _lazy_package(spec: ModuleSpec) -> ModuleType:
    """A package whose modules can be imported; its own code runs when a missing name is asked for."""
    module = module_from_spec(spec)

    def run(name: str) -> Any:
        if name.startswith("__") and name != "__all__":  # Python itself asks any module for these
            raise AttributeError(f"module {spec.name!r} has no attribute {name!r}")
        del module.__getattr__
        assert spec.loader is not None
        spec.loader.exec_module(module)
        return getattr(module, name)

    module.__getattr__ = run  # type: ignore[method-assign]
    return module
