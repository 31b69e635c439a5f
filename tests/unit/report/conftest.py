"""Runs as they lie on disk, made up."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindrlhf.report.run_data import Series

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
QUESTIONS = (
    "How do I learn to swim as an adult?",
    "为什么要游泳？",
    "Write a short thank-you note to a neighbour who watered my plants.",
    "怎样骑车上班又安全又省力？请给出三条建议。",
    "Explain in two sentences why the sky is blue.",
    "我和同事吵架了，应该怎么道歉？",
)
REPLIES = (
    "Start in shallow water with a coach, practise breathing out under water, and go twice a week.",
    "游泳对心肺好，也不伤关节。每周两到三次，每次半小时就够了。",
    "Sure! Sure! Sure! Here is is the the note note: thank thank you you",
    "1. 戴头盔，检查刹车。\n2. 避开高峰期的主干道。\n3. 车座调到脚能伸直的高度。",
    "Air scatters short blue waves of sunlight more than long red ones. So the sky looks blue.",
)


def prompt_of(question: str) -> str:
    """A question in ChatML, as the prompts of a run are."""
    return f"{SYSTEM}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """A JSON-lines file."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")


def plain_line(iteration: int, **metrics: float) -> dict[str, Any]:
    """A line of metrics.jsonl with what every run has."""
    return {"iteration": iteration, "objective/scores": 0.5, "objective/kl": 1.0, **metrics}


def synthetic_metrics(iterations: int, seed: int = 0, speed: float = 1.0) -> list[dict[str, Any]]:
    """Metrics of a run that learns: scores rise, KL grows past its target, entropy falls."""
    random = np.random.default_rng(seed)
    lines = []
    for iteration in range(1, iterations + 1):
        part = iteration / iterations
        noise = random.normal(size=20)
        rollout, score, train, sync = 3.1, 0.45, 4.2 + 0.1 * noise[0], 0.35
        if iteration == 1:
            rollout, score, train = 26.0, 22.0, 61.0
        total = rollout + score + train + sync + 0.2
        length = 64 - 20 * part + 2 * noise[1]
        kl = 9.5 * speed * part**0.8 + 0.3 * noise[2] * part
        value = {
            "iteration": iteration,
            "episode": iteration * 64,
            "epoch": iteration // 40,
            "objective/kl": kl,
            "objective/kl_coef": 0.02 + 0.03 * part**2,
            "objective/entropy": length * (2.6 - 1.3 * part),
            "objective/non_score_reward": -0.02 * kl,
            "objective/scores": -0.6 + 2.1 * (1 - np.exp(-3 * speed * part)) + 0.14 * noise[3],
            "objective/scores_std": 0.9 - 0.3 * part + 0.04 * noise[4],
            "objective/rlhf_reward": -0.6 + 1.9 * (1 - np.exp(-3 * speed * part)) + 0.14 * noise[3],
            "value/explained_var": 0.8 * (1 - 2.2 * np.exp(-12 * part)) + 0.05 * noise[5],
            "response/length": length,
            "response/eos_rate": float(np.clip(0.35 + 0.6 * part + 0.05 * noise[6], 0, 1)),
            "policy/approxkl": 0.006 + 0.01 * part + 0.001 * noise[7],
            "policy/clipfrac": float(np.clip(0.06 + 0.31 * part**2 + 0.015 * noise[8], 0, 1)),
            "policy/entropy": 2.6 - 1.3 * part + 0.05 * noise[9],
            "policy/ratio": 1 + 0.002 * noise[10],
            "policy/ratio_var": 0.02 + 0.004 * noise[11] ** 2,
            "loss/policy": -0.012 + 0.004 * noise[12],
            "loss/value": 0.6 * np.exp(-5 * part) + 0.08 + 0.01 * noise[13],
            "loss/pretrain": 0.0,
            "loss/total": 0.1 * np.exp(-5 * part) + 0.004 * noise[12],
            "value/clipfrac": 0.2 * np.exp(-4 * part),
            "value/error": 1.1 * np.exp(-5 * part) + 0.15,
            "value/mean": 1.3 * (1 - np.exp(-4 * part)),
            "lr": 1e-6 * (1 - part),
            "grad_norm": 0.9 + 0.5 * part + 0.1 * noise[14] + (6 if iteration % 97 == 0 else 0),
            "grad_norm/critic": 2.0 * np.exp(-3 * part) + 0.4 + 0.05 * noise[15],
            "time/rollout": rollout,
            "time/score": score,
            "time/train": train,
            "time/sync": sync,
            "time/iteration": total,
            "tokens_per_second": 64 * length / total,
            "tokens_per_second/rollout": 64 * length / rollout,
        }
        lines.append({name: float(number) if "/" in name else number for name, number in value.items()})
    return lines


