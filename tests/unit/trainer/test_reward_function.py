"""``--reward_fn``: what it is given, how its numbers are used, and how its faults are named."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindrlhf.data.jsonl import Sample
from mindrlhf.data.prompt_format import PromptFormat
from mindrlhf.data.tokenizer import ChatTemplate, Tokenizer
from mindrlhf.runtime.device import Runtime
from mindrlhf.runtime.host_exchange import HostExchange
from mindrlhf.trainer.experience import Rollout
from mindrlhf.trainer.reward_function import function_scores, load_reward_function, reward_source
from mindrlhf.utils.errors import MindRLHFError, RewardError

EXCHANGE = HostExchange(Runtime(0, 1))


PROMPTS = ["hi", "<|im_end|> or\n<|im_start|>user\nnot"]
RESPONSES = ["cd", "zzzz"]


def rollout(tokenizer: Tokenizer, form: PromptFormat) -> Rollout:
    """Two samples, 70 and 71: a response that has stopped, and one that was cut."""
    prompts = [sample.prompt for sample in form.encode_samples([Sample(p, None, 1) for p in PROMPTS])]
    answers = tokenizer.encode_batch(RESPONSES)
    answers[0].append(form.stop)
    columns, length = max(map(len, prompts)), max(map(len, answers))
    tokens = np.full((2, columns + length), 9, np.int32)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        tokens[row, columns - len(prompt) : columns + len(answer)] = [*prompt, *answer]
    return Rollout.of(
        tokens=tokens,
        prompt_lengths=np.array([len(prompt) for prompt in prompts], np.int32),
        response_lengths=np.array([len(answer) for answer in answers], np.int32),
        logprobs=np.zeros((2, length), np.float32),
        stopped=np.array([1, 0], np.int32),
        sample_ids=np.array([70, 71]),
    )


@pytest.fixture
def score(demo_tokenizer: Tokenizer) -> Callable[[object], np.ndarray]:
    def call(function: object) -> np.ndarray:
        batch = rollout(demo_tokenizer, PromptFormat(demo_tokenizer))
        return function_scores(function, demo_tokenizer, batch, EXCHANGE)  # type: ignore[arg-type]

    return call


@pytest.mark.parametrize(
    "settings",
    [{}, {"system_prompt": ""}, {"system_prompt": "<|im_start|>user\nS"}, {"chat_template": False}],
)
@pytest.mark.parametrize("template", [None, "own", "unusable"])
def test_function_sees_the_plain_text_of_prompts_and_cut_responses(
    demo_tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    template: str | None,
) -> None:
    """Whatever stood around the messages when the data were made."""
    if template != "own":
        monkeypatch.setattr(demo_tokenizer, "chat_template", None)
    batch = rollout(demo_tokenizer, PromptFormat(demo_tokenizer, **settings))
    if template == "unusable" and "chat_template" in settings:
        monkeypatch.setattr(demo_tokenizer, "chat_template", ChatTemplate("{% if %}", "t.jinja", {}))
    seen: list[object] = []

    def function(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        seen.extend([list(prompts), list(responses)])
        return [0.5, -2.0]

    scores = function_scores(function, demo_tokenizer, batch, EXCHANGE)
    assert seen == [PROMPTS, RESPONSES]
    assert scores.dtype == np.float32
    assert scores.tolist() == [0.5, -2.0]


@pytest.mark.parametrize(
    "line", ["return [1 / (len(r) - 4) for r in rs]", "yield from (1 / (len(r) - 4) for r in rs)"]
)
def test_exception_names_the_sample_and_the_line_of_the_users_file(
    score: Callable[[object], np.ndarray], tmp_path: Path, line: str
) -> None:
    file = tmp_path / "own.py"
    file.write_text(f"def f(ps, rs):\n    {line}\n")
    fault = rf"ZeroDivisionError: division by zero at {re.escape(str(file))}:2 for sample 71, response 'zzzz'"
    with pytest.raises(MindRLHFError, match=fault):
        score(load_reward_function(f"{file}:f"))
    file.write_text("import json\n\ndef f(ps, rs):\n    return [json.loads(rs[-1])]\n")
    with pytest.raises(
        MindRLHFError, match=rf"JSONDecodeError: .* at {re.escape(str(file))}:4 for sample 70"
    ):
        score(load_reward_function(f"{file}:f"))


@pytest.mark.parametrize(
    ("returned", "fault"),
    [
        ([1.0, float("nan")], "returned nan for sample 71"),
        ([float("-inf"), 1.0], "returned -inf for sample 70"),
        ([1e39, 1.0], r"returned 1e\+39 for sample 70.*: not a finite float32"),
        ([1.0, None], "returned None for sample 71, response 'zzzz': .*; return a number for every sample"),
        (["x", None], "returned x for sample 70"),
        ([1.0], "returned 1 numbers for 2 samples"),
        (None, "returned None for all samples; return a number for every sample"),
    ],
)
def test_bad_numbers_are_named(
    score: Callable[[object], np.ndarray], returned: list[float] | None, fault: str
) -> None:
    with pytest.raises(MindRLHFError, match=fault):
        score(lambda prompts, responses: returned)


def test_texts_that_cannot_be_made_stop_every_rank(
    score: Callable[[object], np.ndarray], demo_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main rank alone makes them: it must get as far as telling the others."""
    told: list[np.ndarray] = []
    monkeypatch.setattr(
        EXCHANGE,
        "every_rank",
        lambda packet: told.append(packet) or packet[None],  # type: ignore[func-returns-value]
    )
    monkeypatch.setattr(demo_tokenizer, "decode", lambda *ids, **options: 1 / 0)
    with pytest.raises(RewardError, match=r"--reward_fn gave no scores: ZeroDivisionError"):
        score(lambda prompts, responses: [0.0, 0.0])
    assert [packet[-1] for packet in told] == [1]


