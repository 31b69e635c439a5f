"""``--reward_fn``: what it is given, how its numbers are used, and how its faults are named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mindrlhf.runtime.device import Runtime
from mindrlhf.runtime.host_exchange import HostExchange
from mindrlhf.trainer.experience import Rollout
from mindrlhf.trainer.reward_function import function_scores, load_reward_function
from mindrlhf.utils.errors import MindRLHFError

EXCHANGE = HostExchange(Runtime(0, 1))


class LetterTokenizer:
    """Ids are letters of the alphabet; 0 is a control token."""

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        return "".join("<s>" if i == 0 else chr(96 + i) for i in ids if i or not skip_special)


def rollout() -> Rollout:
    """Two samples, P = 3, R = 4: prompt "b" -> "cd<s>"; prompt "<s>ab" -> "zzzz"."""
    return Rollout.of(
        tokens=np.array([[9, 9, 2, 3, 4, 0, 9], [0, 1, 2, 26, 26, 26, 26]], np.int32),
        prompt_lengths=np.array([1, 3], np.int32),
        response_lengths=np.array([3, 4], np.int32),
        logprobs=np.zeros((2, 4), np.float32),
        stopped=np.array([1, 0], np.int32),
        sample_ids=np.array([70, 71]),
    )


def score(function: object) -> np.ndarray:
    return function_scores(function, LetterTokenizer(), rollout(), EXCHANGE)  # type: ignore[arg-type]


def test_function_sees_prompts_with_markup_and_cut_responses() -> None:
    seen: list[object] = []

    def function(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        seen.extend([list(prompts), list(responses)])
        return [0.5, -2.0]

    scores = score(function)
    assert seen == [["b", "<s>ab"], ["cd", "zzzz"]]
    assert scores.dtype == np.float32
    assert scores.tolist() == [0.5, -2.0]


def test_exception_names_the_sample() -> None:
    def function(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [1.0 / (len(response) - 4) for response in responses]

    with pytest.raises(MindRLHFError, match=r"ZeroDivisionError.*sample 71.*'zzzz'"):
        score(function)


@pytest.mark.parametrize(
    ("returned", "fault"),
    [
        ([1.0, float("nan")], "returned nan for sample 71"),
        ([float("-inf"), 1.0], "returned -inf for sample 70"),
        ([1e39, 1.0], r"returned 1e\+39 for sample 70.*: not a finite float32"),
        ([1.0], "returned 1 numbers for 2 samples"),
    ],
)
def test_bad_numbers_are_named(returned: list[float], fault: str) -> None:
    with pytest.raises(MindRLHFError, match=fault):
        score(lambda prompts, responses: returned)


def test_loads_by_name_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_reward.py").write_text(
        "def length(prompts, responses):\n    return map(len, responses)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert score(load_reward_function("my_own_reward:length")).tolist() == [2.0, 4.0]


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("math", "package.module:function"),
        ("no_such_module_at_all:f", "No module named"),
        ("math:no_such", "no attribute"),
        ("math:pi", "not a function"),
    ],
)
def test_bad_names(name: str, fault: str) -> None:
    with pytest.raises(MindRLHFError, match=fault):
        load_reward_function(name)
