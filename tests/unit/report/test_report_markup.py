"""What every page is written with: tags, JSON inside a script, numbers and durations for people."""

from __future__ import annotations

import json
import re

import pytest

from mindrlhf.report.markup import duration, join, json_for_script, number, tag


@pytest.mark.parametrize(
    "value", ["</script>", "<!--", "]]>", "\u2028", "&lt;", "\x7f", "\ud800", "plain 中文"]
)
def test_json_for_script_keeps_the_value(value: str) -> None:
    text = json_for_script({value: [value, None, True, 1.5]})
    assert json.loads(text) == {value: [value, None, True, 1.5]}
    assert not re.search(r"[<>&\u2028\ud800\x7f]", text)
    with pytest.raises(ValueError, match="JSON"):
        json_for_script([float("nan")])


def test_tags_escape_by_construction() -> None:
    assert tag("p", "<b>", tag("i", "&"), None, title='"x"', hidden=True, open=False) == (
        '<p title="&quot;x&quot;" hidden>&lt;b&gt;<i>&amp;</i></p>'
    )
    assert tag("meta", charset="utf-8", http_equiv="x") == '<meta charset="utf-8" http-equiv="x">'
    assert tag("a", class_="b", name="c", aria_label="d") == '<a class="b" name="c" aria-label="d"></a>'
    assert join("<", 1, tag("br")) == "&lt;1<br>"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (-0.04069, "−0.0407"), (12.0, "12"), (1234567.8, "1,234,568"), (3e-7, "3.0e−07"),
        (0.5, "0.5"), (float("nan"), "NaN"), (float("-inf"), "−∞"), (None, "–"), (1500.4, "1,500"),
    ],
)  # fmt: skip
def test_numbers_for_people(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.14, "3.1 s"), (48.4, "48 s"), (59.7, "1 min 0 s"), (200, "3 min 20 s"), (18720, "5 h 12 min")],
)
def test_durations_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text
