"""A digest of everything that the graph of a cell is made from, the same in every process."""

from __future__ import annotations

import enum
import functools
import hashlib
import logging
import sys
import types
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn

# Attributes of every cell that enter its graph; the others are bookkeeping, times and ids of this process.
_OF_EVERY_CELL = {
    "_amp_level", "_buffers", "_cells", "_func_graph_flags", "_jit_config_dict", "_params", "_primitives",
    "mixed_precision_type", "requires_grad", "training",
}  # fmt: skip
# Attributes that a compilation adds to a cell.
_OF_COMPILED_CELLS = {
    "__compile_cell_hook__", "__parse_method__", "compile_phase", "current_phase", "sequence_modified",
}  # fmt: skip
_LEFT_EMPTY = "_func_graph_flags"  # added by a compilation where there was none
_LIBRARIES = ("mindspore", "mindformers", "numpy", "builtins")  # told apart by their versions
_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)


def identity_of(*values: Any) -> str:
    """A digest of values and, attribute by attribute, of what they hold.

    Constants count with their content, parameters with name, shape and type, because their numbers are not
    part of a graph. Functions count with what they close over, classes and functions with their source file.
    """
    writer = _Writer()
    for value in values:
        writer.add(value)
    return writer.digest()


def inputs_identity(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """A digest of a call's inputs: shape and type of tensors; anything else is a constant of the graph."""
    described = [_input(value) for value in args]
    named = {name: _input(value) for name, value in kwargs.items() if name != "phase"}
    return identity_of(described, named)


def code_identity(package: Path) -> str:
    """A digest of the Python files of a package."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _input(value: Any) -> Any:
    return ("tensor", tuple(value.shape), str(value.dtype)) if isinstance(value, Tensor) else value


@functools.cache
def _bookkeeping() -> set[str]:
    return (set(vars(nn.Cell())) | _OF_COMPILED_CELLS) - _OF_EVERY_CELL


@functools.cache
def _source(module: str) -> str:
    """Digest of a module's file; empty for the libraries and for modules without a file."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if module.partition(".")[0] in _LIBRARIES or file is None:
        return ""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


class _Writer:
    """Feeds a digest with values; a value that it has met before counts by its number, so cycles end."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._met: dict[int, int] = {}
        self._alive: list[Any] = []  # else a new object could get the id of one that is gone

    def digest(self) -> str:
        """Of everything so far."""
        return self._hash.hexdigest()

    def add(self, value: Any) -> None:
        """Feeds one value."""
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes, np.generic, enum.Enum)):
            self._write(type(value).__name__, repr(value))
        elif id(value) in self._met:
            self._write("met", self._met[id(value)])
        else:
            self._met[id(value)] = len(self._met)
            self._alive.append(value)
            self._add_new(value)

    def _add_new(self, value: Any) -> None:
        if isinstance(value, Parameter):
            self._write("parameter", value.name, tuple(value.shape), value.dtype, value.requires_grad)
        elif isinstance(value, (Tensor, np.ndarray)):
            array = value.asnumpy() if isinstance(value, Tensor) else value
            self._write("array", array.shape, array.dtype, hashlib.sha256(array.tobytes()).hexdigest())
        elif isinstance(value, Mapping):
            self._write("mapping", len(value))
            for key in value:
                self.add(key)
                self.add(value[key])
        elif isinstance(value, (set, frozenset)):
            self._write("set", sorted(map(repr, value)))
        elif isinstance(value, (list, tuple)):
            self._add_all(type(value).__name__, value)
        elif isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType)):
            self._write(
                "named", getattr(value, "__module__", ""), getattr(value, "__qualname__", value.__name__)
            )
        elif isinstance(value, _FUNCTIONS):
            self._add_function(value)
        else:
            self._add_object(value)

    def _add_all(self, what: str, values: Collection[Any]) -> None:
        self._write(what, len(values))
        for value in values:
            self.add(value)

    def _add_function(self, value: Any) -> None:
        if isinstance(value, functools.partial):
            self._add_all("partial", (value.func, value.args, value.keywords))
        elif isinstance(value, types.MethodType):
            self._add_all("method", (value.__func__, value.__self__))
        else:
            self._write("function", value.__module__, value.__qualname__, _source(value.__module__))
            self._add_all("closure", (_closed_over(value), value.__defaults__, value.__kwdefaults__))

    def _add_object(self, value: Any) -> None:
        kind = type(value)
        self._write("object", kind.__module__, kind.__qualname__, _source(kind.__module__))
        if isinstance(value, (logging.Logger, Path)) or not hasattr(value, "__dict__"):
            text = repr(value)
            self._write("" if " at 0x" in text else text)
            return
        attributes = vars(value)
        skipped = _bookkeeping() if isinstance(value, nn.Cell) else set()
        for name in sorted(attributes.keys() - skipped):
            if name == _LEFT_EMPTY and not attributes[name]:
                continue
            self._write("attribute", name)
            self.add(attributes[name])

    def _write(self, *words: object) -> None:
        self._hash.update(repr([str(word) for word in words]).encode())


def _closed_over(function: types.FunctionType) -> dict[str, Any]:
    """Variables of an outer function that an inner one uses, but for the time that ``ms.jit`` notes."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # a variable that is assigned later
            found[name] = cell.cell_contents
    if function.__module__.startswith("mindspore."):
        found.pop("hash_obj", None)
    return found
