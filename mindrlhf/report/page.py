"""Puts the page together: what reads without a script as HTML, curves and samples as data for the scripts."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from mindrlhf.report.diagnostics import diagnose
from mindrlhf.report.findings import Finding
from mindrlhf.report.markup import Html, duration, join, json_for_script, number, tag
from mindrlhf.report.payload import make_payload
from mindrlhf.report.reading import Run
from mindrlhf.report.settings import settings_section
from mindrlhf.report.stage_diagnostics import diagnose_stage
from mindrlhf.report.stages import PPO, TITLES, unit_of
from mindrlhf.report.summary import Row, Summary, rows_of, summary_of, total_seconds

ASSETS = Path(__file__).parent / "assets"
STYLES = ("style.css",)
SCRIPTS = ("dom.js", "charts.js", "stack.js", "samples.js", "pairs.js", "main.js")

_LEVELS = {"error": "✕", "warning": "!", "note": "i"}
_SECTIONS = (
    ("overview", "Overview"),
    ("warnings", "Warnings"),
    ("curves", "Curves"),
    ("pairs", "Before and after"),
    ("samples", "Samples"),
    ("settings", "Configuration"),
)


def render(runs: Sequence[Run]) -> str:
    """The page about one run, or about several side by side."""
    kind = runs[0].kind
    findings = [diagnose(run) if kind == PPO else diagnose_stage(run) for run in runs]
    style = Html("\n".join(_asset(name) for name in STYLES))
    script = Html("(() => {\n'use strict';\n" + "\n".join(_asset(name) for name in SCRIPTS) + "\n})();")
    data = json_for_script(make_payload(runs, findings))
    title = f"{TITLES[kind]}: " + ", ".join(run.name for run in runs)
    left_out = {
        name for name, is_there in (("pairs", _has_pairs(runs)), ("samples", kind == PPO)) if not is_there
    }
    shown = [(name, label) for name, label in _SECTIONS if name not in left_out]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        # Nothing is fetched and no script but the page's own runs, whatever a sample says.
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(style, script)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", title),
        tag("style", style),
    )
    body = tag(
        "body",
        _header(runs),
        _navigation(shown, runs),
        tag(
            "main",
            _section("overview", "Overview", _overview(runs)),
            _section("warnings", "Warnings", _warnings(runs, findings)),
            _section("curves", "Curves", tag("div", id="charts"), _no_script()),
            _section("pairs", "Before and after", tag("div", id="pair-view")) if _has_pairs(runs) else None,
            _section("samples", "Samples", tag("div", id="sample-view")) if kind == PPO else None,
            _section("settings", "Configuration", settings_section(runs)),
        ),
        tag("div", id="tooltip", role="status", hidden=True),
        tag("script", data, type="application/json", id="data"),
        tag("script", script),
    )
    return join(Html("<!DOCTYPE html>\n"), tag("html", head, body, lang="en"), "\n")


def _policy(style: Html, script: Html) -> str:
    return (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; base-uri 'none'"
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _has_pairs(runs: Sequence[Run]) -> bool:
    return any(run.eval_samples for run in runs)


def _section(name: str, title: str, *children: Html) -> Html:
    return tag("section", tag("h2", title), *children, id=name)


def _no_script() -> Html:
    return tag("noscript", tag("p", "Curves and samples need JavaScript; everything else is here."))


def _header(runs: Sequence[Run]) -> Html:
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    facts = _facts(runs[0]) if len(runs) == 1 else [run.name for run in runs]
    button = tag(
        "button", "◐", type="button", id="theme", title="Light or dark", aria_label="Light or dark scheme"
    )
    return tag(
        "header",
        tag(
            "div",
            tag("p", f"MindRLHF · {TITLES[runs[0].kind]}", class_="kicker"),
            tag("h1", title),
            tag("p", *(tag("span", fact) for fact in facts), class_="facts"),
        ),
        button,
    )


def _facts(run: Run) -> list[str]:
    facts = [f"{len(run.metrics):,} {unit_of(run.kind)}s"]
    episodes = run.metrics[-1].get("episode")
    if episodes:
        facts.append(f"{int(episodes):,} replies")
    if total_seconds(run):
        facts.append(duration(total_seconds(run)))
    created = run.config.get("created")
    if isinstance(created, str):
        facts.append(f"started {created[:16].replace('T', ' ')} UTC")
    return facts


def _navigation(sections: Sequence[tuple[str, str]], runs: Sequence[Run]) -> Html:
    links = [tag("a", label, href=f"#{name}") for name, label in sections]
    legend = [
        tag(
            "button", tag("i", class_=f"swatch c{index % 8}"), run.name,
            type="button", class_="run", data_run=index, aria_pressed="true",
        )
        for index, run in enumerate(runs)
    ]  # fmt: skip
    return tag(
        "nav",
        tag("div", *links, class_="links"),
        tag("div", *legend, class_="legend", aria_label="Runs: press to hide or show")
        if len(runs) > 1
        else None,
        aria_label="Sections",
    )


def _overview(runs: Sequence[Run]) -> Html:
    found = [(row, [summary_of(run, row) for run in runs]) for row in rows_of(runs[0].kind)]
    found = [(row, cells) for row, cells in found if any(cells)]
    if len(runs) == 1:
        return tag("div", *(_tile(row, cells[0]) for row, cells in found if cells[0]), class_="tiles")
    return _comparison(runs, found)


def _tile(row: Row, cell: Summary) -> Html:
    if cell.best is not None:
        extreme = f"best {_value(row, cell.best)} at {cell.best_iteration}"
    else:
        extreme = f"{_value(row, cell.low)} to {_value(row, cell.high)}"
    trend = cell.last - cell.first
    mood = "" if not row.better or not trend else " good" if trend * row.better > 0 else " bad"
    return tag(
        "div",
        tag("h3", row.title),
        tag("p", _value(row, cell.last), class_="value" + mood),
        tag("p", f"first {_value(row, cell.first)}", class_="small"),
        tag("p", extreme, class_="small"),
        class_="tile",
    )


def _value(row: Row, value: float) -> str:
    return f"{100 * value:.0f} %" if row.share else number(value)


def _comparison(runs: Sequence[Run], found: Sequence[tuple[Row, Sequence[Summary | None]]]) -> Html:
    header = tag(
        "tr",
        tag("th", "Run", scope="col"),
        tag("th", f"{unit_of(runs[0].kind).capitalize()}s", scope="col"),
        *(tag("th", row.title, scope="col") for row, _ in found),
        tag("th", "Time", scope="col"),
    )
    body = []
    for index, run in enumerate(runs):
        cells = [_cell(row, [cells[index], *cells]) for row, cells in found]
        body.append(
            tag(
                "tr",
                tag("th", tag("i", class_=f"swatch c{index % 8}"), run.name, scope="row"),
                tag("td", f"{len(run.metrics):,}"),
                *cells,
                tag("td", duration(total_seconds(run))),
            )
        )
    note = (
        "Last value; below it the first, and the best with its iteration. The best run of a column is marked."
    )
    return tag(
        "div",
        tag(
            "div",
            tag("table", tag("thead", header), tag("tbody", *body), class_="comparison"),
            class_="scroll", tabindex="0", role="region", aria_label="Comparison of the runs",
        ),
        tag("p", note, class_="small"),
    )  # fmt: skip


def _cell(row: Row, summaries: Sequence[Summary | None]) -> Html:
    """A cell of the comparison: the first of ``summaries``, marked when it is the best of the others."""
    cell, *others = summaries
    if cell is None:
        return tag("td", "–")
    lasts = [other.last * row.better for other in others if other is not None]
    # max > min: where all are equal, none has won.
    wins = bool(row.better) and max(lasts) > min(lasts) and cell.last * row.better == max(lasts)
    details = [f"first {_value(row, cell.first)}"]
    if cell.best is not None:
        details.append(f"best {_value(row, cell.best)} @ {cell.best_iteration}")
    lines = [tag("span", detail, class_="small") for detail in details]
    return tag("td", tag("b", _value(row, cell.last)), *lines, class_="best" if wins else None)


def _warnings(runs: Sequence[Run], findings: Sequence[Sequence[Finding]]) -> Html:
    cards = [
        _warning(found, None if len(runs) == 1 else (index, run.name))
        for index, (run, of_run) in enumerate(zip(runs, findings, strict=True))
        for found in of_run
    ]
    if not cards:
        return tag("p", tag("span", "✓", class_="badge ok"), "Nothing to warn about.", class_="fine")
    return tag("div", *cards, class_="cards")


def _warning(found: Finding, run: tuple[int, str] | None) -> Html:
    return tag(
        "article",
        tag("span", _LEVELS[found.level], class_=f"badge {found.level}", title=found.level),
        tag(
            "div",
            tag("p", tag("i", class_=f"swatch c{run[0] % 8}"), run[1], class_="of-run") if run else None,
            tag("h3", found.text),
            tag("p", found.detail),
            tag("p", found.remedy, class_="remedy"),
        ),
        class_=f"finding {found.level}",
    )
