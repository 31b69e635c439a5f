"""What a value may be: type and range, stated once per key."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mindrlhf.configs.faults import Faults, did_you_mean, shown

Kind = Literal["int", "float", "bool", "str", "ids", "floats", "mapping"]

_KIND_NAMES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "True or False",
    "str": "text",
    "ids": "a token id or a list of token ids",
    "floats": "a list of numbers",
    "mapping": "a mapping",
}
MAX_INT = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Type and range of one key.

    Args:
        kind: YAML type; "float" takes whole numbers too, "ids" one id or a list without repeats.
        at_least, at_most: closed bounds; above, below: open ones. They hold for each entry of a list.
        choices: the only values allowed.
        length: the only length allowed of a list.
        required: whether the key must be there.
        nullable: whether null stands for "not given".
    """

    kind: Kind
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] = ()
    length: int | None = None
    required: bool = False
    nullable: bool = False

    @property
    def text(self) -> str:
        """The rule in words, as a remedy quotes it."""
        if self.choices:
            return "one of " + ", ".join(map(str, self.choices))
        bounds = [
            f"{name} {bound:g}"
            for name, bound in (
                (">=", self.at_least),
                (">", self.above),
                ("<=", self.at_most),
                ("<", self.below),
            )
            if bound is not None
        ]
        count = [f"of length {self.length}"] if self.length is not None else []
        return " ".join([_KIND_NAMES[self.kind], *count, " and ".join(bounds)]).strip()

    def convert(self, value: object) -> Any:
        """``value`` in its Python type.

        Raises:
            ValueError: what is wrong with it, without the value.
        """
        converted = self._typed(value)
        for entry in converted if isinstance(converted, tuple) else (converted,):
            self._check_entry(entry)
        return converted

    def _typed(self, value: object) -> Any:
        if self.kind in ("ids", "floats"):
            if self.kind == "ids" and not isinstance(value, list):
                value = [value]
            if not isinstance(value, list):
                raise ValueError("wrong type")
            if not value:
                raise ValueError("empty list")
            if self.length is not None and len(value) != self.length:
                raise ValueError("wrong length")
            entries = tuple(_scalar(entry, "int" if self.kind == "ids" else "float") for entry in value)
            if self.kind == "ids" and len(set(entries)) < len(entries):
                raise ValueError("repeated ids")
            return entries
        if self.kind == "mapping":
            if not isinstance(value, dict):
                raise ValueError("wrong type")
            return value
        return _scalar(value, self.kind)

    def _check_entry(self, entry: Any) -> None:
        if self.choices and entry not in self.choices:
            raise ValueError("not allowed")
        outside = (
            (self.at_least is not None and entry < self.at_least)
            or (self.above is not None and entry <= self.above)
            or (self.at_most is not None and entry > self.at_most)
            or (self.below is not None and entry >= self.below)
        )
        if outside:
            raise ValueError("out of range")


def _scalar(value: object, kind: Kind) -> Any:
    if kind == "bool":
        if isinstance(value, bool):
            return value
    elif kind == "str":
        if isinstance(value, str):
            return value
    elif isinstance(value, bool):
        pass  # bool is a subclass of int, but True is no count
    elif kind == "int":
        if isinstance(value, int):
            if abs(value) > MAX_INT:
                raise ValueError("out of range (more than 32 bits)")
            return value
    elif isinstance(value, int | float):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise ValueError("not finite")
        return number
    raise ValueError("wrong type")


def read_section(
    section: Mapping[Any, Any],
    rules: Mapping[str, Rule],
    faults: Faults,
    where: str,
    *,
    accepted: Iterable[str] = (),
    sources: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The valid values of ``section`` by key; every other key adds a fault.

    Args:
        section: the mapping as the YAML has it.
        rules: the keys that are used.
        faults: collects what is wrong.
        where: ``file`` or ``file: key.path`` of the section.
        accepted: further keys that may be there.
        sources: where a key was given, when not in ``section`` itself.
    """
    known = [*rules, *accepted]
    for key in section:
        if key not in known:
            at = (sources or {}).get(key, join(where, key))
            faults.add(at, "unknown key", did_you_mean(str(key), known, "remove it or check its spelling"))
    values: dict[str, Any] = {}
    for key, rule in rules.items():
        at = (sources or {}).get(key, join(where, key))
        if key not in section or (section[key] is None and rule.nullable):
            if rule.required:
                faults.add(at, "missing", f"give {rule.text}")
            continue
        try:
            values[key] = rule.convert(section[key])
        except ValueError as error:
            faults.add(at, f"{error} ({shown(section[key])})", f"must be {rule.text}")
    return values


def join(where: str, key: object) -> str:
    """``file: a.b`` from ``file: a`` and ``b``, ``file: a`` from ``file`` and ``a``."""
    name = key if isinstance(key, str) else shown(key)
    return f"{where}.{name}" if ": " in where else f"{where}: {name}"