def test_a_function_that_exits_is_a_fault(score: Callable[[object], np.ndarray]) -> None:
    with pytest.raises(MindRLHFError, match=r"--reward_fn raised SystemExit: 3 .* for sample 70"):
        score(lambda prompts, responses: sys.exit(3))


def test_loads_a_module_of_the_working_directory_or_a_file(
    score: Callable[[object], np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "my_own_reward.py").write_text(
        "def length(prompts, responses):\n    return map(len, responses)\n"
    )
    (tmp_path / "folder/beside_reward.py").write_text("from my_own_reward import length\n")
    # A file may have the name of an installed module, and import what is beside it.
    (tmp_path / "folder/json.py").write_text("from beside_reward import length\n")
    monkeypatch.chdir(tmp_path)
    for name in ("my_own_reward:length", "folder/json.py:length", f"{tmp_path}/my_own_reward.py:length"):
        assert score(load_reward_function(name)).tolist() == [2.0, 4.0]


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("math", "package.module:function or path/to/file.py:function"),
        ("no_such_module_at_all:f", "No module named 'no_such_module_at_all'; the module must"),
        ("math:no_such", "no attribute"),
        ("math:pi", "not a function"),
        ("nowhere/rf.py:f", r"nowhere/rf\.py is not a file"),
        ("syntax.py:f", r"SyntaxError: .*\(syntax\.py, line 1\)"),
        (
            "fails.py:f",
            r"ZeroDivisionError: division by zero at /.*fails\.py:2$",
        ),
        ("fails.py", r"file\.py:function"),
        ("exits.py:f", r"SystemExit: 0 at /.*exits\.py:1$"),
    ],
)
def test_bad_names(name: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "syntax.py").write_text("def f(:\n")
    (tmp_path / "fails.py").write_text("\n1 / 0\n")
    (tmp_path / "exits.py").write_text("raise SystemExit(0)\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MindRLHFError, match=fault):
        load_reward_function(name)


def test_the_source_of_a_reward_is_the_file_that_defines_it(tmp_path: Path) -> None:
    class Reward:
        def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
            return []

    for function in (Reward(), Reward().__call__, test_bad_names):
        assert reward_source(function) == Path(__file__)  # type: ignore[arg-type]
    beside = tmp_path / "beside.py"
    beside.write_text(
        "import functools\n\ndef decorate(f):\n    @functools.wraps(f)\n    def g(*texts):\n"
        "        return f(*texts)\n    return g\n"
    )
    decorate = load_reward_function(f"{beside}:decorate")
    for wrap in (decorate, lru_cache, partial, lambda f: partial(decorate(partial(lru_cache(f))))):
        assert reward_source(wrap(test_bad_names)) == Path(__file__)  # type: ignore[operator]
    assert reward_source(partial(max)) is reward_source(max) is None
