"""Keys: a key is declared once, as a field of a frozen dataclass.

Its annotation holds type and range (checked by pydantic), :func:`key` its default and one sentence of help.
YAML checks, command-line flags, ``--help`` and the reference derive from the declaration.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Len, Lt
from pydantic import (
    AfterValidator,
    AllowInfNan,
    BeforeValidator,
    GetCoreSchemaHandler,
    Strict,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import core_schema

from mindrlhf.configs.faults import Faults, did_you_mean, shown

MAX_INT = 2**31 - 1


@dataclass(frozen=True)
class Words:
    """In an annotation: what values are allowed, where bounds and choices do not say it."""

    text: str


@dataclass(frozen=True)
class OneOf:
    """In an annotation: the only values allowed, asked for whenever a value is checked."""

    names: Callable[[], Iterable[str]]

    def _check(self, value: str) -> str:
        if value not in self.names():
            raise ValueError("not allowed")
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        """The schema of the type, and the check behind it."""
        return core_schema.no_info_after_validator_function(self._check, handler(source))


def _listed(value: object) -> object:
    return value if isinstance(value, list | tuple) else [value]


def _without_repeats(ids: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(ids)) < len(ids):
        raise ValueError("repeated ids")
    return ids


def _not_zero(number: int) -> int:
    if number == 0:
        raise ValueError("out of range")
    return number


def _on_off(value: object) -> object:
    return {"ON": True, "OFF": False}.get(value, value) if isinstance(value, str) else value


# bool is a subclass of int, but strict checks refuse it; strict floats take whole numbers, too.
_Int = Annotated[int, Strict(), Le(MAX_INT)]
_Float = Annotated[float, Strict(), AllowInfNan(False)]
Natural = Annotated[_Int, Ge(0)]
Count = Annotated[_Int, Ge(1)]
NotNegative = Annotated[_Float, Ge(0)]
Positive = Annotated[_Float, Gt(0)]
Fraction = Annotated[_Float, Ge(0), Le(1)]
# A float32 logit has 7 digits; divided by less, its rounding error alone is worth several nats.
Temperature = Annotated[_Float, Ge(1e-6)]
CountOrMinusOne = Annotated[_Int, AfterValidator(_not_zero), Ge(-1), Words("-1 or a whole number >= 1")]
Flag = Annotated[bool, Strict()]
# Without quotes, YAML itself makes True of ON.
OnOff = Annotated[bool, BeforeValidator(_on_off), Strict(), Words("ON or OFF")]
Text = Annotated[str, Strict()]
TokenIds = Annotated[
    tuple[Natural, ...],
    BeforeValidator(_listed),
    Len(1),
    AfterValidator(_without_repeats),
    Words("a token id or a list of token ids >= 0"),
]
DType = Literal["float32", "float16", "bfloat16"]
DeviceTarget = Annotated[Text, OneOf(lambda: ("CPU", "Ascend", "GPU"))]

_KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text", Path: "a path"}
_BOUNDS = ((Ge, ">=", "ge"), (Gt, ">", "gt"), (Le, "<=", "le"), (Lt, "<", "lt"))


@dataclass(frozen=True)
class Key:
    """One key or flag.

    Attributes:
        annotation: type and range, as pydantic reads them.
        default: ``...`` when there is none.
        help: what it is, in one sentence.
        group: the heading that lists it.
        required: whether a YAML or command line must give it.
        nullable: whether null in a YAML stands for "not given".
        flag: on the command line, when it is not ``--`` and the name.
        parse: argparse type, when the annotation does not say it.
        metavar: argparse's name for the value.
        of_weights: whether models that share weights must agree on it.
    """

    annotation: Any
    default: Any = ...
    help: str = ""
    group: str = ""
    required: bool = False
    nullable: bool = False
    flag: str | None = None
    parse: Callable[[str], Any] | None = None
    metavar: str | None = None
    of_weights: bool = False

    @cached_property
    def _adapter(self) -> TypeAdapter[Any]:
        return TypeAdapter(self.annotation)

    @cached_property
    def _unwrapped(self) -> tuple[Any, tuple[Any, ...]]:
        """The annotation without ``| None``: the type, and what annotates it."""
        annotation = self.annotation
        if get_origin(annotation) in (Union, types.UnionType):
            (annotation,) = (one for one in get_args(annotation) if one is not type(None))
        if get_origin(annotation) is Annotated:
            return get_args(annotation)[0], get_args(annotation)[1:]
        return annotation, ()

    @property
    def base(self) -> Any:
        """The type without its range and without ``| None``."""
        return self._unwrapped[0]

    @property
    def optional(self) -> bool:
        """Whether ``None`` is a value."""
        return type(None) in get_args(self.annotation)

    @property
    def choices(self) -> tuple[Any, ...]:
        """The only values allowed; empty: any value of the type and range."""
        if get_origin(self.base) is Literal:
            return get_args(self.base)
        return tuple(name for one in self._unwrapped[1] if isinstance(one, OneOf) for name in one.names())

    @property
    def allowed(self) -> str:
        """Type and range in words, as a remedy quotes them."""
        base, metadata = self._unwrapped
        for entry in metadata:
            if isinstance(entry, Words):
                return entry.text
        if self.choices:
            return "one of " + ", ".join(map(str, self.choices))
        bounds = {}  # the innermost annotation comes first, the narrowest bound last
        for kind, sign, attribute in _BOUNDS:
            for entry in metadata:
                if isinstance(entry, kind) and getattr(entry, attribute) != MAX_INT:
                    bounds[sign] = f"{sign} {getattr(entry, attribute):g}"
        return f"{_KINDS.get(base, 'a list of texts')} {' and '.join(bounds.values())}".strip()

    def convert(self, value: object) -> Any:
        """``value`` in its Python type.

        Raises:
            ValueError: what is wrong with it, without the value.
        """
        try:
            return self._adapter.validate_python(value)
        except ValidationError as error:
            raise ValueError(_fault(error, value)) from None


def _fault(error: ValidationError, value: object) -> str:
    """Pydantic's first error, reworded."""
    first = error.errors(include_url=False, include_input=False)[0]
    kind = first["type"]
    if kind == "value_error":
        return str(first["ctx"]["error"])
    if kind in ("too_short", "too_long"):
        return "wrong length" if value else "empty list"
    if kind == "literal_error":
        return "not allowed"
    if kind == "finite_number" or (kind == "float_type" and type(value) is int):  # 10^400 is not a float
        return "not finite"
    if kind.startswith(("greater_than", "less_than")):
        return "out of range" + (" (more than 32 bits)" if first["ctx"].get("le") == MAX_INT else "")
    return "wrong type"


