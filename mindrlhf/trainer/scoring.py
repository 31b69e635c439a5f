"""Scoring a rollout: reference log-probs, values and rewards, each on its model's own layout."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from mindspore import Tensor

from mindrlhf.configs.schema import PPOConfig
from mindrlhf.models.qwen2.networks import SequenceModel
from mindrlhf.runtime.host_exchange import HostExchange, local_rows
from mindrlhf.trainer.builder import PPOModels
from mindrlhf.trainer.experience import Rollout, Scores, sequence_inputs

Forward = Callable[..., np.ndarray]


def score_rollout(
    models: PPOModels,
    rollout: Rollout,
    exchange: HostExchange,
    *,
    rows_per_pass: int,
    extra_scores: Callable[[Rollout], np.ndarray] | None = None,
    on_pass: Callable[[], None] = lambda: None,
) -> Scores:
    """What the scoring models say of a global rollout; equal on every rank.

    Args:
        models: of this rank.
        rollout: the global batch.
        exchange: gathers the replicas' rows.
        rows_per_pass: rows of one forward pass on a rank; 0 for all it has.
        extra_scores: gives (B,) float32 that are added to the reward model's, or stand alone without one.
        on_pass: called after each of the :func:`count_passes` forward passes.
    """
    passes = _Passes(rollout, exchange, rows_per_pass, on_pass)
    on = models.train if models.critic is None else models.critic
    values = passes.run(on, lambda *arrays: models.values(*map(Tensor, arrays)).asnumpy())
    scores = _reward_scores(models, passes)
    if extra_scores is not None:
        scores = scores + extra_scores(rollout)
    return Scores(ref_logprobs=_ref_logprobs(models, passes), values=values, scores=scores)


def count_passes(models: PPOModels, config: PPOConfig) -> int:
    """Forward passes on this rank in which :func:`score_rollout` scores a rollout of the whole batch."""
    value_model = models.train if models.critic is None else models.critic
    rows = [
        config.rollout_batch_size // model.groups.mesh.dp
        for model in (value_model, models.reward, models.ref)
        if model is not None
    ]
    return sum(-(-count // (config.score_batch_size or count)) for count in rows)


def judge_rollout(
    models: PPOModels, rollout: Rollout, exchange: HostExchange, *, rows_per_pass: int
) -> tuple[np.ndarray, np.ndarray]:
    """Reference log-probs (B, R) and the reward model's scores (B,), without values; equal on every rank.

    Scores are 0 without a reward model.
    """
    passes = _Passes(rollout, exchange, rows_per_pass)
    return _ref_logprobs(models, passes), _reward_scores(models, passes)


def policy_logprobs(
    model: SequenceModel, rollout: Rollout, exchange: HostExchange, *, rows_per_pass: int
) -> np.ndarray:
    """Log-probs (B, R) of a rollout's responses under a policy's training network, 0 after the end.

    The check on the rollout's own log-probs: before the first update and after every sync the two agree.
    """
    passes = _Passes(rollout, exchange, rows_per_pass)
    logprobs = passes.run(model, lambda *arrays: policy_outputs(model, *arrays)[0])
    columns = np.arange(logprobs.shape[1])
    return np.where(columns < rollout.response_lengths[:, None], logprobs, 0.0).astype(np.float32)


def policy_outputs(model: SequenceModel, *arrays: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-probs, entropy and values, (B, R) each, of a :class:`PPOModelTrain`, without a gradient."""
    logprobs, entropy, values = model(*map(Tensor, arrays))
    return logprobs.asnumpy(), entropy.asnumpy(), values.asnumpy()


def _ref_logprobs(models: PPOModels, passes: _Passes) -> np.ndarray:
    return passes.run(models.ref, lambda *arrays: policy_outputs(models.ref, *arrays)[0])


def _reward_scores(models: PPOModels, passes: _Passes) -> np.ndarray:
    reward, lengths = models.reward, passes.rollout.response_lengths
    if reward is None:
        return np.zeros(len(lengths), np.float32)
    return passes.run(reward, lambda *arrays: reward(*map(Tensor, arrays)).asnumpy(), lengths)


class _Passes:
    """Forward passes over a global rollout, each on the replicas of its own model.

    Args:
        rollout: the global batch.
        exchange: gathers the replicas' rows.
        rows_per_pass: rows of one forward pass on a rank; 0 for all it has.
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
        self.inputs = sequence_inputs(rollout)

    def run(self, model: SequenceModel, forward: Forward, *extra: np.ndarray) -> np.ndarray:
        """Runs ``forward`` over this replica's rows, pass by pass, and gathers the global result."""
        mesh = model.groups.mesh
        mine = local_rows(len(self.inputs.tokens), mesh, self.exchange.runtime.rank)
        step = self.rows_per_pass or (mine.stop - mine.start)
        parts = []
        for first in range(mine.start, mine.stop, step):
            rows = slice(first, first + step)
            parts.append(forward(*self.inputs.rows(rows), *(array[rows] for array in extra)))
            self.on_pass()
        return self.exchange.gather_rows({"x": np.concatenate(parts).astype(np.float32)}, mesh)["x"]
