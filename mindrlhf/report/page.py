"""Assembles the page: ``page.html.j2`` with numbers, settings and warnings, and data for ``page.js``."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mindrlhf.report.charts import COLORS, LEVEL_COLORS, Chart, make_figures, rounded
from mindrlhf.report.diagnostics import diagnose
from mindrlhf.report.run_data import PPO, TITLES, Line, Run, Series

ASSETS = Path(__file__).parent / "assets"
SAMPLE_BYTES = 8_000_000
"""Budget of all training samples of the page."""
EVAL_SAMPLE_BYTES = 3_000_000
"""Budget of all evaluation samples of the page."""
EXTREME_SAMPLES = 50
"""Samples with the highest and with the lowest scores that are always kept."""

GENERATOR = "MindRLHF report"
"""What a page says it was made by, in its head."""

_HEAD_BYTES = 1000
_MAX_SETTING = 300
# HTML forbids control characters except for tab and line end.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


class Summary(NamedTuple):
    """A metric of one run in a few numbers, of its finite values.

    Attributes:
        first, last: values of the first and last iteration that have one.
        best: the best value, ``None`` when neither direction is good.
        best_iteration: the first iteration that has it.
        low, high: extremes.
    """

    first: float
    last: float
    best: float | None
    best_iteration: int | None
    low: float
    high: float


class OverviewRow(NamedTuple):
    """A metric of the overview.

    Attributes:
        title: for people.
        better: as in :class:`Chart`.
        share: whether it is read as per cent.
        cells: of each run.
        best: which runs have the best last value.
    """

    title: str
    better: int
    share: bool
    cells: list[Summary | None]
    best: list[bool]


def is_report(path: Path) -> bool:
    """Whether a file is such a page."""
    with path.open("rb") as file:
        return f'content="{GENERATOR}"'.encode() in file.read(_HEAD_BYTES)


def render(runs: Sequence[Run]) -> str:
    """The page about one run, or about several side by side; runs are of one kind."""
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    def readable(value: Any) -> Any:
        return value if isinstance(value, Markup) else _CONTROL.sub("\ufffd", str(value))

    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        finalize=readable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # The text of a sample is unchanged; tojson escapes what HTML could read as markup in any case.
    environment.policies["json.dumps_kwargs"] = {
        "ensure_ascii": False, "allow_nan": False, "separators": (",", ":"),
    }  # fmt: skip
    environment.filters |= {"number": number, "duration": duration}
    findings = [diagnose(run) for run in runs]
    groups = make_figures(runs, findings)
    plotly, script = get_plotlyjs(), (ASSETS / "page.js").read_text(encoding="utf-8")
    return environment.get_template("page.html.j2").render(
        generator=GENERATOR,
        runs=runs,
        kind=TITLES[runs[0].kind],
        unit=runs[0].unit,
        overview=overview(runs, [figure.chart for figures in groups.values() for figure in figures]),
        seconds=[float(run.series("time/iteration").finite.values.sum()) for run in runs],
        findings=[(place, finding) for place, found in enumerate(findings) for finding in found],
        groups=groups,
        settings=settings_tables(runs),
        differences=differences(runs),
        data=page_data(runs) | {"plots": [figure.plot for figures in groups.values() for figure in figures]},
        has_samples=runs[0].kind == PPO,
        has_pairs=any(run.eval_samples for run in runs),
        colors=COLORS,
        levels=LEVEL_COLORS,
        style=Markup((ASSETS / "page.css").read_text(encoding="utf-8")),
        plotly=Markup(plotly),
        script=Markup(script),
        # Nothing is fetched and only the page's own two scripts run, whatever a sample contains. Plotly sets
        # inline styles.
        policy="default-src 'none'; base-uri 'none'; style-src 'unsafe-inline'; "
        f"script-src '{_digest(plotly)}' '{_digest(script)}'",
    )


def overview(runs: Sequence[Run], charts: Iterable[Chart]) -> list[OverviewRow]:
    """First, last and best of the charts that belong to the overview, held-out results first."""
    found = []
    for held_out in (True, False):
        for chart in charts:
            is_alone = chart.metric.startswith("eval/")
            if chart.better is None or (held_out and not chart.better) or (is_alone and not held_out):
                continue
            name = chart.held_out if held_out else chart.metric
            every = [run.evaluation_series(name) if held_out else run.series(name) for run in runs]
            cells = [summarize(series, chart.better) for series in every]
            lasts = [cell.last * chart.better for cell in cells if cell]
            # max > min: where all are equal, none is the best.
            wins = bool(chart.better and lasts and max(lasts) > min(lasts))
            best = [wins and cell is not None and cell.last * chart.better == max(lasts) for cell in cells]
            title = f"{chart.title}, held-out" if held_out and name != chart.metric else chart.title
            unit = f" ({chart.unit})" if chart.unit and not chart.is_share else ""
            if lasts:
                found.append(OverviewRow(title + unit, chart.better, chart.is_share, cells, best))
    return found


def summarize(series: Series, better: int = 0) -> Summary | None:
    """A metric in a few numbers; ``None`` when it has no finite value."""
    iterations, values = series.finite
    if not len(values):
        return None
    best = int((values * better).argmax())
    return Summary(
        float(values[0]),
        float(values[-1]),
        float(values[best]) if better else None,
        int(iterations[best]) if better else None,
        float(values.min()),
        float(values.max()),
    )


def sections_of(run: Run) -> dict[str, dict[str, str]]:
    """The settings of a run as flat tables by section: ``{"Machine": {"cpu_count": "2"}, ...}``."""
    config = dict(run.config)
    nested = config.pop("configuration", None)
    nested = dict(nested) if isinstance(nested, Mapping) else {}
    software = flatten({name: config.pop(name, None) for name in ("versions", "git", "created")})
    machine = flatten(config.pop("machine", {}))
    memory = machine.pop("memory_bytes", "")
    if memory.isdigit():
        machine["memory"] = f"{int(memory) / 2**30:.1f} GiB"
    sections = {
        "PPO": flatten(nested.pop("ppo", {})),
        "Flags": flatten(nested.pop("options", {})),
        "Versions": {key.removeprefix("versions."): text for key, text in software.items() if text != "none"},
        "Machine": machine,
        **{str(name): flatten(value, name=str(name)) for name, value in nested.items()},
        "Other": flatten(config),
    }
    if run.checkpoint is not None:
        sections[f"Newest checkpoint: {run.checkpoint}"] = flatten(run.state)
    return {name: table for name, table in sections.items() if table}


def settings_tables(runs: Sequence[Run]) -> list[tuple[str, list[dict[str, str]], list[str]]]:
    """The sections of all runs: title, one table per run, and all keys of these."""
    columns = [sections_of(run) for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    tables = {name: [column.get(name, {}) for column in columns] for name in names}
    return [
        (name, found, list(dict.fromkeys(key for t in found for key in t))) for name, found in tables.items()
    ]


def differences(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Settings that are not the same in all runs that have a ``config.json``: one table per run."""
    flat = [
        {f"{title} · {key}": text for title, table in sections_of(run).items() for key, text in table.items()}
        for run in runs
    ]
    known = [table for table, run in zip(flat, runs, strict=True) if run.config]
    keys = dict.fromkeys(key for table in known for key in table if "checkpoint" not in key)
    different = [key for key in keys if len({table.get(key) for table in known}) > 1]
    return [{key: table.get(key, "–") for key in different} for table in flat]


