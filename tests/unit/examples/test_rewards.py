"""The tutorial's rule-based reward: cheerful replies of a sensible length."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def rewards(repo_root: Path) -> ModuleType:
    path = repo_root / "examples" / "qwen_ppo_tutorial" / "rewards.py"
    spec = importlib.util.spec_from_file_location("rewards", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CHEERFUL = "What a lovely morning, I am so happy to see you!"
GLOOMY = "This was a horrible day and I hate every bit of it."
PLAIN = "The table has four legs and stands in the room."


def test_sentiment_orders_replies(rewards: ModuleType) -> None:
    cheerful, plain, gloomy = rewards.cheerful_reply(["p"] * 3, [CHEERFUL, PLAIN, GLOOMY])
    assert 0.5 < cheerful <= 1
    assert plain == 0
    assert -1 <= gloomy < -0.5


@pytest.mark.parametrize(
    ("words", "factor"),
    [(0, 0), (1, 0), (2, 0.2), (5, 0.8), (6, 1), (25, 1), (26, 0.8), (30, 0), (400, 0)],
)
def test_length_factor(rewards: ModuleType, words: int, factor: float) -> None:
    assert rewards.length_factor(words) == pytest.approx(factor)


def test_length_cannot_be_gamed(rewards: ModuleType) -> None:
    scores = rewards.cheerful_reply(["p"] * 4, ["Happy!", "happy " * 40, "", "Horrible!"])
    assert scores[:3] == [0, 0, 0]
    assert scores[3] < 0, "a gloomy reply stays gloomy however short it is"
