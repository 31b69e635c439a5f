"""The configuration, versions and machine of each run as tables, and what differs between runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mindrlhf.report.markup import Html, tag
from mindrlhf.report.reading import CONFIG_FILE, Run

_NOT_RECORDED = f"Not recorded: this run has no {CONFIG_FILE}."
_MAX_TEXT = 300


def settings_section(runs: Sequence[Run]) -> Html:
    """All settings: those that differ first when there are several runs, then one folded table a section."""
    columns = [sections_of(run) for run in runs]
    if not any(columns):
        return tag("p", _NOT_RECORDED)
    parts = [
        tag("p", f"{run.name}: no {CONFIG_FILE}.", class_="small") for run in runs if not run.config
    ] if len(runs) > 1 else []  # fmt: skip
    if len(runs) > 1:
        parts.append(_differences(runs, columns))
    names = dict.fromkeys(name for column in columns for name in column)
    for place, name in enumerate(names):
        tables = [column.get(name, {}) for column in columns]
        count = len({key for table in tables for key in table})
        heading = tag("summary", tag("h3", name), tag("span", f"{count}", class_="small"))
        is_open = place < 3 and len(runs) == 1
        parts.append(tag("details", heading, _table(runs, tables), open=is_open))
    return tag("div", *parts, class_="settings")


def sections_of(run: Run) -> dict[str, dict[str, str]]:
    """The settings of a run as flat tables by section: ``{"Machine": {"cpu_count": "2"}, ...}``."""
    sections: dict[str, dict[str, str]] = {}
    configuration = run.config.get("configuration")
    nested = dict(configuration) if isinstance(configuration, Mapping) else {}
    if "ppo" in nested:
        sections["PPO"] = flatten(nested.pop("ppo"))
    if "options" in nested:
        sections["Flags"] = flatten(nested.pop("options"))
    software = {name: run.config.get(name) for name in ("versions", "git", "created")}
    sections["Versions"] = {
        key.removeprefix("versions."): text for key, text in flatten(software).items() if text != "none"
    }
    sections["Machine"] = _readable_memory(flatten(run.config.get("machine", {})))
    for name, value in nested.items():
        sections[str(name)] = flatten(value, name=str(name))
    rest = {
        key: value
        for key, value in run.config.items()
        if key not in ("configuration", "versions", "git", "machine", "created")
    }
    sections["Other"] = flatten(rest)
    if run.checkpoint is not None:
        sections[f"Newest checkpoint: {run.checkpoint}"] = flatten(run.state)
    return {name: table for name, table in sections.items() if table}


def flatten(value: Any, prefix: str = "", name: str = "value") -> dict[str, str]:
    """Nested mappings as one: ``{"a": {"b": 1}}`` becomes ``{"a.b": "1"}``; lists stay one value."""
    if isinstance(value, Mapping):
        flat: dict[str, str] = {}
        for key, entry in value.items():
            flat |= flatten(entry, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix or name: _text(value)}


def _text(value: Any) -> str:
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT] + " …"


def _readable_memory(table: dict[str, str]) -> dict[str, str]:
    text = table.pop("memory_bytes", None)
    if text is not None and text.isdigit():
        table["memory"] = f"{int(text) / 2**30:.1f} GiB"
    return table


def _differences(runs: Sequence[Run], columns: Sequence[Mapping[str, Mapping[str, str]]]) -> Html:
    flat = [
        {f"{section} · {key}": text for section, table in column.items() for key, text in table.items()}
        for column in columns
    ]
    # A run without config.json differs in everything, which says nothing.
    known = [table for table, run in zip(flat, runs, strict=True) if run.config]
    keys = dict.fromkeys(key for table in known for key in table if "checkpoint" not in key)
    different = [key for key in keys if len({table.get(key) for table in known}) > 1]
    if not different:
        return tag("p", "All recorded settings are equal." if len(known) > 1 else "Nothing to compare.")
    tables = [{key: table.get(key, "–") for key in different} for table in flat]
    return tag("div", tag("h3", "What differs"), _table(runs, tables), class_="differences")


def _table(runs: Sequence[Run], tables: Sequence[Mapping[str, str]]) -> Html:
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = [
        tag("tr", tag("th", key, scope="row"), *(tag("td", table.get(key, "–")) for table in tables))
        for key in keys
    ]
    names = [tag("th", run.name, scope="col") for run in runs]
    head = tag("thead", tag("tr", tag("th", "Setting", scope="col"), *names)) if len(runs) > 1 else None
    # Keys that belong together side by side on a wide screen, which one column of pairs allows.
    table = tag("table", head, tag("tbody", *rows), class_="pairs" if len(runs) == 1 else "matrix")
    return tag("div", table, class_="scroll")
