"""The first evaluation against the last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mindrlhf.trainer.before_after import (
    sample_rows,
    summarize,
    summary_sentence,
    user_text,
    write_before_after,
)


def evaluation(
    iteration: int, score: float, std: float, kl: float, length: float, stops: float
) -> dict[str, Any]:
    values = {"scores": score, "scores_std": std, "kl": kl, "length": length, "eos_rate": stops}
    return {
        "iteration": iteration,
        "prompts": 20,
        **{f"eval/{name}": value for name, value in values.items()},
    }


EVALUATIONS = [
    evaluation(0, 0.25, 0.5, 0.001, 12.0, 0.5),
    evaluation(4, 9.0, 9.0, 9.0, 9.0, 0.9),
    evaluation(8, 1.0, 0.4, 3.25, 15.5, 0.75),
]
SYSTEM = "<|im_start|>system\nBe kind.<|im_end|>\n"
PROMPT = f"{SYSTEM}<|im_start|>user\nHow\nare you?<|im_end|>\n<|im_start|>assistant\n"


def sample(iteration: int, number: int, response: Any, score: float) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "sample_id": number,
        "prompt": PROMPT,
        "response": response,
        "score": score,
    }


SAMPLES = [
    *(sample(0, 3, "a|b ", 0.5), sample(0, 7, "long " * 100, -1.0)),
    *(sample(4, 3, "between", 0.0), sample(4, 7, "between", 0.0)),
    *(sample(8, 7, "two\nlines", 2.0), sample(8, 3, "fine", 1.0)),
]


def test_the_gain_is_measured_in_initial_standard_deviations() -> None:
    summary = summarize(EVALUATIONS)
    assert summary["score_gain_in_std"] == pytest.approx((1.0 - 0.25) / 0.5)
    assert (summary["iteration_before"], summary["iteration_after"]) == (0, 8)
    assert (summary["kl_before"], summary["kl_after"]) == (0.001, 3.25)
    assert summary["prompts"] == 20
    assert summary_sentence(summary) == (
        "held-out score +0.2500 -> +1.0000 (+1.50 initial std), KL 3.250, stop rate 0.50 -> 0.75, "
        "length 12.0 -> 15.5"
    )


def test_equal_scores_have_no_standard_deviation_to_measure_in() -> None:
    summary = summarize([evaluation(0, 1, 0, 0, 1, 1), evaluation(1, 2, 0, 0, 1, 1)])
    assert summary["score_gain_in_std"] is None
    assert "+1.0000 -> +2.0000 (all equal before)" in summary_sentence(summary)


def test_rows_pair_the_same_sample() -> None:
    rows = sample_rows(SAMPLES, summarize(EVALUATIONS))
    assert rows == [
        ("How\nare you?", "[+0.500] a|b", "[+1.000] fine"),
        ("How\nare you?", f"[-1.000] {('long ' * 100).strip()}", "[+2.000] two\nlines"),
    ]


def test_prompts_without_chat_markup_stay_whole() -> None:
    assert user_text("Once upon a time") == "Once upon a time"
    assert user_text([3, 4]) == "[3, 4]"


def test_files_hold_everything_and_the_log_table_is_short(tmp_path: Path) -> None:
    table = write_before_after(tmp_path, EVALUATIONS, SAMPLES)
    assert json.loads((tmp_path / "evaluation_summary.json").read_text()) == summarize(EVALUATIONS)
    text = (tmp_path / "before_after.md").read_text(encoding="utf-8")
    assert "| mean score | 0.2500 | 1.0000 |" in text
    assert "| How<br>are you? | \\[+0.500\\] a\\|b | \\[+1.000\\] fine |" in text
    assert text.count("long") == 100
    assert 40 < table.count("long") < 50
    assert "after (iteration 8)" in table
    assert "between" not in text + table


def test_without_samples_there_are_only_numbers(tmp_path: Path) -> None:
    assert write_before_after(tmp_path, EVALUATIONS[:1], []) == ""
    text = (tmp_path / "before_after.md").read_text(encoding="utf-8")
    assert "Samples" not in text
    assert "+0.2500 -> +0.2500 (+0.00 initial std)" in text