def flatten(value: Any, prefix: str = "", name: str = "value") -> dict[str, str]:
    """Nested mappings as one: ``{"a": {"b": 1}}`` becomes ``{"a.b": "1"}``; lists stay one value."""
    if isinstance(value, Mapping):
        flat: dict[str, str] = {}
        for key, entry in value.items():
            flat |= flatten(entry, f"{prefix}.{key}" if prefix else str(key))
        return flat
    text = "none" if value is None else _text(value)
    return {prefix or name: text if len(text) <= _MAX_SETTING else text[:_MAX_SETTING] + " …"}


def page_data(runs: Sequence[Run]) -> dict[str, Any]:
    """What the page's script needs besides the figures, as JSON values.

    ``samples`` and ``pairs`` are rows ``[run, iteration, place in prompts, response, score, KL]``.
    """
    prompts: dict[str, int] = {}
    longest_run = max(len(run.metrics) for run in runs)
    samples, longest = _rows([run.samples for run in runs], prompts, SAMPLE_BYTES)
    pairs, _ = _rows([run.eval_samples for run in runs], prompts, EVAL_SAMPLE_BYTES)
    return {
        "unit": runs[0].unit,
        "runs": [run.name for run in runs],
        "smoothing": round(min(0.98, max(0.0, 1 - 30 / longest_run)), 2) if longest_run > 60 else 0,
        "samples": samples,
        "sampleCount": sum(len(run.samples) for run in runs),
        "longest": longest,
        "pairs": pairs,
        "prompts": list(prompts),
    }


