"""The page in a real browser: Chromium through Playwright; skipped where either is missing.

``pip install playwright``, and Debian's ``chromium`` or ``playwright install chromium``.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mindrlhf.report.__main__ import write_report
from tests.unit.report.conftest import (
    CONFIG,
    plain_line,
    synthetic_evaluations,
    synthetic_metrics,
    synthetic_samples,
)

sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright")

MakeRun = Callable[..., Path]
ATTACK = "</script><script>window.hit = 1</script><img src=x onerror='window.hit = 2'>"
DESK, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        options = {"executable_path": shutil.which("chromium"), "args": ["--no-sandbox"]}  # root has none
        try:
            started = playwright.chromium.launch(**options)
        except sync_api.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield started
        started.close()


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens the page about runs; afterwards nothing may have been fetched and no error logged."""
    contexts, faults = [], []

    def open_page(*runs: Path, viewport: dict[str, int] = DESK, scheme: str = "light") -> Any:
        context = browser.new_context(viewport=viewport, color_scheme=scheme, has_touch=viewport is PHONE)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        address = write_report(runs, tmp_path / "page.html").as_uri()
        page.on("request", lambda request: request.url == address or faults.append(request.url))
        page.goto(address)
        page.wait_for_selector("body[data-ready]")
        page.wait_for_selector("#charts svg path", state="attached")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


@pytest.fixture
def two_runs(make_run: MakeRun, whole_run: Path) -> tuple[Path, Path]:
    evaluations, eval_samples = synthetic_evaluations(40, 20)
    other = make_run(
        "other", metrics=synthetic_metrics(40, 7), samples=synthetic_samples(40, seed=7),
        evaluations=evaluations, eval_samples=eval_samples,
    )  # fmt: skip
    return whole_run, other


def hover(page: Any, metric: str, part: float) -> list[str]:
    """Lines of the tooltip at a part of the width between the axes of a chart."""
    chart = page.locator(f"[data-metric='{metric}'] svg")
    chart.evaluate("element => element.scrollIntoView({block: 'center', behavior: 'instant'})")
    box = chart.bounding_box()
    page.mouse.move(box["x"] + 52 + part * (box["width"] - 62), box["y"] + 60)
    return page.locator("#tooltip").inner_text().splitlines()


def test_every_metric_is_drawn_and_tells_its_values(show: Callable[..., Any], make_run: MakeRun) -> None:
    lines = [plain_line(place, **{"objective/scores": place / 8, "lr": 1e-6}) for place in range(1, 10)]
    lines[4]["objective/kl"] = float("nan")
    page = show(make_run(metrics=lines))
    assert page.locator("figure").count() == 3
    assert page.locator("[data-metric='objective/scores'] circle.point").count() == 9
    assert hover(page, "objective/scores", 0.5) == ["iteration 5", "Score", "0.625"]
    assert hover(page, "objective/scores", 1.0) == ["iteration 9", "Score", "1.125"]
    assert hover(page, "objective/kl", 0.5) == ["iteration 5", "KL to the reference", "NaN or infinite"]
    assert page.locator("[data-metric='objective/kl'] path.broken").count() == 1
    # The curve has a gap there: it begins twice.
    assert page.locator("[data-metric='objective/kl'] path.curve").get_attribute("d").count("M") == 2
    # One line across all charts.
    assert page.locator("line.cross").count() == 3
    page.mouse.move(2, 2)
    assert page.locator("#tooltip").is_hidden()


def test_arrow_keys_read_a_chart(show: Callable[..., Any], make_run: MakeRun) -> None:
    page = show(make_run(metrics=[plain_line(place) for place in (3, 5, 9)]))
    page.locator("[data-metric='objective/kl'] svg").focus()
    for expected, key in ((3, "ArrowRight"), (5, "ArrowRight"), (9, "ArrowRight"), (5, "ArrowLeft")):
        page.keyboard.press(key)
        assert page.locator("#tooltip").inner_text().startswith(f"iteration {expected}\n")
    page.keyboard.press("Escape")
    assert page.locator("#tooltip").is_hidden()


def test_samples_are_searched_sorted_and_paged(show: Callable[..., Any], whole_run: Path) -> None:
    page = show(whole_run)
    samples = page.locator("#samples")
    rows = samples.locator("tbody tr")
    assert rows.count() == 25
    assert rows.first.locator("td").first.inner_text() == "60"
    samples.get_by_role("button", name="Score").click()
    scores = [float(text.replace("−", "-")) for text in samples.locator(".pill").all_inner_texts()]
    assert scores == sorted(scores, reverse=True)
    samples.get_by_role("button", name="Score").click()
    assert samples.locator("th[aria-sort]").get_attribute("aria-sort") == "ascending"
    samples.get_by_role("button", name="Next").click()
    assert "page 2 of 5" in samples.locator(".pager").inner_text()
    samples.get_by_role("searchbox").fill("GOES TWICE")
    samples.get_by_text("No sample matches.").wait_for()
    samples.get_by_role("searchbox").fill("twice A week")
    samples.locator("mark").first.wait_for()
    assert set(samples.locator("mark").all_inner_texts()) == {"twice a week"}
    samples.get_by_role("searchbox").fill("")
    samples.get_by_label("From iteration").fill("7")
    samples.get_by_label("To iteration").fill("8")
    samples.get_by_text("4 of 120 samples").wait_for()
    assert rows.count() == 4
    assert "You are a helpful assistant." in samples.locator(".system-note").inner_text()
    assert samples.locator(".turn.system").count() == 0


