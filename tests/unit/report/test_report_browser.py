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
        context = browser.new_context(
            viewport=viewport, color_scheme=scheme, has_touch=viewport is PHONE, is_mobile=viewport is PHONE
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        address = write_report(runs, tmp_path / "page.html").as_uri()
        page.on("request", lambda request: request.url == address or faults.append(request.url))
        page.goto(address)
        page.wait_for_selector("body[data-ready]")
        page.locator(".plot").first.scroll_into_view_if_needed()
        page.locator(".plot .nsewdrag").first.wait_for(state="attached")
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


def plot_of(page: Any, metric: str) -> Any:
    """The plot of a metric, in view and drawn."""
    plot = page.locator(f"[data-metric='{metric}'] .plot")
    plot.evaluate("element => element.scrollIntoView({block: 'center'})")
    plot.locator(".nsewdrag").wait_for(state="attached")
    return plot


def hover(page: Any, metric: str, iteration: float) -> list[str]:
    """Texts that a plot shows under the pointer at an iteration."""
    plot = plot_of(page, metric)
    axis = "element => [element._fullLayout.xaxis.range, element._fullLayout.xaxis._length]"
    (low, high), width = plot.evaluate(axis)
    box = plot.locator(".nsewdrag").bounding_box()
    label = plot.locator(".hoverlayer .legend")
    for jitter in range(50):  # plotly passes over moves that follow each other too closely
        page.mouse.move(box["x"] + (iteration - low) / (high - low) * width, box["y"] + 60 + jitter % 2)
        page.wait_for_timeout(100)
        if label.count():
            break
    return plot.locator(".hoverlayer text").all_text_contents()


def names_of(page: Any, metric: str) -> list[str]:
    """Names of the traces that a plot shows now."""
    return plot_of(page, metric).evaluate("element => element.data.map(trace => trace.name)")


def test_every_metric_is_drawn_and_tells_its_values(show: Callable[..., Any], make_run: MakeRun) -> None:
    lines = [plain_line(place, **{"objective/scores": place / 8, "lr": 1e-6}) for place in range(1, 10)]
    lines[4]["objective/kl"] = float("nan")
    page = show(make_run(metrics=lines))
    assert page.locator("figure").count() == 3
    assert plot_of(page, "objective/scores").locator("path.point").count() == 9
    assert hover(page, "objective/scores", 5) == ["iteration 5", "Score : 0.625"]
    assert hover(page, "objective/scores", 9) == ["iteration 9", "Score : 1.125"]
    assert hover(page, "objective/kl", 5) == ["iteration 5", "KL to the reference : NaN or infinite"]
    # The curve has a gap there: it begins twice.
    lines = plot_of(page, "objective/kl").locator("path.js-line")
    assert sum(path.get_attribute("d").count("M") for path in lines.all()) == 2
    # All plots in view tell their values at this iteration.
    sync_api.expect(page.locator(".hoverlayer .legend")).to_have_count(3)
    page.mouse.move(2, 2)
    sync_api.expect(page.locator(".hoverlayer .legend")).to_have_count(0)


def test_arrow_keys_read_a_chart(show: Callable[..., Any], make_run: MakeRun) -> None:
    page = show(make_run(metrics=[plain_line(place) for place in (3, 5, 9)]))
    plot = plot_of(page, "objective/kl")
    plot.focus()
    for expected, key in ((3, "ArrowRight"), (5, "ArrowRight"), (9, "ArrowRight"), (5, "ArrowLeft")):
        page.keyboard.press(key)
        sync_api.expect(plot.locator(".hoverlayer text").first).to_have_text(f"iteration {expected}")
    page.keyboard.press("Escape")
    sync_api.expect(page.locator(".hoverlayer .legend")).to_have_count(0)


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
    assert samples.locator("th:not([aria-sort=none])[aria-sort]").get_attribute("aria-sort") == "ascending"
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
    verdict = pairs.locator(".verdict").inner_text()
    assert verdict == "Mean score −0.6 → 1; 6 better, 0 worse, 0 equal."
    assert pairs.locator(".pair").count() == 5
    pairs.get_by_role("button", name="Show more").click()
    assert pairs.locator(".pair").count() == 6
    pairs.get_by_label("Right").select_option("before training")
    assert "6 equal" in pairs.locator(".verdict").inner_text()


def test_runs_are_overlaid_and_can_be_hidden(show: Callable[..., Any], two_runs: tuple[Path, Path]) -> None:
    page = show(*two_runs)
    assert names_of(page, "objective/kl") == ["whole", "◇ whole", "other", "◇ other"]
    found = hover(page, "objective/kl", 30)
    assert [text.partition(" : ")[0] for text in found] == ["iteration 30", "whole", "other"]
    page.get_by_role("button", name="other").click()
    sync_api.expect(plot_of(page, "objective/kl").locator(".scatterlayer .trace")).to_have_count(2)
    assert names_of(page, "objective/kl") == ["whole", "◇ whole"]
    assert names_of(page, "loss/value") == ["whole"]  # was not yet in view
    assert page.locator("[data-metric='time/*']").count() == 2


def test_smoothing_keeps_the_raw_curve(show: Callable[..., Any], whole_run: Path) -> None:
    page = show(whole_run)
    plot = plot_of(page, "loss/policy")
    (before,) = plot.evaluate("element => element.data.map(trace => trace.y)")
    page.get_by_label("Smoothing").fill("0.9")
    sync_api.expect(plot_of(page, "loss/policy").locator(".scatterlayer .trace")).to_have_count(2)
    raw, smooth = plot.evaluate("element => element.data.map(trace => trace.y)")
    assert raw == before
    assert smooth[0] == before[0]
    assert smooth[1] == pytest.approx((0.09 * before[0] + 0.1 * before[1]) / 0.19)


@pytest.mark.parametrize("count", [1, 2])
def test_the_page_fits_the_screen(show: Callable[..., Any], two_runs: tuple[Path, Path], count: int) -> None:
    page = show(*two_runs[:count])
    for viewport in (DESK, PHONE):
        page.set_viewport_size(viewport)
        assert page.evaluate("document.documentElement.scrollWidth") == viewport["width"]
        boxes = "[...document.querySelectorAll('figure, .pair, .finding')].map(e => e.offsetWidth)"
        widths = page.evaluate(boxes)
        assert 200 < min(widths) <= max(widths) <= viewport["width"]
        plot = plot_of(page, "objective/kl")
        drawn = plot.locator(".main-svg").first
        page.wait_for_timeout(300)  # plotly waits before it draws for a new width
        assert plot.bounding_box()["width"] == pytest.approx(drawn.bounding_box()["width"], abs=1)


def test_a_phone_scrolls_over_plots(show: Callable[..., Any], whole_run: Path) -> None:
    page = show(whole_run, viewport=PHONE)
    fixed = "element => [element._fullLayout.xaxis.fixedrange, element._fullLayout.yaxis.fixedrange]"
    assert plot_of(page, "objective/kl").evaluate(fixed) == [True, True]


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
    page.locator(".plot").first.scroll_into_view_if_needed()
    page.locator(".plot .nsewdrag").first.wait_for(state="attached")
    metrics = {entry["name"]: entry["value"] for entry in session.send("Performance.getMetrics")["metrics"]}
    assert metrics["TaskDuration"] < 3.0
    assert page.locator("#samples tbody tr").count() == 25
    assert "of 20,000 samples" in page.locator("#samples").inner_text()
    assert hover(page, "objective/kl", 2500)[1].startswith("KL to the reference : ")
