"""Rewards from the user's own code: ``--reward_fn package.module:function`` or ``file.py:function``."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import cast

import numpy as np

from mindrlhf.data.prompt_format import PromptFormat
from mindrlhf.data.tokenizer import Tokenizer
from mindrlhf.runtime.host_exchange import HostExchange
from mindrlhf.trainer.experience import Rollout
from mindrlhf.utils.errors import DataError, MindRLHFError, RewardError

RewardFunction = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
"""Prompts and responses as plain text, n of each, to n finite numbers."""


def load_reward_function(name: str) -> RewardFunction:
    """Imports ``package.module:function`` or ``path/to/file.py:function``.

    The working directory counts as a place to import from, and so does the file's.

    Raises:
        MindRLHFError: the name has another form, the module fails, or it has no such function.
    """
    place, _, function_name = name.rpartition(":")
    if not place or not function_name:
        raise MindRLHFError(
            f"--reward_fn {name!r}: write it as package.module:function or path/to/file.py:function"
        )
    path = Path(place).absolute()
    is_file = path.suffix == ".py"
    if is_file and not path.is_file():
        raise MindRLHFError(f"--reward_fn {name!r}: {path} is not a file; give the path of one")
    directory = str(path.parent if is_file else Path.cwd())
    if directory not in sys.path:
        sys.path.append(directory)
    try:
        function = getattr(_import_file(path) if is_file else importlib.import_module(place), function_name)
    except (Exception, SystemExit) as error:  # the module runs when it is imported
        hint = "; the module must be importable here" if isinstance(error, ImportError) else ""
        raise MindRLHFError(f"--reward_fn {name!r}: {_described(error)}{hint}") from error
    if not callable(function):
        raise MindRLHFError(f"--reward_fn {name!r}: {function_name} is not a function; name a function of it")
    return cast(RewardFunction, function)


def _import_file(path: Path) -> ModuleType:
    # Under a name of its own: "rewards" may be installed, or be imported already.
    spec = importlib.util.spec_from_file_location(f"reward_fn_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _described(error: BaseException) -> str:
    """The error with the innermost line of the user's own code, or else of a library that it calls."""
    own = (__file__, importlib.__file__, "<frozen ")
    places = [
        f"{frame.filename}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(own)
    ]
    library = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
    shown = [place for place in places if not place.startswith(library)] or places
    return f"{type(error).__name__}: {error}" + "".join(f" at {place}" for place in shown[-1:])


def reward_source(function: RewardFunction) -> Path | None:
    """The file that defines a reward function, or the class of one; ``None`` when that is not Python's.

    Of a decorated or partial function it is the file of the one inside.
    """
    function = inspect.unwrap(function)
    while isinstance(function, partial):
        function = inspect.unwrap(function.func)
    try:
        source = inspect.getsourcefile(function if inspect.isroutine(function) else type(function))
    except TypeError:
        return None
    return None if source is None else Path(source)


def function_scores(
    function: RewardFunction, tokenizer: Tokenizer, rollout: Rollout, exchange: HostExchange
) -> np.ndarray:
    """Scores (B,) float32 of a rollout, equal on every rank; collective.

    The main rank alone calls ``function``, so that ranks cannot diverge when it is not
    deterministic, and all ranks stop together when it fails. Of a prompt it gets the plain text of the
    user's last message; responses are cut after their stop token and are given without control tokens.

    Raises:
        RewardError: on every rank, when the function raises or returns anything other than one finite
            number per sample (the main rank's message names the sample), or its texts cannot be decoded.
    """
    count = len(rollout.tokens)
    scores, fault = np.zeros(count, np.float32), ""
    if exchange.runtime.is_main:
        try:
            scores = _call(function, *_texts(tokenizer, rollout), rollout.sample_ids)
        except RewardError as error:
            fault = str(error)
        except Exception as error:  # any failure must reach all ranks: they wait for this one in a collective
            fault = (
                f"--reward_fn gave no scores: {_described(error)}; check --tokenizer_path and what it returns"
            )
    packet = exchange.every_rank(np.append(scores, np.float32(bool(fault))).astype(np.float32))[0]
    if packet[-1]:
        raise RewardError(fault or "--reward_fn failed on rank 0; its log names the sample")
    return packet[:-1].astype(np.float32)


def _texts(tokenizer: Tokenizer, rollout: Rollout) -> tuple[list[str], list[str]]:
    try:
        form = PromptFormat(tokenizer)
    except DataError:  # chats cannot be made with this tokenizer, so the prompts are none
        form = PromptFormat(tokenizer, chat_template=False)
    columns = rollout.prompt_columns
    prompts, responses = [], []
    for row, tokens in enumerate(rollout.tokens.tolist()):
        first, last = columns - rollout.prompt_lengths[row], columns + rollout.response_lengths[row]
        prompts.append(form.last_message(tokens[first:columns]))
        responses.append(tokenizer.decode(tokens[columns:last], skip_special=True))
    return prompts, responses


def _call(
    function: RewardFunction, prompts: list[str], responses: list[str], sample_ids: np.ndarray
) -> np.ndarray:
    """The function's scores (B,) float32.

    Raises:
        RewardError: as :func:`function_scores`.
    """
    scores = np.zeros(len(prompts), np.float32)
    try:
        result = cast("Iterable[object] | None", function(prompts, responses))
        returned = None if result is None else list(result)
    except (Exception, SystemExit) as error:
        raise RewardError(_find_failing_sample(function, prompts, responses, sample_ids, error)) from error
    remedy = "return a number for every sample, such as 0.0 where none applies"
    if returned is None:
        raise RewardError(f"--reward_fn returned None for all samples; {remedy}")
    if len(returned) != len(prompts):
        raise RewardError(f"--reward_fn returned {len(returned)} numbers for {len(prompts)} samples")
    for row, score in enumerate(returned):
        try:
            with np.errstate(over="ignore"):  # a number beyond float32 is refused as infinite
                scores[row] = float(cast(float, score))
        except (TypeError, ValueError):
            scores[row] = np.nan
        if not np.isfinite(scores[row]):
            raise RewardError(
                f"--reward_fn returned {score} for sample {sample_ids[row]}, response {responses[row]!r}: "
                f"not a finite float32; {remedy}"
            )
    return scores


def _find_failing_sample(
    function: RewardFunction,
    prompts: list[str],
    responses: list[str],
    sample_ids: np.ndarray,
    error: BaseException,
) -> str:
    """Finds the sample that makes the function raise by giving it one at a time."""
    for prompt, response, sample_id in zip(prompts, responses, sample_ids, strict=True):
        try:
            list(function([prompt], [response]))
        except (Exception, SystemExit) as own:
            return f"--reward_fn raised {_described(own)} for sample {sample_id}, response {response!r}"
    return f"--reward_fn raised {_described(error)} (for the whole batch, for no single sample)"
