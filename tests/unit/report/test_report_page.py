"""The page: well-formed, self-contained, escaped, the right numbers, small for large runs."""

from __future__ import annotations

import base64
import hashlib
import json
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
from mindrlhf.report.catalogue import GROUPS, groups_of
from mindrlhf.report.markup import duration, join, json_for_script, number, tag
from mindrlhf.report.page import ASSETS, SCRIPTS, STYLES, render
from mindrlhf.report.payload import make_payload
from mindrlhf.report.reading import ReportError, Series, read_runs
from mindrlhf.report.settings import flatten, sections_of
from mindrlhf.report.summary import summarize
from mindrlhf.report.thinning import fit_samples, stretches_of
from tests.unit.report.conftest import CONFIG, plain_line, synthetic_metrics, synthetic_samples

MakeRun = Callable[..., Path]
VOID = {"meta", "br", "input", "link"}
ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&<!--\u2028"


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
    text, page = page_of(whole_run)
    assert not [name for name, _ in page.elements if name in {"link", "iframe", "img", "object", "base"}]
    assert not [attributes for _, attributes in page.elements if "src" in attributes or "style" in attributes]
    assert not [key for _, attributes in page.elements for key in attributes if key.startswith("on")]
    code = "".join(page.texts["style"]) + page.texts["script"][1]
    addresses = set(re.findall(r"https?://[^\s'\"]+", code))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, never fetched
    assert not re.search(
        r"\b(fetch|XMLHttpRequest|import\s*\(|eval|innerHTML|document\.write)\b|@import|url\((?!#)", code
    )
    (policy,) = [a["content"] or "" for a in page.named("meta") if a.get("http-equiv")]
    assert policy.startswith("default-src 'none';")
    for content in (page.texts["style"][0], page.texts["script"][1]):
        assert base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() in policy
    assert "unsafe" not in policy
    assert text.count("<script") == 2


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
    assert [attributes.get("type") for attributes in page.named("script")] == ["application/json", None]
    assert page.named("img") == []
    assert "alert(1)</script>" not in text
    assert "<!--" not in text
    data = page.payload()
    assert data["prompts"] == [f"p{ATTACK}"]
    assert data["samples"]["rows"] == [[0, 1, 0, f"r{ATTACK}", 1.0, 0.0]]
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
    assert "? � �[31m" in page.texts["td"]


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


def test_tiles_and_warnings_say_the_numbers(make_run: MakeRun) -> None:
    scores = (0.5, 2.0, 1.25)
    lines = [
        plain_line(place, **{"objective/scores": score, "response/eos_rate": 0.25, "policy/clipfrac": 0.4})
        for place, score in enumerate(scores, start=3)
    ]
    _, page = page_of(make_run(metrics=lines, config=CONFIG))
    tiles = [text for text in page.texts["div"] if text.startswith("Score")]
    assert "Score1.25first 0.5best 2 at 4" in tiles
    assert "Stop rate25 %first 25 %25 % to 25 %" in page.texts["div"]
    (warning,) = page.texts["article"]
    assert "Clip fraction over 0.3 since iteration 3: lower the learning rate" in warning
    assert "started 2026-11-23 01:30 UTC" in page.texts["header"][0]


def test_a_quiet_run_says_so(make_run: MakeRun) -> None:
    _, page = page_of(make_run())
    assert "Nothing to warn about." in "".join(page.texts["section"])
    assert "Not recorded: this run has no config.json." in page.texts["p"]
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
    assert [run["name"] for run in data["runs"]] == ["first", "second", "third"]
    assert [run["iterations"] for run in data["runs"]] == [30, 20, 2]


