"""What a finished iteration leaves: a line of metrics, samples, histograms, now and then the curves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from mindrlhf.configs.schema import JobConfig, PPOConfig
from mindrlhf.data.tokenizer import Tokenizer
from mindrlhf.trainer.experience import Experience, Rollout, Scores
from mindrlhf.trainer.metrics import ratio_histogram
from mindrlhf.trainer.records import RunRecords, choose_rows, sample_texts, summary_line
from mindrlhf.trainer.trackers.base import Histogram, RunStart
from mindrlhf.trainer.update import UpdateResult
from mindrlhf.utils.logging import get_logger
from mindrlhf.utils.provenance import provenance, write_provenance

logger = get_logger(__name__)


class IterationResults(NamedTuple):
    """All that an iteration has made, global and equal on every rank."""

    rollout: Rollout
    scores: Scores
    experience: Experience
    update: UpdateResult


def start_records(records: RunRecords, configuration: JobConfig | Mapping[str, Any], done: int) -> None:
    """Writes ``config.json`` and opens the trackers of a run that begins, or goes on.

    Args:
        records: of the run, rewound already when it goes on.
        configuration: resolved.
        done: iterations or steps there are.
    """
    record = provenance(configuration)
    write_provenance(records.directory, record)
    is_resumed = bool(records.metrics or records.evaluations)
    first_step = done + 1 if is_resumed else 0
    records.trackers.start(RunStart(records.directory, record, first_step, is_resumed))


def record_iteration(
    records: RunRecords,
    metrics: Mapping[str, float],
    results: IterationResults,
    config: PPOConfig,
    tokenizer: Tokenizer | None,
) -> None:
    """Appends to the run's files, tells its trackers, and logs one line unless one of them shows it."""
    iteration = int(metrics["iteration"])
    records.add_metrics(metrics)
    rows = choose_rows(len(results.rollout.tokens), config.log_samples)
    records.add_samples([_sample(iteration, row, results, tokenizer) for row in rows])
    records.trackers.histograms(iteration, histograms(results))
    if not records.trackers.show_metrics:
        logger.info("%s", summary_line(metrics, config.total_iterations))
    records.redraw()


def histograms(results: IterationResults) -> dict[str, Histogram]:
    """Scores, KL (nats a response) and lengths over the responses; ratios over the tokens of the update."""
    found = {
        "distribution/scores": Histogram.of(results.scores.scores),
        "distribution/kl": Histogram.of(results.experience.kl.sum(axis=1)),
        "distribution/length": Histogram.of(results.rollout.response_lengths),
    }
    return found | {"distribution/ratio": ratio_histogram(results.update)}


def _sample(
    iteration: int, row: int, results: IterationResults, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """One prompt and its response."""
    return {
        "iteration": iteration,
        **sample_texts(results.rollout, row, tokenizer),
        "score": results.scores.scores[row],
        "kl": results.experience.kl[row].sum(),
    }