def test_before_and_after(show: Callable[..., Any], whole_run: Path) -> None:
    page = show(whole_run)
    pairs = page.locator("#pairs")
    assert pairs.get_by_label("Left").locator("option").all_inner_texts() == [
        "before training", "after iteration 20", "after iteration 40", "after iteration 60",
    ]  # fmt: skip
    # Six prompts whose mean score goes from -0.6 to 1.0, each by 1.6.
    verdict = " ".join(pairs.locator(".verdict").inner_text().split())
    assert verdict == "Mean score −0.6 → 1 better 6 worse 0 equal 0"
    assert pairs.locator(".pair").count() == 5
    pairs.get_by_role("button", name="Show more").click()
    assert pairs.locator(".pair").count() == 6
    pairs.get_by_label("Right").select_option("before training")
    assert "equal 6" in pairs.locator(".verdict").inner_text()


def test_runs_are_overlaid_and_can_be_hidden(show: Callable[..., Any], two_runs: tuple[Path, Path]) -> None:
    page = show(*two_runs)
    curves = page.locator("[data-metric='objective/kl'] path.curve")
    assert curves.count() == 2
    assert [line for line in hover(page, "objective/kl", 0.5) if line in ("whole", "other")] == [
        "whole",
        "other",
    ]
    page.get_by_role("button", name="other").click()
    page.wait_for_function(
        "document.querySelectorAll(\"[data-metric='objective/kl'] path.curve\").length === 1"
    )
    assert "other" not in hover(page, "objective/kl", 0.5)
    assert page.locator("[data-stack]").count() == 2


def test_smoothing_keeps_the_raw_curve(show: Callable[..., Any], whole_run: Path) -> None:
    page = show(whole_run)
    before = page.locator("[data-metric='loss/policy'] path.curve").get_attribute("d")
    page.get_by_label("Smoothing").fill("0.9")
    page.wait_for_selector("[data-metric='loss/policy'] path.curve.raw")
    assert page.locator("[data-metric='loss/policy'] path.curve.raw").get_attribute("d") == before
    assert page.locator("[data-metric='loss/policy'] path.curve:not(.raw)").get_attribute("d") != before


@pytest.mark.parametrize("viewport", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("count", [1, 2])
def test_the_page_fits_the_screen(
    show: Callable[..., Any], two_runs: tuple[Path, Path], viewport: dict[str, int], count: int
) -> None:
    page = show(*two_runs[:count], viewport=viewport)
    assert page.evaluate("document.documentElement.scrollWidth") == viewport["width"]
    widths = page.evaluate(
        "[...document.querySelectorAll('figure, .pair, .finding')].map(e => e.offsetWidth)"
    )
    assert 200 < min(widths) <= max(widths) <= viewport["width"]


def test_light_and_dark(show: Callable[..., Any], whole_run: Path) -> None:
    page = show(whole_run, scheme="dark")
    color = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(color)
    page.get_by_role("button", name="Light or dark scheme").click()
    light = page.evaluate(color)
    assert (light, dark) == ("rgb(245, 246, 248)", "rgb(14, 17, 22)")
    page.reload()
    assert page.evaluate(color) == light


def test_samples_cannot_run_code(show: Callable[..., Any], make_run: MakeRun) -> None:
    sample = {"iteration": 1, "prompt": ATTACK, "response": ATTACK, "score": float("nan"), "kl": None}
    page = show(
        make_run(
            "<b>x",
            metrics=[plain_line(1, **{ATTACK: 1.0})],
            samples=[sample],
            eval_samples=[sample],
            config={"configuration": {ATTACK: ATTACK}} | {"created": CONFIG["created"]},
        )
    )
    assert page.locator("#samples .block").all_inner_texts() == [ATTACK, ATTACK]
    assert page.locator("#samples .pill").inner_text() == "NaN"
    assert page.locator("img").count() == 0
    assert page.evaluate("window.hit") is None


def test_a_large_run_is_drawn_quickly(show: Callable[..., Any], make_run: MakeRun) -> None:
    run = make_run(metrics=synthetic_metrics(5000), samples=synthetic_samples(5000, each=4, length=12))
    page = show(run)
    # Processor time of the page: the machine may be busy with others.
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.reload()
    page.wait_for_selector("#charts svg path", state="attached")
    metrics = {entry["name"]: entry["value"] for entry in session.send("Performance.getMetrics")["metrics"]}
    assert metrics["TaskDuration"] < 3.0
    assert page.locator("#samples tbody tr").count() == 25
    assert "of 20,000 samples" in page.locator("#samples").inner_text()
    assert hover(page, "objective/kl", 0.5)[0].startswith("iterations ")
