"""Evaluation on held-out prompts, on the smallest job there is, in one process."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindrlhf.configs.keys import JobConfig
from mindrlhf.runtime.device import Runtime
from mindrlhf.runtime.host_exchange import HostExchange
from mindrlhf.trainer.evaluation import evaluate, held_out_prompts
from mindrlhf.trainer.loop import train
from mindrlhf.trainer.scoring import score_rollout
from mindrlhf.utils.errors import MindRLHFError
from tests.probes import policy_logprobs
from tests.unit.trainer.evaluated_run import (
    BATCH,
    HELD_OUT,
    LETTERS,
    PAD,
    PROMPT,
    EvaluatedRun,
    assert_same_metrics,
    evaluated_job,
    lines,
)
from tests.unit.trainer.tiny_inputs import write_prompts


@pytest.fixture
def runs(evaluated_run: EvaluatedRun) -> EvaluatedRun:
    return evaluated_run


@pytest.fixture
def job(tiny_job: JobConfig) -> JobConfig:
    return evaluated_job(tiny_job)


def test_training_is_the_same_with_and_without_evaluation(runs: EvaluatedRun) -> None:
    again = lines(runs.save / "metrics.jsonl")
    assert [line["iteration"] for line in again] == [1, 2]
    assert_same_metrics(again, runs.without)
    assert runs.without[0]["objective/scores"] != runs.without[1]["objective/scores"]


def test_every_prompt_is_answered_once_and_in_order(runs: EvaluatedRun) -> None:
    for result in (runs.first, runs.last):
        np.testing.assert_array_equal(result.rollout.sample_ids, range(HELD_OUT))
        np.testing.assert_array_equal(result.rollout.tokens[:, :PROMPT], held_out(runs).prompt_ids)
    rollout = runs.first.rollout
    assert 0 < rollout.stopped.sum() < HELD_OUT
    assert len({tuple(row) for row in rollout.tokens[:, PROMPT:]}) > 3
    # 7 prompts, not 8: the repeat that filled the second batch is not scored; training asks for 4.
    assert [len(prompts) for prompts, _ in runs.calls] == [HELD_OUT, BATCH, BATCH, HELD_OUT]


def held_out(runs: EvaluatedRun) -> Any:
    prompts = runs.trainer.held_out_prompts
    assert prompts is not None
    return prompts


def test_scores_are_those_of_reward_model_and_function(runs: EvaluatedRun) -> None:
    """Recomputed by the code that scores training rollouts, four rows of them."""
    trainer, rollout = runs.trainer, runs.last.rollout
    four = type(rollout)(*(array[3:] for array in rollout))
    scores = score_rollout(trainer.models, four, trainer.exchange, rows_per_pass=2).scores
    lengths = [len(response) for response in runs.calls[-1][1]]
    assert len(set(lengths)) > 1
    np.testing.assert_allclose(runs.last.scores[3:], scores + lengths[3:], rtol=1e-5, atol=1e-5)


def test_kl_is_zero_before_training_and_policy_minus_reference_after(runs: EvaluatedRun) -> None:
    np.testing.assert_allclose(runs.first.kl, 0, atol=1e-4)
    trainer = runs.trainer
    rollout = type(runs.last.rollout)(*(array[1:] for array in runs.last.rollout))
    reference = policy_logprobs(trainer.models.ref, rollout, trainer.exchange, rows_per_pass=2)
    expected = [
        sum(float(rollout.logprobs[row, t] - reference[row, t]) for t in range(rollout.response_lengths[row]))
        for row in range(HELD_OUT - 1)
    ]
    np.testing.assert_allclose(runs.last.kl[1:], expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected).max() > 0.01


def test_metrics_are_means_over_the_prompts(runs: EvaluatedRun) -> None:
    for result, line in zip((runs.first, runs.last), lines(runs.save / "evaluations.jsonl"), strict=True):
        scores = [float(score) for score in result.scores]
        mean = sum(scores) / HELD_OUT
        assert line["eval/scores"] == pytest.approx(mean)
        std = (sum((score - mean) ** 2 for score in scores) / HELD_OUT) ** 0.5
        assert line["eval/scores_std"] == pytest.approx(std, rel=1e-6)
        assert line["eval/kl"] == pytest.approx(sum(map(float, result.kl)) / HELD_OUT)
        assert line["eval/length"] == sum(result.rollout.response_lengths.tolist()) / HELD_OUT
        assert line["eval/eos_rate"] == sum(result.rollout.stopped.tolist()) / HELD_OUT
        assert line["prompts"] == HELD_OUT
        assert line["seconds"] > 0


@pytest.mark.parametrize("batch", [2, 4, 8])
@pytest.mark.parametrize("seed", [3, 4])
def test_neither_batch_size_nor_seed_of_the_job_matters(runs: EvaluatedRun, batch: int, seed: int) -> None:
    """Common random numbers; whatever fills the last batch (1, 1 or 1 row) changes nothing."""
    trainer = runs.trainer
    config = replace(trainer.config, rollout_batch_size=batch, seed=seed)
    again = evaluate(trainer.models, held_out(runs), trainer.exchange, config)
    lengths = [len(response) for response in runs.calls[-1][1]]
    np.testing.assert_array_equal(again.rollout.tokens, runs.last.rollout.tokens)
    np.testing.assert_allclose(again.scores + lengths, runs.last.scores, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(again.kl, runs.last.kl, rtol=1e-4, atol=1e-5)


def test_each_prompt_has_random_numbers_of_its_own(runs: EvaluatedRun) -> None:
    """A part of the prompts gets the answers that it gets among all."""
    trainer = runs.trainer
    some = type(held_out(runs))(*(array[2:5] for array in held_out(runs)))
    part = evaluate(trainer.models, some, trainer.exchange, trainer.config)
    np.testing.assert_array_equal(part.rollout.tokens, runs.last.rollout.tokens[2:5])


def test_what_a_run_leaves_behind(runs: EvaluatedRun) -> None:
    """The samples are the same rows each time, as texts."""
    assert [line["iteration"] for line in lines(runs.save / "evaluations.jsonl")] == [0, 2]
    samples = lines(runs.save / "eval_samples.jsonl")
    assert [(line["iteration"], line["sample_id"]) for line in samples] == [
        (iteration, row) for iteration in (0, 2) for row in (0, 3, 6)
    ]
    rollout = runs.last.rollout
    for line in samples[3:]:
        row = line["sample_id"]
        ids = rollout.tokens[row, PROMPT : PROMPT + rollout.response_lengths[row]]
        assert line["response"] == "".join(LETTERS[token] for token in ids if token < PAD)
        assert line["prompt"] == LETTERS[row] + "u" * (row % 4)
        assert line["score"] == pytest.approx(float(runs.last.scores[row]))
        assert line["kl"] == pytest.approx(float(runs.last.kl[row]))
        assert line["length"] == rollout.response_lengths[row]
        assert line["stopped"] == bool(rollout.stopped[row])
    summary = json.loads((runs.save / "evaluation_summary.json").read_text())
    assert summary["score_after"] == pytest.approx(float(runs.last.scores.mean()), rel=1e-6)
    text = (runs.save / "before_after.md").read_text(encoding="utf-8")
    assert text.count("\n| ") == 2 + 5 + 2 + 3, "two tables, of five numbers and of three samples"
    assert int.from_bytes((runs.save / "curves.png").read_bytes()[20:24], "big") == 9 * 110


def test_a_resumed_run_repeats_no_evaluation(
    runs: EvaluatedRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, trainer = runs.run, runs.trainer
    assert run.recorder is not None
    monkeypatch.setattr(run.recorder, "plot", lambda: None)  # slow
    before = lines(runs.save / "evaluations.jsonl")
    run.resume(runs.save / "iteration_000001", trainer)
    train(run, trainer)
    after = lines(runs.save / "evaluations.jsonl")
    assert [line["iteration"] for line in after] == [0, 2]
    assert after[0] == before[0]
    for name in ("eval/scores", "eval/kl", "eval/length"):
        assert after[1][name] == pytest.approx(before[1][name], rel=1e-3, abs=1e-4)
    assert len(lines(runs.save / "eval_samples.jsonl")) == 6
    said = capsys.readouterr().err
    assert "held-out after iteration 2: score " in said
    assert "after iteration 0" not in said
    assert said.count("held-out score ") == 1
    assert "initial std), KL " in said

    # Nothing is left to do: nothing is evaluated, and the summary is there.
    run.resume(runs.save / "iteration_000002", trainer)
    train(run, trainer)
    assert lines(runs.save / "evaluations.jsonl") == after

    # Evaluations in between, as eval_interval asks for them.
    monkeypatch.setattr(trainer, "schedule", replace(trainer.schedule, eval_interval=1))
    run.resume(runs.save / "iteration_000001", trainer)
    train(run, trainer)
    assert [line["iteration"] for line in lines(runs.save / "evaluations.jsonl")] == [0, 1, 2]


def test_other_prompts_than_those_recorded_are_refused(
    runs: EvaluatedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = runs.trainer.held_out
    assert held is not None
    monkeypatch.setattr(runs.trainer, "held_out", held._replace(digest="another"))
    with pytest.raises(MindRLHFError, match="are of other held-out data"):
        runs.run.resume(runs.save / "iteration_000001", runs.trainer)


def test_a_failing_reward_function_says_that_it_was_in_evaluation(
    runs: EvaluatedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        runs.trainer, "reward_function", lambda prompts, responses: [float("nan")] * len(prompts)
    )
    with pytest.raises(
        MindRLHFError, match="evaluation on held-out prompts: --reward_fn returned nan for sample 0"
    ):
        runs.trainer.evaluate()


def test_prompts_that_are_trained_on_are_warned_of_or_refused(
    job: JobConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exchange = HostExchange(Runtime(rank=0, world_size=1))
    train = write_prompts(tmp_path / "train", [[1], [2, 3], [4]], job)
    some = write_prompts(tmp_path / "some", [[5], [4], [6], [1]], job)
    assert len(held_out_prompts(some, train, job, exchange).sample_ids) == 4
    said = capsys.readouterr().err
    assert "2 of 4 prompts are in --mind_dataset_dir" in said
    assert "(rows 1, 3)" in said
    assert "rlhf_data.py --eval_output_path" in said

    few = replace(job, ppo=replace(job.ppo, eval_prompts=1))
    assert len(held_out_prompts(some, train, few, exchange).sample_ids) == 1
    assert capsys.readouterr().err == ""

    with pytest.raises(MindRLHFError, match=r"all 3 prompts are in --mind_dataset_dir .* none is held out"):
        held_out_prompts(train, train, job, exchange)
