"""HTML that is escaped by construction: text becomes markup only through :func:`tag`."""

from __future__ import annotations

import html
import json
import math
import re
from typing import Any

from mindrlhf.report.thinning import rounded

_VOID = frozenset({"meta", "br", "input", "link"})
# HTML forbids them, and nobody can read them: control characters but for tab and line end.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


class Html(str):
    """Markup that is safe as it stands."""

    __slots__ = ()


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
    """An element; children that are no :class:`Html` are escaped, ``None`` is left out.

    Args:
        name: of the element.
        children: markup, or values whose text is escaped.
        attributes: values are escaped; ``True`` gives a bare attribute, ``None`` and ``False`` none. A
            trailing underscore goes, other underscores become hyphens: ``class_``, ``aria_label``.
    """
    words = [name]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            words.append(key)
        elif value is not None and value is not False:
            words.append(f'{key}="{_escape(value)}"')
    opening = f"<{' '.join(words)}>"
    return Html(opening) if name in _VOID else Html(f"{opening}{join(*children)}</{name}>")


def join(*children: Any) -> Html:
    """Children side by side, escaped as :func:`tag` does."""
    return Html(
        "".join(
            child if isinstance(child, Html) else _escape(child) for child in children if child is not None
        )
    )


def json_for_script(value: Any) -> Html:
    """JSON for the inside of ``<script type="application/json">``: no text in it can end the element.

    Besides ``<``, ``>`` and ``&``, U+2028 and U+2029 are escaped, and control characters that JSON allows.

    Raises:
        ValueError: a float is not finite; JSON has no such number.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Html(re.sub(r"[<>&\u2028\u2029\x7f-\x9f\ud800-\udfff]", lambda m: f"\\u{ord(m[0]):04x}", text))


def number(value: float | None, digits: int = 3) -> str:
    """A number for people: four digits or so, no exponent unless it is needed."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "−∞"}.get(value, "NaN")
    size = abs(value)
    if value == int(value) and size < 1e6:
        return f"{int(value):,}"
    if size >= 1000:
        return f"{value:,.0f}" if size < 1e7 else f"{value:.{digits}g}"
    return f"{value:.{digits}g}".replace("-", "−") if size >= 1e-4 else f"{value:.1e}".replace("-", "−")


def duration(seconds: float) -> str:
    """Seconds as ``48 s``, ``3 min 20 s`` or ``5 h 12 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def plain_number(value: Any) -> float | str | None:
    """A number as JSON takes it: rounded, or the name of what is not finite."""
    if value is None:
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return number(value)
    return rounded(float(value))


def _escape(value: Any) -> str:
    text = _CONTROL.sub("�", str(value)).encode("utf-8", "replace").decode("utf-8")
    return html.escape(text, quote=True)
