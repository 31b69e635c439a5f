"""Whole PPO runs on several layouts: equal curves, equal policies, equal replicas.

Three jobs are shared by all tests: one process, two workers, four workers. Every run starts its
generating model from another policy's weights, so a model that is not synchronised fails everything.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.st.ppo_cases import (
    CASES,
    ITERATIONS,
    RELATIVE,
    Run,
    assert_metrics_close,
    collect,
    initial_policy,
    policy_layouts,
    whole_policy,
    write_cases,
)

pytestmark = pytest.mark.msrun

TIMEOUT = 400  # a job takes 25 to 100 s on two quiet cores


SPLIT_CASES = [name for name, case in CASES.items() if case.world_size > 1]


@pytest.fixture(scope="module")
def runs(run_workers: Any, ppo_inputs: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """All cases by name; the one process runs beside the first job of several."""
    directory = tmp_path_factory.mktemp("ppo_one")
    files = {size: write_cases(directory / f"{size}.json", size, ppo_inputs) for size in (1, 2)}
    with (directory / "log").open("w") as log:
        alone = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "worker_ppo.py"), str(files[1])],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=directory,
            env={
                **os.environ,
                "MINDRLHF_TEST_RESULTS": str(directory),
                "PYTHONPATH": str(Path(__file__).parents[2]),
            },
        )
    try:
        reports = run_workers("worker_ppo.py", 2, str(files[2]), timeout=TIMEOUT)
        collected = collect(reports)
        four = write_cases(directory / "4.json", 4, ppo_inputs, reports[0]["directory"])
        reports = run_workers("worker_ppo.py", 4, str(four), timeout=TIMEOUT)
        collected |= collect(reports)
        code = alone.wait(timeout=TIMEOUT)
    finally:
        alone.kill()
        alone.wait()
    if code:
        pytest.fail((directory / "log").read_text()[-5000:], pytrace=False)
    report = json.loads((directory / "rank_0.json").read_text())
    return collected | collect([{**report, "directory": directory}])


@pytest.mark.parametrize("name", SPLIT_CASES)
def test_layouts_do_not_change_the_loss_curve(runs: dict[str, Run], name: str) -> None:
    """Every metric of every iteration equals the one of the single process."""
    actual, expected = runs[name].metrics, runs[CASES[name].reference].metrics
    assert len(actual) == len(expected) == ITERATIONS
    for one, other in zip(actual, expected, strict=True):
        assert_metrics_close(one, other, RELATIVE)


@pytest.mark.parametrize("name", CASES)
def test_layouts_do_not_change_evaluations(runs: dict[str, Run], name: str) -> None:
    """Before the first iteration and after the last, on all ranks; single prompts are compared below."""
    expected = runs[CASES[name].reference].reports[0]["evaluations"]
    assert [line["iteration"] for line in expected] == [0, ITERATIONS]
    assert expected[0]["eval/kl"] == pytest.approx(0, abs=1e-5)
    assert abs(expected[1]["eval/scores"] - expected[0]["eval/scores"]) > 1e-3, "the policy has changed"
    for report in runs[name].reports:
        assert report["evaluations"] == runs[name].reports[0]["evaluations"]
        for one, other in zip(report["evaluations"], expected, strict=True):
            assert_metrics_close(one, other, RELATIVE)


@pytest.mark.parametrize("name", SPLIT_CASES)
def test_layouts_do_not_change_what_is_sampled_or_learnt_from(runs: dict[str, Run], name: str) -> None:
    """Tokens, lengths and masks are identical; log-probs, values and advantages agree to rounding."""
    actual, expected = runs[name].arrays[0], runs[CASES[name].reference].arrays[0]
    compared = 0
    for key, array in expected.items():
        if array.dtype.kind in "iu":
            np.testing.assert_array_equal(actual[key], array, err_msg=key)
        else:
            np.testing.assert_allclose(actual[key], array, rtol=1e-4, atol=5e-5, err_msg=key)
        compared += 1
    assert compared >= ITERATIONS * 15 + 2 * 8


@pytest.mark.parametrize("name", SPLIT_CASES)
def test_layouts_do_not_change_the_trained_weights(runs: dict[str, Run], ppo_inputs: Any, name: str) -> None:
    """The last checkpoints, each read as whole tensors, agree; and training moved every tensor."""
    actual = whole_policy(runs[name], CASES[name], ppo_inputs)
    reference = CASES[CASES[name].reference]
    expected = whole_policy(runs[reference.name], reference, ppo_inputs)
    assert actual.keys() == expected.keys()
    start = initial_policy(ppo_inputs)
    for key, array in expected.items():
        np.testing.assert_allclose(actual[key], array, rtol=0, atol=2e-5, err_msg=key)
        # Adding a constant to all keys changes no attention: their bias has no gradient but rounding.
        if key in start and not key.endswith("wk.bias"):
            assert np.abs(array - start[key]).max() > 1e-3, key


@pytest.mark.parametrize("name", CASES)
def test_ratio_is_one_before_the_first_update(runs: dict[str, Run], name: str) -> None:
    """Rollout and training network agree on every real token, although the generating model was stale."""
    run = runs[name]
    assert run.reports[0]["different_at_start"] == len(initial_names(run))
    assert_ratio_is_one(run, 1)


@pytest.mark.parametrize("name", CASES)
def test_infer_equals_train_after_sync(runs: dict[str, Run], name: str) -> None:
    """The same after each update and sync; and the updates did change the policy."""
    run = runs[name]
    for iteration in range(2, ITERATIONS + 1):
        assert_ratio_is_one(run, iteration)
    assert all(report["different_at_end"] == [] for report in run.reports)
    last = run.arrays[0][f"experience/{ITERATIONS}/kl"]
    assert np.abs(last).max() > 1e-2, "the policy is still the reference"


def initial_names(run: Run) -> list[str]:
    return [name for name in run.reports[0]["shards"] if name.startswith("infer/")]


def assert_ratio_is_one(run: Run, iteration: int) -> None:
    for arrays in run.arrays:
        mask = arrays[f"experience/{iteration}/mask"] > 0
        new = arrays[f"rollout/{iteration}/train_logprobs"][mask]
        old = arrays[f"rollout/{iteration}/logprobs"][mask]
        np.testing.assert_allclose(np.exp(new - old), 1.0, rtol=0, atol=1e-4)
        assert old.std() > 0.3, "hardly a test when all log-probs are alike"


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_the_runs_are_not_trivial(runs: dict[str, Run], ppo_inputs: Any, critic: str) -> None:
    """Prompts of many lengths, stop tokens of several kinds, the epoch boundary crossed, no padding id."""
    arrays = runs[f"dp1mp1_dp1mp1_{critic}"].arrays[0]
    every = range(1, ITERATIONS + 1)
    prompts = np.concatenate([arrays[f"rollout/{i}/prompt_lengths"] for i in every])
    assert set(prompts) == {1, 2, 3, 4, 5, 6}
    stopped = np.concatenate([arrays[f"rollout/{i}/stopped"] for i in every])
    assert 0 < stopped.sum() < len(stopped)
    tokens = np.concatenate([arrays[f"rollout/{i}/tokens"] for i in every])
    lengths = np.concatenate([arrays[f"rollout/{i}/response_lengths"] for i in every])
    assert len(set(lengths)) >= 3
    last = tokens[np.arange(len(tokens)), ppo_inputs.PROMPT_COLUMNS + lengths - 1]
    assert len(set(last[stopped > 0]) & set(ppo_inputs.STOP_IDS)) >= 2
    assert not set(last[stopped == 0]) & set(ppo_inputs.STOP_IDS)
    assert tokens.max() < ppo_inputs.VALID_VOCAB
    assert runs[f"dp1mp1_dp1mp1_{critic}"].metrics[-1]["epoch"] == 1


@pytest.mark.parametrize("name", SPLIT_CASES)
def test_all_ranks_hold_bit_equal_experience(runs: dict[str, Run], name: str) -> None:
    first, *others = runs[name].arrays
    for other in others:
        assert first.keys() == other.keys()
        different = [key for key in first if first[key].tobytes() != other[key].tobytes()]
        assert different == []


@pytest.mark.parametrize("name", SPLIT_CASES)
def test_copies_of_a_shard_are_bit_equal_after_training(
    runs: dict[str, Run], ppo_inputs: Any, name: str
) -> None:
    """Data-parallel replicas of everything, and every rank's copy of what is not split."""
    case = CASES[name]
    split = {key for key, layout in policy_layouts(ppo_inputs, (1, 2), "shared").items() if layout.is_split}
    shards = [report["shards"] for report in runs[name].reports]
    assert all(part.keys() == shards[0].keys() for part in shards)
    compared = 0
    for key in shards[0]:
        model, parameter = key.split("/", 1)
        parameter = parameter.removeprefix("adam_m.").removeprefix("adam_v.")
        _, mp = case.infer if model == "infer" else case.train
        groups: dict[int, set[str]] = {}
        for rank, part in enumerate(shards):
            groups.setdefault(rank % mp if parameter in split else 0, set()).add(part[key])
        assert all(len(digests) == 1 for digests in groups.values()), key
        if parameter in split and "optimizer" not in model:
            assert len(set.union(*groups.values())) == mp, f"{key}: slices are not different"
            compared += 1
    assert compared >= 2 * 10


