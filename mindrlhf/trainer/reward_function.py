"""Rewards from the user's own code: ``--reward_fn package.module:function``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import numpy as np

from mindrlhf.data.tokenizer import Tokenizer
from mindrlhf.runtime.host_exchange import HostExchange
from mindrlhf.trainer.experience import Rollout
from mindrlhf.utils.errors import MindRLHFError, RewardError

RewardFunction = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
"""Prompts and responses as text, n of each, to n finite numbers."""


def load_reward_function(name: str) -> RewardFunction:
    """Imports ``package.module:function``; the working directory counts as a place to import from.

    Raises:
        MindRLHFError: the name has another form, or the module or function does not exist.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise MindRLHFError(f"--reward_fn {name!r}: write it as package.module:function")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise MindRLHFError(f"--reward_fn {name!r}: {error}; the module must be importable here") from error
    if not callable(function):
        raise MindRLHFError(f"--reward_fn {name!r}: {function_name} is not a function; name a function of it")
    return cast(RewardFunction, function)


def function_scores(
    function: RewardFunction, tokenizer: Tokenizer, rollout: Rollout, exchange: HostExchange
) -> np.ndarray:
    """Scores (B,) float32 of a rollout, equal on every rank; collective.

    The main rank alone calls ``function``, so that ranks cannot diverge when it is not
    deterministic, and all ranks stop together when it fails. Prompts keep their chat markup; responses are
    cut after their stop token and are given without control tokens.

    Raises:
        RewardError: on every rank, when the function raises or returns anything other than one finite
            number per sample; the main rank's message names the sample.
    """
    count = len(rollout.tokens)
    scores, fault = np.zeros(count, np.float32), ""
    if exchange.runtime.is_main:
        scores, fault = _call(function, *_texts(tokenizer, rollout), rollout.sample_ids)
    packet = exchange.every_rank(np.append(scores, np.float32(bool(fault))).astype(np.float32))[0]
    if packet[-1]:
        raise RewardError(fault or "--reward_fn failed on rank 0; its log names the sample")
    return packet[:-1].astype(np.float32)


def _texts(tokenizer: Tokenizer, rollout: Rollout) -> tuple[list[str], list[str]]:
    columns = rollout.tokens.shape[1] - rollout.logprobs.shape[1]
    prompts, responses = [], []
    for row, tokens in enumerate(rollout.tokens):
        first, last = columns - rollout.prompt_lengths[row], columns + rollout.response_lengths[row]
        prompts.append(tokenizer.decode(tokens[first:columns].tolist()))
        responses.append(tokenizer.decode(tokens[columns:last].tolist(), skip_special=True))
    return prompts, responses


def _call(
    function: RewardFunction, prompts: list[str], responses: list[str], sample_ids: np.ndarray
) -> tuple[np.ndarray, str]:
    """Scores and an empty string, or zeros and what went wrong."""
    nothing = np.zeros(len(prompts), np.float32)
    try:
        returned = [float(score) for score in function(prompts, responses)]
    except Exception as error:
        # Any failure of foreign code must reach all ranks; they would wait for this one in a collective.
        return nothing, _find_failing_sample(function, prompts, responses, sample_ids, error)
    if len(returned) != len(prompts):
        return nothing, f"--reward_fn returned {len(returned)} numbers for {len(prompts)} samples"
    with np.errstate(over="ignore"):  # a number beyond float32 is refused below
        scores = np.array(returned, np.float32)
    for score, original, sample_id, response in zip(scores, returned, sample_ids, responses, strict=True):
        if not np.isfinite(score):
            fault = f"{original} for sample {sample_id}, response {response!r}: not a finite float32"
            return nothing, f"--reward_fn returned {fault}"
    return scores, ""


def _find_failing_sample(
    function: RewardFunction,
    prompts: list[str],
    responses: list[str],
    sample_ids: np.ndarray,
    error: Exception,
) -> str:
    """Finds the sample that makes the function raise by giving it one at a time."""
    for prompt, response, sample_id in zip(prompts, responses, sample_ids, strict=True):
        try:
            function([prompt], [response])
        except Exception as own:
            fault = f"{type(own).__name__}: {own}"
            return f"--reward_fn raised {fault} for sample {sample_id}, response {response!r}"
    return f"--reward_fn raised {type(error).__name__}: {error} (for the whole batch, for no single sample)"
