"""The page: well-formed, self-contained, escaped, the right numbers, small for large runs."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindrlhf.report.__main__ import write_report
from mindrlhf.report.charts import GROUPS
from mindrlhf.report.page import (
    ASSETS,
    duration,
    fit_samples,
    flatten,
    number,
    render,
    sections_of,
    summarize,
)
from mindrlhf.report.run_data import Series, read_runs
from mindrlhf.utils.errors import MindRLHFError
from tests.unit.report.conftest import (
    CONFIG,
    plain_line,
    reward_lines,
    stage_config,
    stage_lines,
    synthetic_metrics,
    synthetic_samples,
)

MakeRun = Callable[..., Path]
ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&<!--\u2028"
VOID = {"meta", "br", "input", "link"}


class Page(HTMLParser):
    """Elements and texts of a page; refuses tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, int]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            texts = self.texts.setdefault(tag, [])
            self.open.append((tag, len(texts)))
            texts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for name, place in self.open:
            self.texts[name][place] += data

    def named(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]

    def payload(self) -> dict[str, Any]:
        return json.loads(self.texts["script"][0])


def page_of(*directories: Path) -> tuple[str, Page]:
    text = render(read_runs(directories))
    return text, Page(text)


def test_sections_and_references(whole_run: Path) -> None:
    _, page = page_of(whole_run)
    ids = [attributes["id"] for _, attributes in page.elements if attributes.get("id")]
    assert len(ids) == len(set(ids))
    sections = [attributes["id"] for attributes in page.named("section")]
    assert sections == ["overview", "warnings", "curves", "pairs", "samples", "settings"]
    assert [attributes["href"] for attributes in page.named("a")] == [f"#{name}" for name in sections]
    assert page.texts["h1"] == ["whole"]
    assert page.texts["title"] == ["PPO: whole"]
    assert page.named("html") == [{"lang": "en"}]


def test_nothing_is_fetched_and_only_its_own_script_runs(whole_run: Path) -> None:
    _, page = page_of(whole_run)
    assert not [name for name, _ in page.elements if name in {"link", "iframe", "img", "object", "base"}]
    assert not [attributes for _, attributes in page.elements if "src" in attributes or "style" in attributes]
    assert not [key for _, attributes in page.elements for key in attributes if key.startswith("on")]
    code = "".join(page.texts["style"]) + page.texts["script"][2]
    assert not re.findall(r"https?://[^\s'\"]+", code)
    assert not re.search(
        r"\b(fetch|XMLHttpRequest|import\s*\(|eval|innerHTML|document\.write)\b|@import|url\((?!#)", code
    )
    (policy,) = [a["content"] or "" for a in page.named("meta") if a.get("http-equiv")]
    assert policy.startswith("default-src 'none';")
    digests = [
        base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in page.texts["script"]
    ]
    assert policy.endswith(f"script-src 'sha256-{digests[1]}' 'sha256-{digests[2]}'")
    assert "plotly.js" in page.texts["script"][1][:200]
    assert [attributes.get("type") for attributes in page.named("script")] == ["application/json", None, None]


def test_what_the_model_says_is_text(make_run: MakeRun) -> None:
    sample = {"iteration": 1, "prompt": f"p{ATTACK}", "response": f"r{ATTACK}", "score": 1.0, "kl": 0.0}
    evaluation = {"iteration": 0, "eval/scores": 1.0, "note": ATTACK}
    directory = make_run(
        "a<b>&'\"",
        metrics=[plain_line(1, **{f"x/{ATTACK}": 2.0})],
        samples=[sample],
        evaluations=[evaluation],
        eval_samples=[sample],
        config={"versions": {ATTACK: ATTACK}, "configuration": {ATTACK: {ATTACK: ATTACK}}},
        state={ATTACK: ATTACK},
    )
    text, page = page_of(directory)
    assert len(page.named("script")) == 3
    assert page.named("img") == []
    assert "alert(1)</script>" not in text
    assert "<!--" not in text.replace(page.texts["script"][1], "")
    data = page.payload()
    assert data["prompts"] == [f"p{ATTACK}"]
    assert data["samples"] == [[0, 1, 0, f"r{ATTACK}", 1.0, 0.0]]
    assert page.texts["h1"] == ["a<b>&'\""]
    assert ATTACK.replace("\u2028", "") in "".join(page.texts["section"]).replace("\u2028", "")


def test_unreadable_characters_do_no_harm(make_run: MakeRun, tmp_path: Path) -> None:
    directory = make_run(config={"configuration": {"odd": "\ud800 \x00 \x1b[31m"}})
    (directory / "samples.jsonl").write_text(
        '{"iteration": 1, "prompt": "\\ud800\\u0000", "response": "\\udfff"}\n'
    )
    path = write_report([directory], tmp_path / "page.html")
    page = Page(path.read_text(encoding="utf-8"))
    assert page.payload()["prompts"] == ["\ud800\x00"]
    assert "\\ud800 � �[31m" in page.texts["td"]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # sums of huge values overflow
