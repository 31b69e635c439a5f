"""Bytes of an optimizer step, by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from mindrlhf.configs.keys import JobConfig, ParallelConfig
from mindrlhf.planning.traffic import update_traffic

MakeJob = Callable[..., JobConfig]
HIDDEN, LAYERS, ROWS, COLUMNS, RESPONSE = 16, 2, 4, 10, 6


@pytest.mark.parametrize(("recompute", "passes"), [(0, 2), (2, 3)])
def test_the_residual_stream_is_summed_twice_a_layer_and_pass(
    tiny_job: MakeJob, recompute: int, passes: int
) -> None:
    job = tiny_job()
    train = replace(
        job.train, parallel=ParallelConfig(data_parallel=1, model_parallel=2), recompute=recompute
    )
    found = update_traffic(job, train, lm_head=True, score_head=False)
    tokens = ROWS * COLUMNS
    # In each pass two sums a layer, once the embedding's, and the gradient of the head's rows.
    numbers = (2 * LAYERS * passes + 1) * tokens * HIDDEN + ROWS * RESPONSE * HIDDEN
    assert found.layers == 4 * numbers  # an AllReduce of two ranks sends 2 x 1/2 of it
    assert found.gradients == 0
    critic = update_traffic(job, train, lm_head=False, score_head=True)
    assert found.layers - critic.layers == 4 * ROWS * RESPONSE * HIDDEN


def test_gradients_are_summed_and_shared_out_weights_come_back(tiny_job: MakeJob) -> None:
    job = tiny_job()
    policy = 4368  # numbers, see test_plan_memory.py
    narrow = replace(job.train, model=replace(job.train.model, param_init_type="bfloat16"))
    plain, shared = (
        update_traffic(job, replace(narrow, shards_optimizer=one), lm_head=True, score_head=False)
        for one in (False, True)
    )
    assert plain.layers == 0
    assert plain.gradients == 2 * 1 / 2 * 4 * policy
    assert shared.gradients == 1 / 2 * (4 + 2) * policy
