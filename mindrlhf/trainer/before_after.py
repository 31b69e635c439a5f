"""What a run did to held-out prompts: the first evaluation against the last, in numbers and in texts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mindrlhf.data.tokenizer import IM_END, IM_START
from mindrlhf.utils.files import atomic_file
from mindrlhf.utils.result_files import SUMMARY_FILE, TABLE_FILE
from mindrlhf.utils.tables import markdown_table, text_table

_SHOWN_CHARACTERS = 240  # of a text in the log; the file has the whole text
_TABLE_WIDTH = 110

Line = Mapping[str, Any]


def summarize(evaluations: Sequence[Line]) -> dict[str, Any]:
    """The first evaluation against the last.

    Args:
        evaluations: lines of ``evaluations.jsonl``, at least one.

    Returns:
        ``prompts``; ``iteration``, ``score``, ``score_std``, ``kl``, ``eos_rate`` and ``length``, each with
        ``_before`` and ``_after``; ``score_gain_in_std``, the gain of the mean score over the standard
        deviation of the scores before (``None`` when that is 0).
    """
    first, last = evaluations[0], evaluations[-1]
    names = {"score": "eval/scores", "score_std": "eval/scores_std", "kl": "eval/kl"}
    names |= {"eos_rate": "eval/eos_rate", "length": "eval/length", "iteration": "iteration"}
    summary = {"prompts": last["prompts"]}
    for short, name in names.items():
        summary |= {f"{short}_before": first[name], f"{short}_after": last[name]}
    gain, std = last["eval/scores"] - first["eval/scores"], first["eval/scores_std"]
    return summary | {"score_gain_in_std": gain / std if std > 0 else None}


def summary_sentence(summary: Line) -> str:
    """The summary in one line."""
    gain = summary["score_gain_in_std"]
    in_std = "all equal before" if gain is None else f"{gain:+.2f} initial std"
    return (
        f"held-out score {summary['score_before']:+.4f} -> {summary['score_after']:+.4f} ({in_std}), "
        f"KL {summary['kl_after']:.3f}, "
        f"stop rate {summary['eos_rate_before']:.2f} -> {summary['eos_rate_after']:.2f}, "
        f"length {summary['length_before']:.1f} -> {summary['length_after']:.1f}"
    )


def sample_rows(samples: Sequence[Line], summary: Line) -> list[tuple[str, str, str]]:
    """Prompt, response before and response after, each response with its score, for the samples of both."""
    before, after = (
        {line["sample_id"]: line for line in samples if line["iteration"] == summary[f"iteration_{when}"]}
        for when in ("before", "after")
    )
    return [
        (user_text(line["prompt"]), _response(line), _response(after[number]))
        for number, line in before.items()
        if number in after
    ]


def user_text(prompt: Any) -> str:
    """The user's last message in a ChatML prompt; any other prompt unchanged."""
    text = str(prompt)
    _, found, turn = text.rpartition(f"{IM_START}user\n")
    return turn.partition(IM_END)[0] if found else text


def write_before_after(directory: Path, evaluations: Sequence[Line], samples: Sequence[Line]) -> str:
    """Writes ``evaluation_summary.json`` and ``before_after.md``; returns the table of texts for the log.

    Args:
        directory: where to write them.
        evaluations: lines of ``evaluations.jsonl``, at least one.
        samples: lines of ``eval_samples.jsonl``.
    """
    summary = summarize(evaluations)
    rows = sample_rows(samples, summary)
    with atomic_file(directory / SUMMARY_FILE) as file:
        file.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    columns = (
        "prompt",
        f"before (iteration {summary['iteration_before']})",
        f"after (iteration {summary['iteration_after']})",
    )
    texts = f"\n## Samples\n\n{markdown_table(columns, rows)}" if rows else ""
    with atomic_file(directory / TABLE_FILE) as file:
        file.write_text(f"# Before and after\n\n{_numbers(summary, columns[1:])}{texts}", encoding="utf-8")
    if not rows:
        return ""
    terminal = shutil.get_terminal_size((_TABLE_WIDTH, 24)).columns  # a log file has no width of its own
    width = min(max(terminal, 60), _TABLE_WIDTH)
    return text_table(columns, [[_shortened(cell) for cell in row] for row in rows], width=width)


def _numbers(summary: Line, columns: Sequence[str]) -> str:
    what = {
        "score": "mean score",
        "score_std": "standard deviation of the scores",
        "kl": "KL to the reference (nats per sequence)",
        "length": "response length (tokens)",
        "eos_rate": "stop rate",
    }
    rows = [
        (title, *(f"{summary[f'{name}_{when}']:.4f}" for when in ("before", "after")))
        for name, title in what.items()
    ]
    table = markdown_table((f"{summary['prompts']} held-out prompts", *columns), rows)
    return f"{table}\n{summary_sentence(summary)}\n"


def _response(sample: Line) -> str:
    return f"[{sample['score']:+.3f}] {str(sample['response']).strip()}"


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]} ..."
