"""What 4 workers generate for test_infer.py, with split models and, on rank 0, with a whole one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from mindrlhf.chat.reply_generator import ReplyGenerator
from mindrlhf.chat.worker_group import WorkerGroup
from mindrlhf.configs.flags import ChatOptions
from mindrlhf.configs.keys import ModelConfig
from mindrlhf.data.tokenizer import SpecialIds
from mindrlhf.models.generator import GenerationConfig, PPOModelInfer
from mindrlhf.models.qwen2.layouts import parameter_layouts
from mindrlhf.parallel.groups import Groups, create_groups
from mindrlhf.parallel.layout import Mesh
from mindrlhf.runtime.device import Runtime
from mindrlhf.runtime.host_exchange import HostExchange

ROWS, PROMPT, RESPONSE = 8, 5, 6
VOCAB, VALID = 64, 47  # with mp 4, the last rank holds nothing but padding of the vocabulary
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"temperature": 0.8, "stop_token_ids": (3, 19, 40)},
    "truncated": {"top_k": 9, "top_p": 0.8},
}
RUNS = [*((Mesh(1, 4), case) for case in CASES), (Mesh(2, 2), "sampled"), (Mesh(2, 2), "greedy")]


def model_config(case: str) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_layers=1,
        num_heads=8,
        n_kv_heads=4,
        intermediate_size=48,
        theta=10_000.0,
        tie_word_embeddings=case == "sampled",
    )


def generate(case: str, mesh: Mesh, groups: Groups) -> dict[str, Any]:
    """What this rank's model gives for its replica's rows, and whether it returns the shards it was given."""
    config = model_config(case)
    rng = np.random.default_rng(17)
    shards = {}
    for name, layout in parameter_layouts(config, mesh).items():
        full = rng.standard_normal(layout.shape) * (1.0 if "embedding" in name else 0.25)
        shards[name] = layout.take(full.astype(np.float32), groups.rank)
    ids = rng.integers(0, VALID, (ROWS, PROMPT))
    lengths = np.resize([5, 1, 3], ROWS)
    uniforms = rng.random((ROWS, RESPONSE)).astype(np.float32)
    rows = slice(groups.dp_index * ROWS // mesh.dp, (groups.dp_index + 1) * ROWS // mesh.dp)
    options = GenerationConfig(
        max_prompt_length=PROMPT, max_response_length=RESPONSE, valid_vocab_size=VALID, **CASES[case]
    )
    model = PPOModelInfer(
        config,
        groups,
        options,
        batch_size=ROWS // mesh.dp,
        decode_steps_per_call=1 if case == "truncated" else 2,
    )
    model.load(shards)
    output = model.generate(ids[rows], lengths[rows], uniforms[rows])
    returned = dict(model.shards())
    return {
        "tokens": output.response_ids.tolist(),
        "logprobs": output.logprobs.tolist(),
        "lengths": output.lengths.tolist(),
        "shards_equal": list(returned) == list(shards)
        and all(np.array_equal(returned[name], shards[name]) for name in shards),
    }


def chat(groups: Groups, runtime: Runtime) -> list[int]:
    """Rank 0 asks all workers, with a pause between two messages; the others only serve."""
    config = model_config("greedy")
    rng = np.random.default_rng(23)
    full = {
        name: (rng.standard_normal(layout.shape) / 3).astype(np.float32)
        for name, layout in parameter_layouts(config, Mesh(1, 1)).items()
    }
    tokenizer = SimpleNamespace(size=VALID, special=SpecialIds(end_of_text=VALID - 1, pad=VALID - 1))

    def shards(mesh: Mesh, rank: int) -> list[tuple[str, np.ndarray]]:
        layouts = parameter_layouts(config, mesh)
        return [(name, layout.take(full[name], rank)) for name, layout in layouts.items()]

    saved: Any = SimpleNamespace(
        name="random", sizes=SimpleNamespace(model=config), tokenizer=tokenizer, shards=shards
    )
    options = ChatOptions(checkpoint=Path(), max_tokens=RESPONSE, temperature=1.0, top_p=1.0)
    generator = ReplyGenerator(saved, groups, options, [VALID - 1], notice=lambda text: None)
    workers = WorkerGroup([generator], HostExchange(runtime), seed=5)
    if not runtime.is_main:
        workers.serve()
        return []
    said = []
    for number in (1, 2):
        workers.keep_alive()
        prompt = rng.integers(0, VALID - 1, 30).tolist()
        said += [int(token) for _, ids in workers.generate([[prompt]], [number]) for token in ids[0]]
    workers.end()
    return said


def generate_all(rank: int, size: int) -> dict[str, Any]:
    """Name of a run -> what it gave."""
    results: dict[str, Any] = {}
    for mesh, case in RUNS:
        results[f"{mesh} {case}"] = generate(case, mesh, create_groups(mesh, rank))
    results["chat"] = chat(create_groups(Mesh(1, 4), rank), Runtime(rank, size))
    if rank == 0:
        results["whole chat"] = chat(Groups(Mesh(1, 1), 0), Runtime(0, 1))
        for case in CASES:
            results[f"whole {case}"] = generate(case, Mesh(1, 1), Groups(Mesh(1, 1), 0))
    return results
