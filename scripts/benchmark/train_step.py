#!/usr/bin/env python
"""How fast one optimizer step is: GFLOP/s of backward and update against the best MatMul of the same run.

    python scripts/benchmark/train_step.py --model default

One step of the policy over (batch, prompt + response): log-probs of the responses, clipped loss, gradients
(``backward``), then norm, clipping and AdamW (``update``); ``scoring`` is the reference's forward pass.
Operations are counted as 6 x parameters x tokens (2 x in scoring), the embedding table not at all and the
output head only at the response columns, where it is used. The MatMul runs between the steps, so that other
jobs on the machine slow down both.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import BATCH, MODELS, best_matmul, model_config, random_shards

OPTIMIZER = {"type": "AdamW", "betas": [0.9, 0.95], "eps": 1e-5, "weight_decay": 0.1}
SCHEDULE = {
    "type": "CosineWithWarmUpLR", "learning_rate": 3e-6, "lr_end": 1e-7, "warmup_steps": 2, "total_steps": -1
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="default")
    parser.add_argument("--layers", type=int, default=0, help="0: the model's (default)")
    parser.add_argument("--batch", type=int, default=0, help="0: the model's (default)")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--response", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--value_head", action="store_true", help="share the backbone with a critic")
    return parser.parse_args()


@dataclass
class Case:
    """A compiled training step and its inputs."""

    step: Any
    model: Any
    batch: Any
    flops: int

    def backward(self) -> None:
        self.step.accumulate([self.batch])

    def update(self) -> None:
        self.step.update()

    def score(self) -> None:
        self.model(*self.batch.inputs)


def build(args: argparse.Namespace) -> Case:
    """The policy's training step with random weights and random sequences without padding."""
    from mindrlhf.configs.keys import ContextConfig, ParallelConfig, PPOConfig, RunConfig
    from mindrlhf.models.networks import PPOModelTrain
    from mindrlhf.models.qwen2.layouts import EMBEDDING, LM_HEAD
    from mindrlhf.parallel.groups import Groups
    from mindrlhf.parallel.layout import Mesh
    from mindrlhf.trainer.loss_cells import PolicyLoss
    from mindrlhf.trainer.optimizer import AdamW
    from mindrlhf.trainer.train_step import MicroBatch, Objective, TrainStep

    changes = {"num_layers": args.layers} if args.layers else {}
    config = model_config(args.model, **changes)
    batch, columns = args.batch or BATCH[args.model], args.prompt + args.response
    groups = Groups(Mesh(), 0)
    model = PPOModelTrain(
        config,
        groups,
        prompt_length=args.prompt,
        temperature=1.0,
        valid_vocab_size=config.vocab_size,
        value_head=args.value_head,
    )
    model.load(random_shards(model.layouts))
    loss = PolicyLoss(PPOConfig(critic="shared" if args.value_head else "none"))
    run = RunConfig(
        path=Path("-"),
        context=ContextConfig(),
        parallel=ParallelConfig(),
        model=config,
        optimizer=OPTIMIZER,
        lr_schedule=SCHEDULE,
    )
    optimizer = AdamW(run, model.store, 1000)
    step = TrainStep(Objective(model, loss), optimizer, model.layouts, groups, max_grad_norm=1.0)
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, config.vocab_size, (batch, columns)).astype(np.int32)
    positions = np.tile(np.arange(columns, dtype=np.int32), (batch, 1))
    numbers = [rng.standard_normal((batch, args.response)).astype(np.float32) for _ in range(4)]
    mask = np.ones((batch, args.response), np.float32)
    targets = (mask, *numbers[:2], np.array([1.0 / mask.sum()], np.float32))
    if args.value_head:
        targets += tuple(numbers[2:])
    head = config.vocab_size * config.hidden_size
    inner = sum(
        int(np.prod(layout.shape))
        for name, layout in model.layouts.items()
        if len(layout.shape) == 2 and name not in (EMBEDDING, LM_HEAD)
    )
    products = 2 * batch * (inner * columns + head * args.response)
    return Case(step, model, MicroBatch((tokens, np.ones_like(tokens), positions), targets), products)


def timed(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    args = parse_args()
    import mindspore as ms

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    ms.set_recursion_limit(10_000)
    matmul = best_matmul()
    case = build(args)
    score_first = timed(case.score)
    backward_first, update_first = timed(case.backward), timed(case.update)
    figures: dict[str, list[float]] = {name: [] for name in ("matmul", "backward", "update", "scoring")}
    for _ in range(args.repeats):
        figures["matmul"].append(matmul())
        figures["backward"].append(timed(case.backward))
        figures["matmul"].append(matmul())
        figures["update"].append(timed(case.update))
        figures["scoring"].append(timed(case.score))
    best = max(figures["matmul"])
    typical = statistics.median(figures["matmul"])
    steps = [a + b for a, b in zip(figures["backward"], figures["update"], strict=True)]
    print(
        f"model {args.model}, batch {args.batch or BATCH[args.model]}, {args.prompt} + {args.response} tokens"
    )
    print(f"MatMul 2048^3                best {best:6.0f}  median {typical:6.0f} GFLOP/s")
    first = f"scoring {score_first:.1f} s, backward {backward_first:.1f} s, update {update_first:.1f} s"
    print(f"first call, with compilation: {first}")
    print(f"{'':16}{'median ms':>10}{'best ms':>9}{'GFLOP/s':>9}{'of median MatMul':>18}{'of best':>9}")
    for name, times, products in (
        ("backward", figures["backward"], 3 * case.flops),
        ("update", figures["update"], 0),
        ("whole step", steps, 3 * case.flops),
        ("scoring", figures["scoring"], case.flops),
    ):
        median, least = statistics.median(times), min(times)
        rate = products / median / 1e9
        line = f"{name:16}{median * 1e3:10.1f}{least * 1e3:9.1f}"
        if products:
            line += f"{rate:9.0f}{rate / typical:18.2f}{products / least / 1e9 / best:9.2f}"
        print(line)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
