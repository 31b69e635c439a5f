"""Strict YAML: duplicate keys are faults, ``1e-6`` is a number, every failure is a :class:`Faults` line."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from mindrlhf.configs.faults import Faults, shown

# PyYAML's constructors fail in many ways on odd scalars ("!!int ''", an impossible date, 10,000 digits).
_CONSTRUCTION_ERRORS = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


_MAX_DEPTH = 50
"""More than any configuration needs; the parser is recursive, and Python's limit may have been raised."""


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and deep nesting and reads exponents without a dot as floats."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self._depth >= _MAX_DEPTH:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, f"nested more than {_MAX_DEPTH} deep", mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.value != "<<":
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key_node.value} is given twice", key_node.start_mark
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


# YAML 1.1 reads 1e-6 as a string, since it has no dot; nobody who writes it means a string.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_mapping(path: Path, faults: Faults) -> dict[Any, Any] | None:
    """The mapping at the root of a YAML file; ``None``, with a fault added, when there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        faults.add(str(path), "there is no such file", "give the path of a YAML file")
        return None
    except (OSError, UnicodeDecodeError) as error:
        faults.add(str(path), f"cannot be read ({error})", "give the path of a UTF-8 YAML file")
        return None
    root = _parse(text, str(path), faults)
    if root is _FAILED:
        return None
    if not isinstance(root, dict):
        found = "empty" if root is None else f"a {type(root).__name__}"
        faults.add(str(path), f"the root is {found}", "write 'key: value' lines at the top level")
        return None
    return root


def parse_value(text: str, where: str, faults: Faults) -> tuple[bool, Any]:
    """A command-line value read as YAML: (whether it could be read, the value)."""
    value = _parse(text, where, faults)
    return value is not _FAILED, value


_FAILED = object()


def _parse(text: str, where: str, faults: Faults) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "unknown line"
        faults.add(where, f"{line}: {error.problem or error.context}", "fix the YAML there")
    except yaml.YAMLError as error:
        faults.add(where, f"not YAML ({shown(str(error))})", "fix the YAML there")
    except _CONSTRUCTION_ERRORS as error:
        faults.add(where, f"a value YAML cannot make sense of ({shown(str(error))})", "quote it or fix it")
    return _FAILED
