"""Which metrics of each recipe people see: in log lines, on a terminal, and in ``curves.png``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mindrlhf.configs.keys import PPOConfig
from mindrlhf.trainer.console.state import Column
from mindrlhf.trainer.curves import Curve


@dataclass(frozen=True, kw_only=True)
class ShownMetrics:
    """The metrics of a recipe that people see, and how. Metrics that a step lacks are left out.

    Attributes:
        summary: metric and its format in the log line of a step, such as ``("objective/kl", "kl {:+.4f}")``.
        evaluation: the same for the log line of an evaluation.
        columns: of the table on a terminal.
        status: last values in the live drawing on a terminal, of steps and evaluations.
        curves: of ``curves.png``.
        before_after: whether the evaluations have responses to compare.
    """

    summary: Sequence[tuple[str, str]] = ()
    evaluation: Sequence[tuple[str, str]] = ()
    columns: Sequence[Column] = ()
    status: Sequence[Column] = ()
    curves: Sequence[Curve] = ()
    before_after: bool = False


_SPEED = Column("tokens_per_second", "tok/s", ".0f", 5)

_PPO_COLUMNS = (
    Column("objective/scores", "score", "+.4f", 8),
    Column("objective/kl", "KL", "+.4f", 8),
    Column("response/length", "length", ".1f", 6),
    Column("response/eos_rate", "stop", ".2f", 4),
    Column("loss/policy", "pi loss", "+.4f", 7),
    Column("loss/value", "v loss", ".4f", 6),
    _SPEED,
    Column("time/iteration", "seconds", ".1f", 7),
)  # fit 80 characters, with the iteration before them


def ppo_metrics(config: PPOConfig) -> ShownMetrics:
    """Those of PPO; a critic's only where there is one."""
    return ShownMetrics(
        summary=(
            ("objective/scores", "score {:+.4f}"),
            ("objective/kl", "kl {:+.4f}"),
            ("response/length", "length {:.1f}"),
            ("response/eos_rate", "stop rate {:.2f}"),
            ("loss/policy", "policy loss {:+.5f}"),
            ("loss/value", "value loss {:.5f}"),
            ("policy/ratio", "ratio {:.4f}"),
            ("tokens_per_second", "{:.0f} tok/s"),
            ("time/iteration", "{:.1f} s"),
        ),
        evaluation=(
            ("eval/scores", "score {:+.4f}"),
            ("eval/scores_std", "std {:.4f}"),
            ("eval/kl", "kl {:+.4f}"),
            ("eval/length", "length {:.1f}"),
            ("eval/eos_rate", "stop rate {:.2f}"),
            ("prompts", "{} prompts"),
        ),
        columns=[
            column for column in _PPO_COLUMNS if config.critic != "none" or column.metric != "loss/value"
        ],
        status=(*_PPO_COLUMNS[:3], _SPEED, Column("eval/scores", "held-out score", "+.4f", 0)),
        curves=(
            Curve("objective/scores", "score"),
            Curve("objective/kl", "KL to the reference (nats per sequence)"),
            Curve("response/length", "response length (tokens)"),
            Curve("loss/policy", "policy loss"),
            Curve("loss/value", "value loss"),
            Curve("policy/entropy", "entropy (nats per token)"),
            Curve("eval/scores", "held-out score (band: \N{PLUS-MINUS SIGN}1 std)", band="eval/scores_std"),
            Curve("eval/kl", "held-out KL (nats per sequence)"),
            Curve("eval/length", "held-out length (tokens)"),
            Curve("eval/eos_rate", "held-out stop rate"),
        ),
        before_after=True,
    )


def _supervised(
    step: Sequence[tuple[str, str]], evaluation: Sequence[tuple[str, str]], curves: Sequence[Curve]
) -> ShownMetrics:
    """Those of a step over rows of data: metrics and titles of a step, and of an evaluation."""
    return ShownMetrics(
        summary=[(metric, title + " {:.4f}") for metric, title in step],
        evaluation=[(metric, title + " {:.4f}") for metric, title in evaluation],
        columns=(
            *(Column(metric, title, ".4f", 8) for metric, title in step),
            Column("lr", "lr", ".2e", 8),
            Column("grad_norm", "grad norm", ".3f", 9),
            _SPEED,
            Column("time/step", "seconds", ".1f", 7),
        ),
        status=[Column(metric, title, ".4f", 0) for metric, title in (*step, *evaluation)],
        curves=curves,
    )


SFT_METRICS = _supervised(
    [("loss/train", "loss")],
    [("eval/loss", "held-out loss"), ("eval/perplexity", "held-out perplexity")],
    [
        Curve("loss/train", "training loss (nats per token)"),
        Curve("eval/loss", "held-out loss (nats per token)"),
        Curve("eval/perplexity", "held-out perplexity"),
        Curve("lr", "learning rate"),
        Curve("grad_norm", "gradient norm before clipping"),
        Curve("tokens_per_second", "tokens per second"),
    ],
)

REWARD_MODEL_METRICS = _supervised(
    [("loss/train", "loss"), ("train/accuracy", "accuracy")],
    [
        ("eval/loss", "held-out loss"),
        ("eval/accuracy", "held-out accuracy"),
        ("eval/margin", "held-out margin"),
    ],
    [
        Curve("loss/train", "training loss"),
        Curve("train/accuracy", "training accuracy"),
        Curve("train/margin", "training margin"),
        Curve("eval/loss", "held-out loss"),
        Curve("eval/accuracy", "held-out accuracy"),
        Curve("eval/margin", "held-out margin"),
    ],
)
