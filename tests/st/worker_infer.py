"""One job of 4 workers: generation with split models and, on rank 0, with a whole one (see test_infer.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
from worker_support import start, write_results

from mindrlhf.configs.schema import ModelConfig
from mindrlhf.models.infer import GenerationConfig, PPOModelInfer
from mindrlhf.parallel.groups import Groups, create_groups
from mindrlhf.parallel.layout import Mesh
from mindrlhf.parallel.parameters import parameter_layouts

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


def main() -> None:
    rank, _ = start()
    results: dict[str, Any] = {}
    for mesh, case in RUNS:
        results[f"{mesh} {case}"] = generate(case, mesh, create_groups(mesh, rank))
    if rank == 0:
        for case in CASES:
            results[f"whole {case}"] = generate(case, Mesh(1, 1), Groups(Mesh(1, 1), 0))
    write_results(rank, results)


if __name__ == "__main__":
    main()
