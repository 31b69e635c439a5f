"""What a run leaves for people."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mindrlhf.configs.schema import PPOConfig
from mindrlhf.data.mindrecord import read_columns
from mindrlhf.trainer.curves import CURVES, EVALUATION_CURVES
from mindrlhf.trainer.experience import Rollout, Scores, make_experience
from mindrlhf.trainer.recorder import RunRecords, check_fresh, choose_rows, save_experience
from mindrlhf.utils.errors import MindRLHFError


def metrics(iteration: int) -> dict[str, float]:
    return {"iteration": iteration, **{name: np.float32(iteration / 4) for name, _ in CURVES}}


def evaluation(iteration: int) -> dict[str, float]:
    return {
        "iteration": iteration,
        "eval/scores_std": 0.5,
        **{name: iteration / 4 for name, _ in EVALUATION_CURVES},
    }


def test_metrics_and_samples_are_json_lines(tmp_path: Path) -> None:
    records = RunRecords(tmp_path / "run")
    for iteration in (1, 2):
        records.add_metrics(metrics(iteration))
    records.add_samples(
        [{"iteration": 1, "sample_id": np.int64(7), "response": "你好\n", "score": np.float32(0.5)}]
    )
    records.add_samples([])
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [metrics(1), metrics(2)]
    text = (tmp_path / "run" / "samples.jsonl").read_text(encoding="utf-8")
    assert json.loads(text) == {"iteration": 1, "sample_id": 7, "response": "你好\n", "score": 0.5}
    assert "你好" in text, "people read this file"


def test_curves_are_a_png(tmp_path: Path) -> None:
    records = RunRecords(tmp_path)
    assert records.plot() is None
    records.add_metrics(metrics(1))
    picture = records.plot()
    assert picture == tmp_path / "curves.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_evaluations_get_curves_of_their_own(tmp_path: Path) -> None:
    records = RunRecords(tmp_path)
    records.add_metrics(metrics(1))
    records.add_evaluation(evaluation(0), [])
    records.add_evaluation(evaluation(1), [])
    picture = records.plot()
    assert picture is not None
    assert int.from_bytes(picture.read_bytes()[20:24], "big") == 9 * 110, "three rows high, not two"


def test_evaluations_are_kept_with_their_samples_and_rewound(tmp_path: Path) -> None:
    records = RunRecords(tmp_path)
    for iteration in (0, 2, 4):
        samples = [
            {"iteration": iteration, "sample_id": np.int64(row), "response": "\u2028"} for row in (1, 5)
        ]
        records.add_evaluation(evaluation(iteration), samples)
    # Killed after the first sample of the evaluation after iteration 3.
    with (tmp_path / "eval_samples.jsonl").open("a") as file:
        file.write('{"iteration": 3, "sample_id": 1}\n')

    resumed = RunRecords(tmp_path)
    resumed.rewind(3)

    assert resumed.evaluations == [evaluation(0), evaluation(2)]
    assert [(line["iteration"], line["sample_id"]) for line in resumed.eval_samples] == [
        (0, 1),
        (0, 5),
        (2, 1),
        (2, 5),
    ]
    for name, lines in (("evaluations", resumed.evaluations), ("eval_samples", resumed.eval_samples)):
        text = (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8")
        assert [json.loads(line) for line in text.split("\n")[:-1]] == lines
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval_samples.jsonl", "evaluations.jsonl"]


def test_a_directory_with_an_evaluation_is_used(tmp_path: Path) -> None:
    RunRecords(tmp_path).add_evaluation(evaluation(0), [])
    with pytest.raises(MindRLHFError, match=r"earlier run \(evaluations.jsonl\)"):
        check_fresh(tmp_path)


def test_a_resumed_run_drops_the_lines_after_its_checkpoint(tmp_path: Path) -> None:
    first = RunRecords(tmp_path)
    for iteration in (1, 2, 3):
        first.add_metrics(metrics(iteration))
        # U+2028 and U+0085 are line ends to str.splitlines, but not to JSON lines.
        first.add_samples([{"iteration": iteration, "response": f"{iteration}\u2028\u0085"}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "objec')  # killed while writing

    resumed = RunRecords(tmp_path)
    resumed.rewind(2)
    resumed.add_metrics(metrics(3))

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [1, 2, 3]
    assert [line["iteration"] for line in resumed.metrics] == [1, 2, 3], "the curves begin at the beginning"
    samples = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    assert [json.loads(line)["response"] for line in samples] == ["1\u2028\u0085", "2\u2028\u0085"]


def test_a_used_directory_is_refused(tmp_path: Path) -> None:
    check_fresh(tmp_path)
    check_fresh(tmp_path / "not there yet")
    RunRecords(tmp_path).add_metrics(metrics(1))
    with pytest.raises(MindRLHFError, match="--resume_from"):
        check_fresh(tmp_path)


@pytest.mark.parametrize(
    ("count", "wanted", "rows"), [(8, 2, [0, 7]), (8, 3, [0, 4, 7]), (2, 5, [0, 1]), (4, 1, [0]), (4, 0, [])]
)
def test_sample_rows_are_spread_evenly(count: int, wanted: int, rows: list[int]) -> None:
    assert choose_rows(count, wanted) == rows


def test_experience_comes_back_from_its_mindrecord(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rollout = Rollout.of(
        tokens=rng.integers(0, 50, (3, 6)).astype(np.int32),
        prompt_lengths=np.array([4, 1, 2], np.int32),
        response_lengths=np.array([2, 1, 2], np.int32),
        logprobs=rng.standard_normal((3, 2)).astype(np.float32),
        stopped=np.array([1, 1, 0], np.int32),
        sample_ids=np.array([11, 5, 2**40]),
    )
    scores = Scores(*(rng.standard_normal(shape).astype(np.float32) for shape in ((3, 2), (3, 2), (3,))))
    experience = make_experience(rollout, scores, 0.1, PPOConfig())

    file = save_experience(tmp_path / "data.mindrecord", 3, rollout, scores, experience)

    assert file == tmp_path / "data_iteration_000003.mindrecord"
    expected = {
        "tokens": rollout.tokens,
        "valid": experience.inputs.valid,
        "prompt_length": rollout.prompt_lengths[:, None],
        "response_length": rollout.response_lengths[:, None],
        "sample_id": rollout.sample_ids[:, None],
        "score": scores.scores[:, None],
        "mask": experience.mask,
        "logprobs": rollout.logprobs,
        "ref_logprobs": scores.ref_logprobs,
        "values": experience.old_values,
        "rewards": experience.rewards,
        "advantages": experience.advantages,
        "returns": experience.returns,
    }
    found = read_columns(file, list(expected))
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
        assert found[name].dtype == array.dtype
    # A run that is repeated replaces its own file.
    save_experience(tmp_path / "data.mindrecord", 3, rollout, scores, experience)
    assert save_experience(tmp_path / "bare", 1, rollout, scores, experience).suffix == ".mindrecord"