def fit_samples(samples: Sequence[Line], budget: int) -> tuple[list[Line], int]:
    """As many samples as fit into about ``budget`` bytes of JSON.

    Long texts are cut first; then samples are dropped, evenly over the run, but never the best, the worst,
    the first or the last.

    Returns:
        the samples in their order, and how many characters of a text were kept at most.
    """
    for most in (8000, 4000, 2000, 1000):
        cut = [
            {**sample, **{name: _cut(_text(sample.get(name)), most) for name in ("prompt", "response")}}
            for sample in samples
        ]
        sizes = np.array([len(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace")) for row in cut])
        if sizes.sum() <= budget:
            return cut, most
    scored = [place for place, sample in enumerate(samples) if sample.get("score") is not None]
    ranked = sorted(scored, key=lambda place: samples[place]["score"])
    kept = {*ranked[:EXTREME_SAMPLES], *ranked[-EXTREME_SAMPLES:], 0, len(cut) - 1}
    room = budget - int(sizes[list(kept)].sum())
    if room > 0:
        kept |= set(range(0, len(cut), math.ceil(int(sizes.sum()) / room)))
    return [cut[place] for place in sorted(kept)], most


def number(value: float | None) -> str:
    """A number for display: about three digits, no exponent unless it is needed."""
    if value is None or not math.isfinite(value):
        return "–" if value is None else {math.inf: "∞", -math.inf: "−∞"}.get(value, "NaN")
    size = abs(value)
    if (size < 1e6 and value == int(value)) or 1000 <= size < 1e7:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.3g}" if size >= 1e-4 else f"{value:.1e}"
    return text.replace("-", "−")


def duration(seconds: float) -> str:
    """Seconds as ``48 s``, ``3 min 20 s`` or ``5 h 12 min``."""
    if not math.isfinite(seconds):
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def _rows(by_run: Sequence[Sequence[Line]], prompts: dict[str, int], budget: int) -> tuple[list[Any], int]:
    rows: list[Any] = []
    longest = 0
    for run, samples in enumerate(by_run):
        kept, most = fit_samples(samples, budget // len(by_run))
        longest = max(longest, most)
        for sample in kept:
            place = prompts.setdefault(sample["prompt"], len(prompts))
            numbers = (_json_number(sample.get(name)) for name in ("score", "kl"))
            rows.append([run, int(sample["iteration"]), place, sample["response"], *numbers])
    return rows, longest


def _json_number(value: float | None) -> float | str | None:
    """A number for JSON: rounded, or the name of what is not finite."""
    return None if value is None else rounded(value) if math.isfinite(value) else number(value)


def _text(value: Any) -> str:
    """Text as it is; other values, such as token ids of runs without a tokenizer, as JSON."""
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]} … [{len(text) - most} more characters]"


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
