"""Which metrics are drawn, under which title, and in which group."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from mindrlhf.report.stages import PPO, REWARD, SFT


class Chart(NamedTuple):
    """One curve of the page.

    Attributes:
        metric: name in ``metrics.jsonl``.
        title: for people.
        unit: what the axis counts.
        help: what to look for.
        evaluation: name in ``evaluations.jsonl`` of the same thing on held-out prompts.
        low, high: values that the axis always shows.
        wide: drawn over two columns.
    """

    metric: str
    title: str
    unit: str = ""
    help: str = ""
    evaluation: str = ""
    low: float | None = None
    high: float | None = None
    wide: bool = False


GROUPS: tuple[tuple[str, tuple[Chart, ...]], ...] = (
    (
        "Goal",
        (
            Chart(
                "objective/scores", "Score", "", "Mean score of the replies; should rise.", "eval/scores",
                wide=True,
            ),
            Chart(
                "objective/kl", "KL to the reference", "nats per reply",
                "How far the policy has moved; should grow slowly and stay near the target.", "eval/kl", 0.0,
            ),
            Chart(
                "objective/rlhf_reward", "Reward", "", "What PPO maximises: the score less the KL penalty."
            ),
            Chart("objective/kl_coef", "KL coefficient", "", "Weight of the KL penalty."),
            Chart(
                "objective/scores_std", "Spread of the scores", "standard deviation",
                "Within one batch; 0 leaves nothing to learn from.", "eval/scores_std", 0.0,
            ),
        ),
    ),
    (
        "Replies",
        (
            Chart("response/length", "Reply length", "tokens", "Stop token included.", "eval/length"),
            Chart(
                "response/eos_rate", "Stop rate", "of the replies",
                "Replies that end by themselves.", "eval/eos_rate", 0.0, 1.0,
            ),
            Chart(
                "objective/entropy", "Surprise", "nats per reply",
                "Minus log-probability of what was sampled.",
            ),
        ),
    ),
    (
        "Policy",
        (
            Chart("loss/policy", "Policy loss", "", "Near 0; it is no measure of progress."),
            Chart("policy/entropy", "Entropy", "nats per token", "Falls slowly; near 0 it has collapsed."),
            Chart("policy/clipfrac", "Clip fraction", "of the tokens", "0.05 to 0.3 is usual.", "", 0.0),
            Chart("policy/approxkl", "KL of the update", "nats per token", "New policy to old.", "", 0.0),
            Chart("policy/ratio", "Ratio", "new / old", "Hovers around 1."),
            Chart("policy/ratio_var", "Variance of the ratio", "", "", "", 0.0),
        ),
    ),
    (
        "Critic",
        (
            Chart("loss/value", "Value loss", "", "", "", 0.0, wide=True),
            Chart(
                "value/explained_var", "Explained variance", "",
                "1 is perfect, 0 a constant, below 0 worse than that.",
            ),
            Chart("value/clipfrac", "Value clip fraction", "of the tokens", "", "", 0.0),
            Chart("value/error", "Value error", "squared", "", "", 0.0),
            Chart("value/mean", "Mean value"),
        ),
    ),
    (
        "Optimizer",
        (
            Chart("lr", "Learning rate", "", "", "", 0.0),
            Chart("grad_norm", "Gradient norm, policy", "before clipping", "", "", 0.0),
            Chart("grad_norm/critic", "Gradient norm, critic", "before clipping", "", "", 0.0),
            Chart("loss/total", "Total loss"),
            Chart("objective/non_score_reward", "KL penalty"),
            Chart("policy/steps", "Optimizer steps", "per iteration", "Fewer under target_kl.", "", 0.0),
            Chart("loss/pretrain", "Pre-training loss"),
            Chart(
                "update/skipped", "Skipped updates", "per iteration",
                "A loss, gradient or reward was not finite; see skipped_updates.jsonl.", "", 0.0,
            ),
        ),
    ),
    (
        "Speed",
        (
            Chart("tokens_per_second", "Throughput", "reply tokens per second", "Whole iteration.", "", 0.0),
            Chart(
                "tokens_per_second/rollout", "Throughput of generation", "reply tokens per second",
                "Rollout alone.", "", 0.0,
            ),
            Chart("time/iteration", "Time per iteration", "seconds", "", "", 0.0),
        ),
    ),
)  # fmt: skip

_LEARNING: tuple[tuple[str, tuple[Chart, ...]], ...] = (
    (
        "Optimizer",
        (
            Chart("lr", "Learning rate", "", "0 where a step was skipped.", "", 0.0),
            Chart("grad_norm", "Gradient norm", "before clipping", "", "", 0.0),
            Chart(
                "update/skipped", "Skipped updates", "per step",
                "A loss or gradient was not finite; see skipped_updates.jsonl.", "", 0.0,
            ),
        ),
    ),
    (
        "Speed",
        (
            Chart("tokens_per_second", "Throughput", "tokens per second", "", "", 0.0),
            Chart("time/iteration", "Time per step", "seconds", "", "", 0.0),
        ),
    ),
)  # fmt: skip

STAGE_GROUPS: dict[str, tuple[tuple[str, tuple[Chart, ...]], ...]] = {
    SFT: (
        (
            "Goal",
            (
                Chart(
                    "loss/train", "Loss", "nats per token",
                    "Of the response tokens; should fall, on held-out prompts too.", "eval/loss", wide=True,
                ),
                Chart(
                    "eval/perplexity", "Held-out perplexity", "",
                    "Exponential of the held-out loss: tokens it hesitates between.", "eval/perplexity",
                ),
            ),
        ),
        *_LEARNING,
    ),
    REWARD: (
        (
            "Goal",
            (
                Chart("loss/train", "Loss", "per pair", "0.69 is chance.", "eval/loss", 0.0, wide=True),
                Chart(
                    "train/accuracy", "Accuracy", "of the pairs",
                    "The preferred response scores higher; 0.5 is chance.", "eval/accuracy", 0.0, 1.0,
                ),
                Chart("train/margin", "Margin", "", "Score preferred less score rejected.", "eval/margin"),
                Chart("eval/scores", "Held-out score", "mean", "Before calibration.", "eval/scores"),
                Chart(
                    "eval/scores_std", "Spread of held-out scores", "standard deviation",
                    "Before calibration.", "eval/scores_std", 0.0,
                ),
            ),
        ),
        *_LEARNING,
    ),
}  # fmt: skip
"""Those of the stages before PPO; a metric that only evaluations have is drawn from them."""

NOT_DRAWN = frozenset({"iteration", "episode", "epoch"})
PHASE_PREFIX = "time/"
TOTAL_TIME = "time/iteration"


def groups_of(
    metrics: Iterable[str], kind: str = PPO, evaluated: Iterable[str] = ()
) -> list[tuple[str, list[Chart]]]:
    """The groups with those charts that a run has, and under "Other" the metrics that have no place.

    Args:
        metrics: names of all runs; phases of an iteration (``time/...``) are drawn in one chart of their own.
        kind: of the runs.
        evaluated: metrics of evaluations.
    """
    groups = STAGE_GROUPS.get(kind, GROUPS)
    present = dict.fromkeys(metrics)
    there = {*present, *evaluated}
    found = [(title, [chart for chart in charts if chart.metric in there]) for title, charts in groups]
    known = {chart.metric for _, charts in groups for chart in charts} | NOT_DRAWN
    other = [Chart(name, name) for name in present if name not in known and not is_phase(name)]
    return [(title, charts) for title, charts in [*found, ("Other", other)] if charts]


def is_phase(name: str) -> bool:
    """Whether a metric is the time of one phase of an iteration."""
    return name.startswith(PHASE_PREFIX) and name != TOTAL_TIME
