"""Scores of the SFT model with mean 0 and standard deviation 1, folded into the head.

A gain and a bias after the head, ``gain * r + bias``, as in Ziegler et al., arXiv 1909.08593, section 2.2;
here they become part of the head's own weight and bias, so nothing else has to know about them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mindrlhf.configs.flags import RewardOptions
from mindrlhf.configs.keys import StagePlan
from mindrlhf.data.prompts import PromptBatch
from mindrlhf.data.sequences import Sequences
from mindrlhf.models.generator import GenerationConfig, PPOModelInfer
from mindrlhf.models.networks import RewardModel
from mindrlhf.models.score_head import SCORE_HEAD
from mindrlhf.trainer.builder import load_shards
from mindrlhf.trainer.recipes.supervised import StageRows, stage_groups
from mindrlhf.trainer.rollout import generate_rollout
from mindrlhf.trainer.run import Run
from mindrlhf.utils.errors import ConfigError
from mindrlhf.utils.files import atomic_file
from mindrlhf.utils.logging import get_logger
from mindrlhf.utils.seeds import random_stream
from mindrlhf.utils.timers import Timer

logger = get_logger(__name__)

REPORT_FILE = "reward_model.json"
GENERATED_AT_ONCE = 32
"""Maximum rows of a generate call on one rank."""


@dataclass(frozen=True)
class Calibration:
    """What was folded into the head, and the scores it was computed from.

    Attributes:
        source: "sft" for sampled responses, "data" for the data set's preferred ones.
        samples: how many.
        gain, bias: of ``gain * score + bias``.
        mean_before, std_before, mean_after, std_after: of the scores.
    """

    source: str
    samples: int
    gain: float
    bias: float
    mean_before: float
    std_before: float
    mean_after: float
    std_after: float


def gain_and_bias(scores: np.ndarray) -> tuple[float, float]:
    """``gain = 1 / std``, ``bias = -mean / std``, which give ``scores`` (n,) mean 0 and standard deviation 1.

    Scores that are all equal have no spread to scale: they are only shifted.
    """
    wide = scores.astype(np.float64)
    mean, std = float(wide.mean()), float(wide.std())
    if std <= 1e-6 * max(1.0, abs(mean)):
        logger.warning("all %d scores are about %g: they are shifted to 0, not scaled", len(wide), mean)
        return 1.0, -mean
    return 1.0 / std, -mean / std


def fold(model: RewardModel, gain: float, bias: float) -> None:
    """Makes every score ``gain * score + bias``, by the head's weight and bias; the same on every rank."""
    shards = dict(model.shards())
    weight_name, bias_name = SCORE_HEAD
    weight, offset = (shards[name].astype(np.float64) for name in (weight_name, bias_name))
    shards[weight_name] = (gain * weight).astype(np.float32)
    shards[bias_name] = (gain * offset + bias).astype(np.float32)
    model.load(shards)


def calibrate(
    model: RewardModel,
    score: Callable[[Sequences], np.ndarray],
    responses: Sequences,
    options: RewardOptions,
) -> Calibration:
    """Folds gain and bias into the head such that ``responses`` score mean 0 and standard deviation 1.

    Args:
        model: the trained reward model.
        score: gives the scores (n,) of sequences; collective, equal on every rank.
        responses: n sequences.
        options: say where the responses come from.
    """
    before = score(responses).astype(np.float64)
    gain, bias = gain_and_bias(before)
    fold(model, gain, bias)
    after = score(responses).astype(np.float64)
    numbers = [float(value) for value in (before.mean(), before.std(), after.mean(), after.std())]
    logger.info(
        "scores of %d responses (%s): mean %+.4f, std %.4f; after gain %.5g and bias %+.5g: %+.4f, %.4f",
        len(before), options.calibrate, *numbers[:2], gain, bias, *numbers[2:],
    )  # fmt: skip
    return Calibration(options.calibrate, len(before), gain, bias, *numbers)