def key(default: Any, text: str, **more: Any) -> Any:
    """A field with its default (``...``: none) and its help; ``more`` are attributes of :class:`Key`."""
    metadata = {"key": {"help": text} | more}
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


@cache
def keys_of(declaration: type) -> dict[str, Key]:
    """The keys that a dataclass declares, its own before its bases'; fields without help are not keys."""
    hints = get_type_hints(declaration, include_extras=True)
    declared = {one.name: one for one in fields(declaration)}
    names = (name for kind in declaration.__mro__ for name in vars(kind).get("__annotations__", ()))
    found = {}
    for one in (declared[name] for name in dict.fromkeys(names)):
        if "key" in one.metadata:
            more = dict(one.metadata["key"])
            default = ... if one.default is MISSING else one.default
            required = more.pop("required", default is ... and not more.get("nullable"))
            found[one.name] = Key(hints[one.name], default, required=required, **more)
    return found


def read_section(
    section: Mapping[Any, Any],
    keys: Mapping[str, Key],
    faults: Faults,
    where: str,
    *,
    accepted: Iterable[str] = (),
    remedies: Mapping[str, str] | None = None,
    sources: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The valid values of ``section`` by key; every other key adds a fault.

    Args:
        section: the mapping from the YAML.
        keys: the keys that are used.
        faults: collects what is wrong.
        where: ``file`` or ``file: key.path`` of the section.
        accepted: further keys that may be present.
        remedies: what to do about some unknown keys.
        sources: where a key was given, when not in ``section`` itself.
    """

    def place(name: Any) -> str:
        return (sources or {}).get(name, join(where, name))

    known = [*keys, *accepted]
    for name in section:
        if name not in known:
            remedy = did_you_mean(str(name), known, "remove it or check its spelling")
            faults.add(place(name), "unknown key", (remedies or {}).get(name, remedy))
    values: dict[str, Any] = {}
    for name, one in keys.items():
        if name not in section or (section[name] is None and one.nullable):
            if one.required:
                faults.add(place(name), "missing", f"give {one.allowed}")
            continue
        try:
            values[name] = one.convert(section[name])
        except ValueError as error:
            faults.add(place(name), f"{error} ({shown(section[name])})", f"must be {one.allowed}")
    return values


def join(where: str, name: object) -> str:
    """``file: a.b`` from ``file: a`` and ``b``, ``file: a`` from ``file`` and ``a``."""
    text = name if isinstance(name, str) else shown(name)
    return f"{where}.{text}" if ": " in where else f"{where}: {text}"
