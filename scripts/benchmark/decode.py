#!/usr/bin/env python
"""How fast PPOModelInfer generates: ms per decode step, tokens per second, share of the memory bandwidth.

A decode step reads every weight once, so its floor is their size in float32 over the memory bandwidth, which
is measured here too (a copy by as many threads as there are cores). The KV cache, which it also reads, is not
counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
from common import MODELS, copy_bandwidth

from mindrlhf.configs.keys import ModelConfig


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for name, default in {
        "hidden": 512,
        "layers": 8,
        "heads": 8,
        "kv_heads": 2,
        "intermediate": 1408,
        "vocab": 8192,
        "batch": 16,
        "prompt": 64,
        "response": 64,
        "steps_per_call": 8,
        "repeats": 5,
        "top_k": 0,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=" ")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="operands of products"
    )
    parser.add_argument("--top_p", type=float, default=1.0, help=" ")
    parser.add_argument(
        "--greedy", action="store_true", help="take the most likely token instead of sampling"
    )
    parser.add_argument("--tied", action="store_true", help="tie the embeddings")
    parser.add_argument("--model", choices=MODELS, help="sizes by name; they replace the six flags of sizes")
    return parser.parse_args()


def build(args: argparse.Namespace, config: ModelConfig) -> tuple[Any, int]:
    """A loaded model and the bytes of its weights that a decode step reads."""
    from mindrlhf.models.generator import GenerationConfig, PPOModelInfer
    from mindrlhf.models.qwen2.layouts import EMBEDDING, parameter_layouts
    from mindrlhf.parallel.groups import Groups
    from mindrlhf.parallel.layout import Mesh

    mesh = Mesh(1, 1)
    generation = GenerationConfig(
        max_prompt_length=args.prompt,
        max_response_length=args.response,
        do_sample=not args.greedy,
        top_k=args.top_k,
        top_p=args.top_p,
        valid_vocab_size=config.vocab_size,
    )
    model = PPOModelInfer(
        config,
        Groups(mesh, 0),
        generation,
        batch_size=args.batch,
        decode_steps_per_call=args.steps_per_call,
    )
    rng = np.random.default_rng(0)
    shards = {
        name: rng.standard_normal(layout.shape, np.float32) * np.float32(0.02)
        for name, layout in parameter_layouts(config, mesh).items()
    }
    model.load(shards)
    read = sum(
        array.nbytes for name, array in shards.items() if config.tie_word_embeddings or name != EMBEDDING
    )
    return model, read


def main() -> None:
    args = parse_args()
    import mindspore as ms

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    ms.set_recursion_limit(10_000)
    sizes = MODELS.get(args.model) or {
        "vocab_size": args.vocab,
        "hidden_size": args.hidden,
        "num_layers": args.layers,
        "num_heads": args.heads,
        "n_kv_heads": args.kv_heads,
        "intermediate_size": args.intermediate,
        "tie_word_embeddings": args.tied,
    }
    config = ModelConfig(**sizes, matmul_dtype=args.dtype)
    model, weight_bytes = build(args, config)
    rng = np.random.default_rng(1)
    ids = rng.integers(0, config.vocab_size, (args.batch, args.prompt))
    lengths = np.full(args.batch, args.prompt)
    uniforms = rng.random((args.batch, args.response)).astype(np.float32)

    start = time.perf_counter()
    model.generate(ids, lengths, uniforms)
    print(f"first call, with compilation  {time.perf_counter() - start:8.2f} s")
    prefill, decode, whole = [], [], []
    for _ in range(args.repeats):
        model.timer.reset()
        start = time.perf_counter()
        model.generate(ids, lengths, uniforms)
        whole.append(time.perf_counter() - start)
        prefill.append(model.timer.seconds["prefill"])
        decode.append(model.timer.seconds["decode"])
    steps = -(-(args.response - 1) // args.steps_per_call) * args.steps_per_call
    bandwidth = copy_bandwidth()
    floor = weight_bytes / bandwidth * 1e3
    for name, pick in (("best", min), ("median", statistics.median)):
        step = pick(decode) / steps * 1e3
        print(f"{name} of {args.repeats}:")
        print(f"  prefill                     {pick(prefill) * 1e3:8.1f} ms")
        print(f"  decode step                 {step:8.2f} ms")
        print(f"  tokens per second, all phases {args.batch * args.response / pick(whole):8.0f}")
        print(f"  share of memory bandwidth   {floor / step:8.2f}")
    print(f"a step reads {weight_bytes / 1e6:.0f} MB of weights; a copy moves {bandwidth / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