def responses_to_calibrate(
    options: RewardOptions, plan: StagePlan, rows: StageRows, run: Run
) -> Sequences | None:
    """The responses whose scores are to have mean 0 and standard deviation 1, ``None`` for none; collective.

    Raises:
        ConfigError: the model has no positions for responses as long as asked for.
    """
    if options.calibrate == "off":
        return None
    # Drawn without repetition as long as there are enough.
    count = min(options.calibration_samples, len(rows.train))
    numbers = random_stream("calibration", options.seed).permutation(rows.train)[:count]
    if options.calibrate == "data":
        return rows.data.read(numbers)
    _check_sampling(options, plan, rows)
    with run.timer.phase("calibrate"):
        return _sft_responses(options, plan, rows, run, numbers)


def _check_sampling(options: RewardOptions, plan: StagePlan, rows: StageRows) -> None:
    """Refuses a response length that the model has no positions for."""
    room = plan.config.model.seq_length - rows.data.prompt_columns
    if max(1, options.max_response_length) > room:
        raise ConfigError(
            [
                f"--max_response_length: {options.max_response_length}, but behind prompts of "
                f"{rows.data.prompt_columns} tokens seq_length leaves {room} - make it smaller, or pass "
                "--calibrate data"
            ]
        )


def _sft_responses(
    options: RewardOptions, plan: StagePlan, stage_rows: StageRows, run: Run, rows: np.ndarray
) -> Sequences:
    """Responses that the SFT model samples at temperature 1 for some training prompts; collective."""
    data, config = stage_rows.data, plan.config
    room = config.model.seq_length - data.prompt_columns
    length = options.max_response_length or min(data.response_columns, room)
    groups = stage_groups(run, plan)
    dp = groups.mesh.dp
    at_once = min(GENERATED_AT_ONCE, -(-len(rows) // dp))
    unit = dp * at_once
    filled = np.resize(rows, -(-len(rows) // unit) * unit)  # every call has the same number of rows
    model = PPOModelInfer(
        config.generator_model,
        groups,
        GenerationConfig(
            max_prompt_length=data.prompt_columns,
            max_response_length=length,
            stop_token_ids=config.model.eos_token_id,
            pad_token_id=config.model.pad_token_id,
            valid_vocab_size=options.valid_vocab_size or config.model.vocab_size,
        ),
        batch_size=at_once,
    )
    model.load(load_shards(options.load_sft_checkpoint, model, "sampling policy"))
    prompts = data.read(filled)
    batch = PromptBatch(prompts.tokens[:, : data.prompt_columns], prompts.prompt_lengths, filled)
    with Timer() as timer:
        rollout = generate_rollout(
            model, batch, run.exchange, seed=options.seed, iteration=0, on_tokens=run.timer.advance
        )
    logger.info(
        "%d responses sampled from %s for the calibration in %.1f s: mean length %.1f, stop rate %.2f",
        len(rows),
        options.load_sft_checkpoint,
        timer.seconds,
        rollout.response_lengths[: len(rows)].mean(),
        rollout.stopped[: len(rows)].mean(),
    )
    # As wide as the data set's rows, so that one graph of the reward model serves both.
    columns = data.prompt_columns + max(length, data.response_columns)
    tokens = np.full((len(rows), columns), config.model.pad_token_id, np.int32)
    tokens[:, : rollout.tokens.shape[1]] = rollout.tokens[: len(rows)]
    return Sequences(tokens, rollout.prompt_lengths[: len(rows)], rollout.response_lengths[: len(rows)])


def write_report(
    directory: Path, evaluations: Sequence[Mapping[str, Any]], calibration: Calibration | None
) -> None:
    """``reward_model.json``: the evaluations before and after training, and the calibration."""
    shown = [
        {name: value for name, value in line.items() if name == "step" or name.startswith("eval/")}
        for line in evaluations
    ]
    report = {
        "before": shown[0] if shown else None,
        "after": shown[-1] if shown else None,
        "calibration": None if calibration is None else asdict(calibration),
    }
    with atomic_file(directory / REPORT_FILE) as file:
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
