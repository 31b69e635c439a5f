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
from pathlib import Path

import pytest

from mindrlhf.report.__main__ import write_report
from mindrlhf.report.page import ASSETS, SCRIPTS, STYLES
from mindrlhf.report.reading import ReportError
from tests.unit.report.conftest import CONFIG, plain_line, synthetic_metrics, synthetic_samples
from tests.unit.report.html_pages import Page, page_of

MakeRun = Callable[..., Path]
ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&<!--\u2028"


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
