"""Scoring a rollout: reference log-probs, values and rewards, each on its model's own layout."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mindrlhf.configs.keys import PPOConfig
from mindrlhf.models.networks import Network
from mindrlhf.parallel.layout import Mesh
from mindrlhf.runtime.host_exchange import HostExchange, local_rows
from mindrlhf.trainer.builder import PPOModels
from mindrlhf.trainer.experience import Rollout, ScoredRollout
from mindrlhf.trainer.skipped_updates import SkippedUpdate

ExtraScores = Callable[[Rollout], np.ndarray]
"""Gives (B,) float32 that are added to the reward model's scores, or used alone without one."""


def score_rollout(
    models: PPOModels,
    rollout: Rollout,
    exchange: HostExchange,
    *,
    rows_per_pass: int,
    extra_scores: ExtraScores | None = None,
    on_pass: Callable[[], None] = lambda: None,
) -> ScoredRollout:
    """The outputs of the scoring models for a global rollout; equal on every rank.

    Whitening would spread a single number that is not finite to every sample, so a rollout with one is not
    learned from: it is returned with a fault, and with neutral numbers, for metrics only, in place of those
    that are not finite (0, and the mean of the other scores).

    Args:
        models: of this rank.
        rollout: the global batch.
        exchange: gathers the replicas' rows.
        rows_per_pass: rows of one forward pass on a rank; 0 for all of its rows.
        extra_scores: reward function.
        on_pass: called after each of the :func:`count_passes` forward passes.
    """
    passes = _Passes(rollout, exchange, rows_per_pass, on_pass)
    values = None
    if models.values is not None:
        values = passes.run(_values_mesh(models), models.values)
    scores = _reward_scores(models, passes)
    if extra_scores is not None:
        scores = scores + extra_scores(rollout)
    return _without_faults(ScoredRollout(rollout, _ref_logprobs(models, passes), values, scores))


def count_passes(models: PPOModels, config: PPOConfig) -> int:
    """Forward passes on this rank in which :func:`score_rollout` scores a rollout of the whole batch."""
    meshes = [model.groups.mesh for model in (models.reward, models.ref) if model is not None]
    if models.values is not None:
        meshes.append(_values_mesh(models))
    rows = [config.rollout_batch_size // mesh.dp for mesh in meshes]
    return sum(-(-count // (config.score_batch_size or count)) for count in rows)


def judge_rollout(
    models: PPOModels, rollout: Rollout, exchange: HostExchange, *, rows_per_pass: int
) -> tuple[np.ndarray, np.ndarray]:
    """Reference log-probs (B, R) and the reward model's scores (B,), without values; equal on every rank.

    Scores are 0 without a reward model.
    """
    passes = _Passes(rollout, exchange, rows_per_pass)
    return _ref_logprobs(models, passes), _reward_scores(models, passes)


def _values_mesh(models: PPOModels) -> Mesh:
    return (models.critic or models.train).groups.mesh


def _ref_logprobs(models: PPOModels, passes: _Passes) -> np.ndarray:
    return passes.run(models.ref.groups.mesh, models.ref)


def _reward_scores(models: PPOModels, passes: _Passes) -> np.ndarray:
    reward, lengths = models.reward, passes.rollout.response_lengths
    if reward is None:
        return np.zeros(len(lengths), np.float32)
    return passes.run(reward.groups.mesh, reward, lengths)


def _without_faults(scored: ScoredRollout) -> ScoredRollout:
    """``scored`` itself when all numbers are finite; otherwise with neutral numbers and the fault."""
    rollout = scored.rollout
    faults = {
        "reward": ~np.isfinite(scored.scores),
        "reference log-prob": _any_not_finite(scored.ref_logprobs, rollout.mask),
        "log-prob": _any_not_finite(rollout.logprobs, rollout.mask),
    }
    if scored.values is not None:
        faults["value"] = _any_not_finite(scored.values, rollout.mask)
    bad = np.any(list(faults.values()), axis=0)
    if not bad.any():
        return scored
    names = [f"{name} of {int(rows.sum())} sample(s)" for name, rows in faults.items() if rows.any()]
    finite = scored.scores[np.isfinite(scored.scores)]
    neutral = float(finite.mean(dtype=np.float64)) if len(finite) else 0.0

    model = "policy" if scored.values is None else "both"

    def zeroed(array: np.ndarray) -> np.ndarray:
        return np.where(bad[:, None], np.float32(0), array)

    return ScoredRollout(
        rollout._replace(logprobs=zeroed(rollout.logprobs)),
        ref_logprobs=zeroed(scored.ref_logprobs),
        values=None if scored.values is None else zeroed(scored.values),
        scores=np.where(faults["reward"], np.float32(neutral), scored.scores),
        fault=SkippedUpdate(model, f"not a finite number: {', '.join(names)}", np.flatnonzero(bad)),
    )


def _any_not_finite(array: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Rows of (B, R) with NaN or infinity inside the mask."""
    found: np.ndarray = (~np.isfinite(array) & mask).any(axis=1)
    return found


class _Passes:
    """Forward passes over a global rollout, each on the replicas of its model.

    Args:
        rollout: the global batch.
        exchange: gathers the replicas' rows.
        rows_per_pass: rows of one forward pass on a rank; 0 for all of its rows.
        on_pass: called after each.
    """

    def __init__(
        self,
        rollout: Rollout,
        exchange: HostExchange,
        rows_per_pass: int,
        on_pass: Callable[[], None] = lambda: None,
    ) -> None:
        self.rollout, self.exchange, self.rows_per_pass = rollout, exchange, rows_per_pass
        self.on_pass = on_pass

    def run(self, mesh: Mesh, network: Network, *extra: np.ndarray) -> np.ndarray:
        """Runs a network over this replica's rows, pass by pass, and gathers its first output."""
        inputs = self.rollout.inputs
        mine = local_rows(len(inputs.tokens), mesh, self.exchange.runtime.rank)
        step = self.rows_per_pass or (mine.stop - mine.start)
        parts = []
        for first in range(mine.start, mine.stop, step):
            rows = slice(first, first + step)
            parts.append(network(*inputs.rows(rows), *(array[rows] for array in extra))[0])
            self.on_pass()
        return self.exchange.gather_rows({"x": np.concatenate(parts).astype(np.float32)}, mesh)["x"]