@pytest.mark.parametrize("value", [math.nan, -math.inf, 1e308, 10**20, None])
def test_extreme_values_do_no_harm(make_run: MakeRun, value: float | None) -> None:
    names = ["episode", *(chart.metric for charts in GROUPS.values() for chart in charts), "time/train"]
    metrics = [{"iteration": n} | dict.fromkeys(names, 1.0 if n == 7 else value) for n in range(1, 13)]
    sample = {"iteration": 0, "prompt": [1, 2], "response": None, "score": value, "kl": value}
    evaluation = {"iteration": 0, "eval/scores": value, "eval/scores_std": value, "prompts": 8}
    config = {"machine": 3, "versions": None, "created": 5, "configuration": {"ppo": 3, "rows": 1}}
    samples = {"samples": [sample], "eval_samples": [sample], "evaluations": [evaluation]}
    runs = [make_run(str(n), metrics=metrics[n:], config=config, **samples) for n in (0, 11)]
    for given in (runs[:1], runs):
        assert render(read_runs(given))


def test_tiles_and_warnings_say_the_numbers(make_run: MakeRun) -> None:
    scores = (0.5, 2.0, 1.25)
    lines = [
        plain_line(place, **{"objective/scores": score, "response/eos_rate": 0.25, "policy/clipfrac": 0.4})
        for place, score in enumerate(scores, start=3)
    ]
    _, page = page_of(make_run(metrics=lines, config=CONFIG))
    tiles = [" ".join(text.split("\n")) for text in page.texts["div"]]
    assert "Score1.25 first 0.5 best 2 at 4" in tiles
    assert "Stop rate25 % first 25 % 25 % to 25 %" in tiles
    (warning,) = page.texts["article"]
    assert "Clip fraction over 0.3 since iteration 3: lower the learning rate" in warning
    assert "started 2026-11-23 01:30 UTC" in page.texts["header"][0]


def test_a_quiet_run_says_so(make_run: MakeRun) -> None:
    _, page = page_of(make_run())
    assert "Nothing to warn about." in "".join(page.texts["section"])
    assert "run: not recorded, there is no config.json." in page.texts["p"]
    assert [a["id"] for a in page.named("section")] == [
        "overview",
        "warnings",
        "curves",
        "samples",
        "settings",
    ]


def test_several_runs_side_by_side(make_run: MakeRun) -> None:
    other = json.loads(json.dumps(CONFIG))
    other["configuration"]["ppo"]["seed"] = 2
    runs = [
        make_run("first", metrics=synthetic_metrics(30, 1), config=CONFIG),
        make_run("second", metrics=synthetic_metrics(20, 2, speed=0.1), config=other),
        make_run("third"),
    ]
    _, page = page_of(*runs)
    assert page.texts["h1"] == ["3 runs"]
    assert [a["data-run"] for a in page.named("button") if "data-run" in a] == ["0", "1", "2"]
    for row, start in zip(page.texts["tr"][1:4], ("first30", "second20", "third2"), strict=True):
        assert row.startswith(start)
    best = [attributes for attributes in page.named("td") if attributes.get("class") == "best"]
    assert len(best) == 3  # score, explained variance, tokens per second: one winner each
    assert "What differs" in page.texts["h3"]
    differing = [text for text in page.texts["tr"] if text.startswith("PPO · ")]
    assert differing == ["PPO · seed12–"]
    data = page.payload()
    assert data["runs"] == ["first", "second", "third"]
    assert [len(trace["x"]) for trace in data["plots"][0]["data"]] == [30, 20, 2]


def test_a_large_run_is_quick_and_small(make_run: MakeRun, tmp_path: Path) -> None:
    directory = make_run(
        metrics=synthetic_metrics(5000), samples=synthetic_samples(5000, each=4, length=12), config=CONFIG
    )
    began = time.process_time()  # of this process: the machine may be busy with others
    path = write_report([directory], tmp_path / "large.html")
    assert time.process_time() - began < 3.0
    assert path.stat().st_size < 20_000_000
    data = Page(path.read_text(encoding="utf-8")).payload()
    assert len(data["samples"]) > 2000
    assert data["sampleCount"] == 20_000


@pytest.mark.skipif(shutil.which("node") is None, reason="no node")
def test_the_script_parses() -> None:
    subprocess.run(["node", "--check", str(ASSETS / "page.js")], check=True, timeout=60)