def synthetic_samples(iterations: int, each: int = 2, seed: int = 0, length: int = 1) -> list[dict[str, Any]]:
    """Sampled replies, ``length`` times as long as one of a few sentences."""
    random = np.random.default_rng(seed)
    return [
        {
            "iteration": iteration,
            "sample_id": int(random.integers(400)),
            "prompt": prompt_of(QUESTIONS[int(random.integers(len(QUESTIONS)))]),
            "response": " ".join([REPLIES[int(random.integers(len(REPLIES)))]] * length) + "<|im_end|>",
            "score": float(random.normal() + 1.5 * iteration / iterations),
            "kl": float(9 * iteration / iterations + random.normal()),
        }
        for iteration in range(1, iterations + 1)
        for _ in range(each)
    ]


def synthetic_evaluations(iterations: int, every: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Lines of evaluations.jsonl and eval_samples.jsonl, the first before training."""
    lines, samples = [], []
    for iteration in range(0, iterations + 1, every):
        part = iteration / iterations
        lines.append(
            {
                "iteration": iteration,
                "eval/scores": -0.5 + 1.6 * part,
                "eval/scores_std": 0.8,
                "eval/kl": 7.0 * part,
                "eval/length": 62 - 18 * part,
                "eval/eos_rate": 0.4 + 0.5 * part,
                "prompts": 64,
                "prompts_digest": "abc",
                "seconds": 5.0,
            }
        )
        for number, question in enumerate(QUESTIONS):
            samples.append(
                {
                    "iteration": iteration,
                    "sample_id": number,
                    "prompt": prompt_of(question),
                    "response": REPLIES[2] if part < 0.5 else REPLIES[(number + 3) % 5],
                    "score": -0.5 + 1.6 * part + 0.3 * ((number * 7) % 5 - 2),
                    "kl": 7.0 * part,
                    "length": 40,
                    "stopped": True,
                }
            )
    return lines, samples


def stage_lines(held_out: Sequence[float], every: int = 2, **more: float) -> list[dict[str, Any]]:
    """Metrics of SFT with an evaluation before training and every ``every`` steps."""
    lines: list[dict[str, Any]] = [{"step": 0, "epoch": 0.0, "eval/loss": held_out[0]}]
    for step in range(1, every * (len(held_out) - 1) + 1):
        line = {
            "step": step, "epoch": step / 4, "loss/train": 3.0 / step, "lr": 1e-5, "grad_norm": 2.0,
            "update/skipped": 0.0, "time/step": 0.5, "tokens_per_second": 100.0, **more,
        }  # fmt: skip
        if step % every == 0:
            line["eval/loss"] = held_out[step // every]
        lines.append(line)
    return lines


def split_stage_lines(
    lines: Sequence[Mapping[str, Any]],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Lines of :func:`stage_lines` -> those of ``metrics.jsonl``, and those of ``evaluations.jsonl``."""
    held_out = [
        {name: line[name] for name in line if name == "step" or name.startswith("eval/")} for line in lines
    ]
    trained = [{name: line[name] for name in line if not name.startswith("eval/")} for line in lines]
    return [line for line in trained if line["step"]], [line for line in held_out if len(line) > 1]


def reward_lines(accuracy: float) -> list[dict[str, Any]]:
    """Metrics of a reward model with three evaluations."""
    lines = stage_lines([0.7, 0.6, 0.5], **{"train/accuracy": 0.8, "train/margin": 1.5})
    for line in lines:
        if "eval/loss" in line:
            line |= {
                "eval/accuracy": accuracy,
                "eval/margin": 0.4,
                "eval/scores": -0.2,
                "eval/scores_std": 2.0,
            }
    return lines


def stage_config(stage: str, held_out: int = 100) -> dict[str, Any]:
    """config.json of SFT or of a reward model."""
    return {
        "created": "2026-11-23T07:30:15+00:00",
        "machine": {"cpu_count": 2},
        "configuration": {
            "stage": stage,
            "options": {"seed": 1, "learning_rate": 1e-5},
            "plan": {"epochs": 3, "config": {"optimizer": {"type": "AdamW"}}},
            "rows": {"train": 900, "held_out": held_out},
        },
    }


def series(values: Sequence[float], first: int = 1, step: int = 1) -> Series:
    """Values of the iterations ``first, first + step, ...``."""
    return Series(np.arange(first, first + step * len(values), step), np.array(values, dtype=np.float64))


CONFIG: dict[str, Any] = {
    "created": "2026-11-23T01:30:15+00:00",
    "versions": {"mindrlhf": "0.1.0", "python": "3.11.7", "mindspore": "2.9.0", "numpy": "1.26.4"},
    "git": {"revision": "5b9308fa6a9f865db60b6ffe30ea43501dfad7ee", "modified": True},
    "machine": {"system": "Linux 6.1", "processor": "AMD EPYC", "cpu_count": 2, "memory_bytes": 25276502016},
    "configuration": {
        "ppo": {
            "seed": 1, "total_iterations": 300, "rollout_batch_size": 64, "ppo_epochs": 2,
            "num_minibatches": 4,
            "max_prompt_length": 128, "max_response_length": 96, "kl_controller": "adaptive", "kl_coef": 0.02,
            "kl_target": 6.0, "kl_horizon": 10000,
            "gamma": 1.0, "lam": 0.95, "cliprange": 0.2, "vf_coef": 0.1,
            "stop_token_ids": [1023, 1021], "temperature": 1.0, "critic": "separate",
        },
        "train": {
            "path": "model_configs/qwen_ppo/finetune_qwen2_0_5b.yaml",
            "parallel": {"data_parallel": 2, "model_parallel": 2},
            "model": {"vocab_size": 151936, "hidden_size": 896, "num_layers": 24, "num_heads": 14},
            "optimizer": {"type": "AdamW", "learning_rate": 1e-6},
        },
    },
}  # fmt: skip


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run's files and returns its directory; what is ``None`` is not written."""

    def write(
        name: str = "run",
        *,
        metrics: Sequence[Mapping[str, Any]] | None = None,
        samples: Sequence[Mapping[str, Any]] | None = None,
        evaluations: Sequence[Mapping[str, Any]] | None = None,
        eval_samples: Sequence[Mapping[str, Any]] | None = None,
        config: Mapping[str, Any] | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> Path:
        directory = tmp_path / name
        directory.mkdir(parents=True)
        lines = [plain_line(1), plain_line(2)] if metrics is None else metrics
        if any("step" in line and "iteration" not in line for line in lines):
            lines, evaluations = split_stage_lines(lines)
        write_lines(directory / "metrics.jsonl", lines)
        for file, content in (
            ("samples.jsonl", samples),
            ("evaluations.jsonl", evaluations),
            ("eval_samples.jsonl", eval_samples),
        ):
            if content is not None:
                write_lines(directory / file, content)
        if config is not None:
            (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
        if state is not None:
            checkpoint = directory / f"iteration_{lines[-1]['iteration']:06d}"
            checkpoint.mkdir()
            (checkpoint / "state.json").write_text(json.dumps(state), encoding="utf-8")
        return directory

    return write


@pytest.fixture
def whole_run(make_run: Callable[..., Path]) -> Path:
    """A run that has everything."""
    evaluations, eval_samples = synthetic_evaluations(60, 20)
    return make_run(
        "whole",
        metrics=synthetic_metrics(60),
        samples=synthetic_samples(60),
        evaluations=evaluations,
        eval_samples=eval_samples,
        config=CONFIG,
        state={"iteration": 60, "kl_controller": {"kl_coef": 0.05}},
    )
