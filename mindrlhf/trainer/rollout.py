"""Rollout: prompts in, sampled responses and their log-probs out, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mindrlhf.data.prompts import PromptBatch
from mindrlhf.models.generator import PPOModelInfer
from mindrlhf.runtime.host_exchange import HostExchange, local_rows
from mindrlhf.trainer.experience import Rollout
from mindrlhf.utils.seeds import random_stream


def generate_rollout(
    model: PPOModelInfer,
    batch: PromptBatch,
    exchange: HostExchange,
    *,
    seed: int,
    iteration: int,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> Rollout:
    """Samples one response per prompt; each replica of the model generates its own rows.

    Random numbers are keyed by (seed, iteration, row of the global batch): the ranks of a
    tensor-parallel group draw the same tokens, replicas draw different ones, and the layout does not
    matter.

    Args:
        model: the generating policy.
        batch: the global batch, equal on every rank.
        exchange: gathers the replicas' rows.
        seed: of the job.
        iteration: counted from 0.
        on_tokens: see :meth:`PPOModelInfer.generate`.
    """
    return sample_responses(
        model, batch, exchange, lambda row: random_stream("rollout", seed, iteration, row), on_tokens
    )


def sample_responses(
    model: PPOModelInfer,
    batch: PromptBatch,
    exchange: HostExchange,
    stream: Callable[[int], np.random.Generator],
    on_tokens: Callable[[int], None] = lambda count: None,
) -> Rollout:
    """One response per prompt, with random numbers from the caller.

    Args:
        model, batch, exchange: as for :func:`generate_rollout`.
        stream: row of the global batch -> generator of its random numbers; the same on every rank.
        on_tokens: see :meth:`PPOModelInfer.generate`.
    """
    mesh = model.groups.mesh
    rows = local_rows(len(batch.prompt_ids), mesh, exchange.runtime.rank)
    columns = model.generation.max_response_length
    draws = [stream(row).random(columns, np.float32) for row in range(rows.start, rows.stop)]
    output = model.generate(batch.prompt_ids[rows], batch.prompt_lengths[rows], np.stack(draws), on_tokens)
    everyone = exchange.gather_rows(
        {
            "response_ids": output.response_ids,
            "logprobs": output.logprobs,
            "lengths": output.lengths,
            "stopped": output.stopped.astype(np.int32),
        },
        mesh,
    )
    return Rollout.of(
        tokens=np.concatenate([batch.prompt_ids, everyone["response_ids"]], axis=1),
        prompt_lengths=batch.prompt_lengths,
        response_lengths=everyone["lengths"],
        logprobs=everyone["logprobs"],
        stopped=everyone["stopped"],
        sample_ids=batch.sample_ids,
    )