def test_command_line(whole_run: Path, tmp_path: Path, repo_root: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mindrlhf.report", *arguments]
        return subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=60)

    done = run(str(whole_run))
    assert done.returncode == 0, done.stderr
    assert f"report: {whole_run / 'report.html'}" in done.stderr
    assert Page((whole_run / "report.html").read_text(encoding="utf-8")).texts["h1"] == ["whole"]
    done = run(str(tmp_path / "absent"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_where_the_page_goes(make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = make_run("one"), make_run("two")
    monkeypatch.chdir(tmp_path)
    assert write_report([first, second]) == Path("report.html")
    assert (tmp_path / "report.html").is_file()
    assert write_report([first], tmp_path / "new" / "x.html").is_file()
    with pytest.raises(MindRLHFError, match="is a directory"):
        write_report([first], tmp_path / "new")
    (tmp_path / "file").write_text("")
    with pytest.raises(MindRLHFError, match="cannot be written"):
        write_report([first], tmp_path / "file" / "x.html")


def test_what_the_page_replaces(make_run: MakeRun, tmp_path: Path) -> None:
    """An earlier report: at the place of its own always, at --output when told; nothing else."""
    run = make_run("one")
    page = write_report([run])
    assert write_report([run]) == write_report([run], page) == page
    other = page.rename(tmp_path / "other.html")
    with pytest.raises(MindRLHFError, match=r"other\.html: exists; .*--overwrite"):
        write_report([run], other)
    write_report([run], other, overwrite=True)
    for file, fault in ((run / "metrics.jsonl", "is RUN_DIR"), (tmp_path / "mine.html", "is not a report")):
        file.open("a").close()
        before = file.read_bytes()
        with pytest.raises(MindRLHFError, match=fault):
            write_report([run], file, overwrite=True)
        assert file.read_bytes() == before


@pytest.mark.parametrize(("kind", "title", "first"), [
    ("sft", "MindRLHF · SFT", "Loss, held-out"),
    ("reward", "MindRLHF · Reward model", "Loss, held-out"),
])  # fmt: skip
def test_the_page_of_a_stage(make_run: MakeRun, kind: str, title: str, first: str) -> None:
    lines = reward_lines(0.8) if kind == "reward" else stage_lines([3.0, 2.0, 1.0])
    text, page = page_of(make_run("mine", metrics=lines, config=stage_config(kind)))
    for part in ("4 steps", "Flags", "learning_rate", "cpu_count", "Nothing to warn about.", title):
        assert part in text
    assert page.payload()["unit"] == "step"
    assert page.texts["h3"][0] == first
    assert "samples" not in [attributes["id"] for attributes in page.named("section")]


def test_samples_that_do_not_fit_are_cut_and_thinned() -> None:
    samples = synthetic_samples(300, each=2)
    assert fit_samples(samples, 10**9) == (samples, 8000)
    kept, longest = fit_samples(samples, 60_000)
    assert longest == 1000
    assert sum(len(json.dumps(sample, ensure_ascii=False).encode()) for sample in kept) < 90_000
    assert 100 < len(kept) < 300
    assert (kept[0], kept[-1]) == (samples[0], samples[-1])
    ranked = sorted(samples, key=lambda sample: sample["score"])
    assert all(sample in kept for sample in ranked[:50] + ranked[-50:])
    assert [sample["iteration"] for sample in kept] == sorted(sample["iteration"] for sample in kept)
    (long,), longest = fit_samples([{"iteration": 1, "prompt": [1, 2], "response": "x" * 9000}], 10**9)
    assert (longest, long["prompt"]) == (8000, "[1, 2]")
    assert long["response"] == "x" * 8000 + " … [1000 more characters]"
    assert fit_samples([], 10)[0] == []


def test_summary_by_hand() -> None:
    series = Series(np.array([1, 2, 3, 4]), np.array([np.nan, 3.0, 5.0, 4.0]))
    assert summarize(series, 1) == (3.0, 4.0, 5.0, 3, 3.0, 5.0)
    assert summarize(series, -1) == (3.0, 4.0, 3.0, 2, 3.0, 5.0)
    assert summarize(series) == (3.0, 4.0, None, None, 3.0, 5.0)
    assert summarize(Series(np.array([1]), np.array([np.nan]))) is None


def test_settings_are_flat(make_run: MakeRun) -> None:
    assert flatten({"a": {"b": 1, "c": [1, 2]}, "d": None}) == {"a.b": "1", "a.c": "[1, 2]", "d": "none"}
    (run,) = read_runs([make_run(config=CONFIG | {"extra": 1}, state={"iteration": 2})])
    sections = sections_of(run)
    assert list(sections) == [
        "PPO",
        "Versions",
        "Machine",
        "train",
        "Other",
        "Newest checkpoint: iteration_000002",
    ]
    assert sections["Machine"]["memory"] == "23.5 GiB"
    assert sections["Versions"]["git.revision"] == CONFIG["git"]["revision"]
    assert sections["train"]["optimizer.learning_rate"] == "1e-06"


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