def test_payload_holds_the_curves(make_run: MakeRun) -> None:
    lines = [
        {"iteration": 1, "objective/kl": 0.1234567891, "off": 0.0, "late": None, "time/rollout": 3.0,
         "time/train": 4.0, "time/iteration": 8.0},
        {"iteration": 2, "objective/kl": float("nan"), "off": 0.0, "late": 5, "time/rollout": 2.0,
         "time/train": 4.0, "time/iteration": 5.0},
    ]  # fmt: skip
    evaluations = [{"iteration": 0, "eval/kl": float("nan")}, {"iteration": 2, "eval/kl": 1.5, "prompts": 8}]
    (run,) = runs = read_runs([make_run(metrics=lines, evaluations=evaluations)])
    data = make_payload(runs, [[]])
    (found,) = data["runs"]
    assert (found["first"], found["last"]) == ([1, 2], [1, 2])
    assert found["curves"]["objective/kl"] == {"mean": [0.123457, None], "broken": [2]}
    assert found["curves"]["late"] == {"mean": [None, 5.0]}
    assert "off" not in found["curves"]
    assert found["phases"] == ["time/rollout", "time/train", "time/other"]
    assert found["curves"]["time/other"] == {"mean": [1.0, 0.0]}  # 8 - 7, and never below 0
    assert found["evaluations"] == {"eval/kl": {"x": [2], "y": [1.5]}}
    assert [group["title"] for group in data["groups"]] == ["Goal", "Speed", "Other"]
    assert len(run.metrics) == 2


def test_long_curves_become_stretches() -> None:
    stretches = stretches_of(np.array([1, 2, 4, 5, 9, 10, 11]), most=3)
    assert (stretches.first.tolist(), stretches.last.tolist()) == ([1, 5, 11], [4, 10, 11])
    values = Series(np.array([1, 2, 4, 5, 10, 11]), np.array([1.0, 2, 6, np.inf, 7, 8]))
    assert stretches.curve(values) == {
        "mean": [3.0, 7.0, 8.0],
        "low": [1.0, 7.0, 8.0],
        "high": [6.0, 7.0, 8.0],
        "broken": [5],
    }
    whole = stretches_of(np.arange(600))
    assert whole.first.tolist() == whole.last.tolist() == list(range(600))
    assert len(stretches_of(np.arange(601)).first) == 301


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


def test_a_large_run_is_quick_and_small(make_run: MakeRun, tmp_path: Path) -> None:
    directory = make_run(
        metrics=synthetic_metrics(5000), samples=synthetic_samples(5000, each=4, length=12), config=CONFIG
    )
    began = time.process_time()  # of this process: the machine may be busy with others
    path = write_report([directory], tmp_path / "large.html")
    assert time.process_time() - began < 3.0
    assert path.stat().st_size < 15_000_000
    data = Page(path.read_text(encoding="utf-8")).payload()
    assert len(data["samples"]["rows"]) > 2000
    assert data["runs"][0]["sampleCount"] == 20_000


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


def test_metrics_have_one_place_each() -> None:
    metrics = [chart.metric for _, charts in GROUPS for chart in charts]
    assert len(metrics) == len(set(metrics))
    groups = dict(groups_of(["iteration", "lr", "time/rollout", "new/metric"]))
    assert {title: [chart.metric for chart in charts] for title, charts in groups.items()} == {
        "Optimizer": ["lr"],
        "Other": ["new/metric"],
    }


def test_catalogue_knows_the_metrics_of_the_trainer(repo_root: Path) -> None:
    source = (repo_root / "mindrlhf/trainer/metrics.py").read_text(encoding="utf-8")
    written = set(re.findall(r'^\s+"([\w/]+)":', source, re.M))
    assert len(written) > 20
    assert "Other" not in dict(groups_of(written))


@pytest.mark.skipif(shutil.which("node") is None, reason="no node")
@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_parse(name: str) -> None:
    subprocess.run(["node", "--check", str(ASSETS / name)], check=True, timeout=60)


def test_every_asset_is_used() -> None:
    assert {path.name for path in ASSETS.iterdir()} == {*STYLES, *SCRIPTS}


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
    with pytest.raises(ReportError, match="is a directory"):
        write_report([first], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="cannot be written"):
        write_report([first], tmp_path / "file" / "x.html")
