"""Scoring a rollout: reference log-probs, values and rewards, each on its model's own layout."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from mindspore import Tensor

from mindrlhf.models.train import SequenceModel
from mindrlhf.parallel.layout import Mesh
from mindrlhf.trainer.builder import PPOModels
from mindrlhf.trainer.experience import Rollout, Scores, SequenceInputs, sequence_inputs
from mindrlhf.trainer.runtime import HostExchange, local_rows

Forward = Callable[..., np.ndarray]


def score_rollout(
    models: PPOModels,
    rollout: Rollout,
    exchange: HostExchange,
    *,
    rows_per_pass: int,
    extra_scores: Callable[[Rollout], np.ndarray] | None = None,
) -> Scores:
    """What the scoring models say of a global rollout; equal on every rank.

    Args:
        models: of this rank.
        rollout: the global batch.
        exchange: gathers the replicas' rows.
        rows_per_pass: rows of one forward pass on a rank; 0 for all it has.
        extra_scores: gives (B,) float32 that are added to the reward model's, or stand alone without one.
    """
    inputs = sequence_inputs(rollout)
    critic = models.critic

    def run(model: SequenceModel, forward: Forward, *extra: np.ndarray) -> np.ndarray:
        return _on_replicas(forward, inputs, extra, model.groups.mesh, exchange, rows_per_pass)

    if critic is None:
        values = run(models.train, lambda *arrays: policy_outputs(models.train, *arrays)[2])
    else:
        values = run(critic, lambda *arrays: critic(*map(Tensor, arrays)).asnumpy())
    scores = np.zeros(len(rollout.tokens), np.float32)
    reward = models.reward
    if reward is not None:
        scores = run(reward, lambda *arrays: reward(*map(Tensor, arrays)).asnumpy(), rollout.response_lengths)
    if extra_scores is not None:
        scores = scores + extra_scores(rollout)
    return Scores(
        ref_logprobs=run(models.ref, lambda *arrays: policy_outputs(models.ref, *arrays)[0]),
        values=values,
        scores=scores,
    )


def policy_logprobs(
    model: SequenceModel, rollout: Rollout, exchange: HostExchange, *, rows_per_pass: int
) -> np.ndarray:
    """Log-probs (B, R) of a rollout's responses under a policy's training network, 0 after the end.

    The check on the rollout's own log-probs: before the first update and after every sync the two agree.
    """
    inputs = sequence_inputs(rollout)
    logprobs = _on_replicas(
        lambda *arrays: policy_outputs(model, *arrays)[0],
        inputs,
        (),
        model.groups.mesh,
        exchange,
        rows_per_pass,
    )
    columns = np.arange(logprobs.shape[1])
    return np.where(columns < rollout.response_lengths[:, None], logprobs, 0.0).astype(np.float32)


def policy_outputs(model: SequenceModel, *arrays: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-probs, entropy and values, (B, R) each, of a :class:`PPOModelTrain`, without a gradient."""
    logprobs, entropy, values = model(*map(Tensor, arrays))
    return logprobs.asnumpy(), entropy.asnumpy(), values.asnumpy()


def _on_replicas(
    forward: Forward,
    inputs: SequenceInputs,
    extra: tuple[np.ndarray, ...],
    mesh: Mesh,
    exchange: HostExchange,
    rows_per_pass: int,
) -> np.ndarray:
    """Runs ``forward`` over this replica's rows, pass by pass, and gathers the global result."""
    mine = local_rows(len(inputs.tokens), mesh, exchange.runtime.rank)
    step = rows_per_pass or (mine.stop - mine.start)
    parts = []
    for first in range(mine.start, mine.stop, step):
        rows = slice(first, first + step)
        parts.append(forward(*inputs.rows(rows), *(array[rows] for array in extra)))
    return exchange.gather_rows({"x": np.concatenate(parts).astype(np.float32)}, mesh)["x"]