BROKEN = [(name, kind) for name, case in CASES.items() for kind in case.broken]


@pytest.mark.parametrize(("name", "parameter"), BROKEN)
def test_verify_refuses_on_all_ranks_when_one_bit_of_one_rank_differs(
    runs: dict[str, Run], name: str, parameter: str
) -> None:
    messages = [report["broken"][parameter] for report in runs[name].reports]
    assert all("the generating policy is not the trained one" in message for message in messages)
    rank = CASES[name].broken[parameter][1]
    assert parameter in messages[rank]


@pytest.mark.parametrize("name", CASES)
def test_a_loss_that_is_nan_on_one_rank_is_skipped_on_all(runs: dict[str, Run], name: str) -> None:
    """Not a bit of any rank's policy or of its moments changes, and all name the same samples."""
    run = runs[name]
    minibatch = 8 // 2
    for report in run.reports:
        assert report["skipped"]["changed"] == []
        assert report["skipped"]["count"] == 2, "minibatches of the one epoch"
        assert report["skipped"]["rows"] == run.reports[0]["skipped"]["rows"]
    # The last rank's replica has the last part of each minibatch, which is one micro-batch or its last one.
    replicas, micro_batch = CASES[name].train[0], 2 if "micro_batch_size=2" in CASES[name].overrides else 4
    blamed = min(minibatch // replicas, micro_batch)
    assert [len(rows) for rows in run.reports[0]["skipped"]["rows"]] == [blamed, blamed]


def test_resume_goes_on_as_if_never_stopped(runs: dict[str, Run]) -> None:
    """A trainer three iterations on, set back to its first checkpoint, repeats the other two.

    Weights, moments and step counts are restored bit for bit. The second time agrees with the first to
    the last digits only: MindSpore's CPU kernels round differently from one call to another.
    """
    (name,) = [name for name, case in CASES.items() if case.resume]
    for report in runs[name].reports:
        assert report["not_restored"] == []
        assert report["rollout_again"]
        assert [line["iteration"] for line in report["metrics_again"]] == [2, 3]
        for again, before in zip(report["metrics_again"], report["metrics"][1:], strict=True):
            assert_metrics_close(again, before, RELATIVE)


def test_a_checkpoint_of_another_layout_goes_on_as_if_it_were_its_own(runs: dict[str, Run]) -> None:
    """Four workers (train dp2 mp2) repeat their last two iterations from a checkpoint of two (train dp1 mp2).

    Weights, moments, steps, KL coefficient, reward statistics and cursors all come from there: lost moments
    alone change the metrics by more than the tolerance.
    """
    (name,) = [name for name, case in CASES.items() if case.resume_other]
    for report in runs[name].reports:
        assert report["rollout_of_other"]
        assert [line["iteration"] for line in report["metrics_of_other"]] == [2, 3]
        for again, before in zip(report["metrics_of_other"], report["metrics"][1:], strict=True):
            assert_metrics_close(again, before, RELATIVE)


def test_greedy_tokens_are_those_of_transformers_with_the_trained_weights(
    runs: dict[str, Run], ppo_inputs: Any, tmp_path: Path
) -> None:
    """The last checkpoint, exported; every token recomputed without a cache, each prompt alone."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    from mindrlhf.checkpoint.conversion import export_hf
    from mindrlhf.configs.load import load_run_config

    (name,) = [name for name, case in CASES.items() if case.greedy]
    case, run = CASES[name], runs[name]
    export_hf(
        Path(run.reports[0]["last"]) / "policy",
        tmp_path / "hf",
        load_run_config(ppo_inputs.yaml("finetune", *case.train)).model,
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    arrays = {key.removeprefix("greedy/"): value for key, value in run.arrays[0].items() if "greedy/" in key}
    columns = ppo_inputs.PROMPT_COLUMNS
    for row, tokens in enumerate(arrays["tokens"]):
        start = columns - arrays["prompt_lengths"][row]
        end = columns + arrays["response_lengths"][row]
        with torch.no_grad():
            logits = model(torch.tensor(tokens[None, start:end]).long()).logits[0]
        logits = logits[columns - start - 1 : -1, : ppo_inputs.VALID_VOCAB]
        np.testing.assert_array_equal(logits.argmax(-1).numpy(), tokens[columns:end], err_msg=f"row {row}")
        logprobs = torch.log_softmax(logits / 0.8, -1).max(-1).values.numpy()
        np.testing.assert_allclose(arrays["logprobs"][row, : len(logprobs)], logprobs, rtol=0, atol=1e-4)
