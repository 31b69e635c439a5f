"""What 4 workers check for test_parallel.py: resharding, checksums and sharded layers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import product
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.common.np_dtype import bfloat16
from worker_support import results_directory

from mindrlhf.configs.keys import ModelConfig
from mindrlhf.models.qwen2.layouts import parameter_layouts
from mindrlhf.parallel.checksum import ReplicaMismatchError, checksums
from mindrlhf.parallel.collectives import CopyToGroup, GroupStack
from mindrlhf.parallel.groups import Groups, create_groups
from mindrlhf.parallel.layout import AxisName, Layout, Mesh
from mindrlhf.parallel.reshard import Resharder
from mindrlhf.parallel.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelLogProbs,
)

MESHES = (Mesh(4, 1), Mesh(2, 2), Mesh(1, 4))
KINDS: dict[str, tuple[tuple[int, ...], tuple[AxisName | None, ...]]] = {
    "rows": ((8, 12), ("mp", None)),
    "columns": ((8, 12), (None, "mp")),
    "bias": ((12,), ("mp",)),
    "replicated": ((12,), (None,)),
}
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": bfloat16}
MODEL = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    n_kv_heads=4,
    intermediate_size=24,
)

# Sizes of the sharded network.
VOCAB, VALID_VOCAB, HIDDEN, INTER, BATCH, COLUMNS = 24, 21, 8, 16, 3, 5
SQUARE_SCALE = 0.125


def slug(mesh: Mesh) -> str:
    return str(mesh).replace(" ", "")


def random_model(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    layouts = parameter_layouts(MODEL, Mesh(1, 1), score_head=True)
    return {name: rng.standard_normal(layout.shape, np.float32) for name, layout in layouts.items()}


def shards(full: dict[str, np.ndarray], layouts: dict[str, Layout], rank: int) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(layout.take(full[name], rank)) for name, layout in layouts.items()}


def check_reshard(groups: dict[Mesh, Groups], rank: int) -> Iterator[tuple[str, bool]]:
    """Every pair of meshes, kind of layout and dtype: the target shard equals the cut of the full tensor."""
    rng = np.random.default_rng(0)
    for (source_mesh, target_mesh), (dtype_name, dtype) in product(product(MESHES, MESHES), DTYPES.items()):
        source = {kind: Layout(source_mesh, shape, axes) for kind, (shape, axes) in KINDS.items()}
        target = {kind: layout.on(target_mesh) for kind, layout in source.items()}
        full = {kind: rng.standard_normal(layout.shape).astype(dtype) for kind, layout in source.items()}
        held = {name: Tensor(array) for name, array in shards(full, source, rank).items()}
        # Buckets of 100 bytes end within parameters and within rows.
        moved = dict(Resharder(source, target, rank, dtype=dtype, bucket_bytes=100).reshard(held))
        for kind, expected in shards(full, target, rank).items():
            same = moved[kind].dtype == expected.dtype and moved[kind].shape == expected.shape
            name = f"reshard/{slug(source_mesh)}-{slug(target_mesh)}/{kind}/{dtype_name}"
            yield name, bool(same and moved[kind].tobytes() == expected.tobytes())
    # Every 16-bit pattern, NaNs included, survives; so do float32 numbers of these bits.
    bits = np.arange(65536, dtype=np.uint16)
    for array in (bits.view(bfloat16).reshape(256, 256), bits.view(np.float32).reshape(256, 128)):
        layout = Layout(MESHES[2], array.shape, ("mp", None))
        resharder = Resharder({"w": layout}, {"w": layout.on(MESHES[0])}, rank, dtype=array.dtype)
        held = {"w": Tensor(np.ascontiguousarray(layout.take(array, rank)))}
        ((_, result),) = resharder.reshard(held)
        yield f"reshard/every_bit/{array.dtype}", bool(result.tobytes() == array.tobytes())


def check_group_stack(groups: dict[Mesh, Groups], rank: int) -> Iterator[tuple[str, bool]]:
    """Rows of the group in slice order; in one group alone, while the others do something else."""
    for mesh in MESHES:
        stack = GroupStack(groups[mesh])
        row = np.array([rank, -1e30, 0.1, -np.inf], np.float32)
        expected = np.stack([np.array([peer, *row[1:]], np.float32) for peer in mesh.mp_ranks(rank)])
        result = stack(Tensor(row)).asnumpy()
        yield f"stack/{slug(mesh)}", bool(np.array_equal(result, expected))
        if mesh == Mesh(2, 2) and rank < 2:
            yield "stack/one_group_alone", bool(np.array_equal(stack(Tensor(row)).asnumpy(), expected))


def check_model_reshard(groups: dict[Mesh, Groups], rank: int) -> Iterator[tuple[str, Any]]:
    """A whole model, train layout -> infer layout, shown equal by value and by checksum."""
    full = random_model(0)
    train = parameter_layouts(MODEL, Mesh(2, 2), score_head=True)
    infer = parameter_layouts(MODEL, Mesh(1, 4), score_head=True)
    held = shards(full, train, rank)
    resharder = Resharder(train, infer, rank, bucket_bytes=1000)
    parameters = {name: Tensor(array) for name, array in held.items()}
    start_time = time.perf_counter()
    moved = dict(resharder.reshard(parameters))
    yield "seconds/first_model_reshard", time.perf_counter() - start_time
    start_time = time.perf_counter()
    again = dict(resharder.reshard(parameters))
    yield "seconds/second_model_reshard", time.perf_counter() - start_time
    expected = shards(full, infer, rank)
    for label, result in (("values", moved), ("values_again", again)):
        yield f"model/{label}", all(result[name].tobytes() == expected[name].tobytes() for name in full)
    before = checksums(held.items(), train, groups[Mesh(2, 2)])
    after = checksums(moved.items(), infer, groups[Mesh(1, 4)])
    yield "model/checksums", before == after and list(before) == list(full)


def check_checksums(groups: dict[Mesh, Groups], rank: int) -> Iterator[tuple[str, Any]]:
    """Checksums of one model on every mesh, and of damaged models."""
    full = random_model(1)
    true = checksums(full.items(), parameter_layouts(MODEL, MESHES[0], score_head=True), groups[MESHES[0]])
    yield "checksum/values", [f"{value:016x}" for value in true.values()]
    names = list(full)
    split, other = "model.layers.1.feed_forward.w2.weight", "model.tok_embeddings.embedding_weight"
    for mesh in MESHES:
        layouts = parameter_layouts(MODEL, mesh, score_head=True)

        def of(model: dict[str, np.ndarray], mesh: Mesh = mesh, layouts: dict = layouts) -> dict[str, int]:
            return checksums(shards(model, layouts, rank).items(), layouts, groups[mesh])

        yield f"checksum/{slug(mesh)}/equal", of(full) == true
        changed = {name: array.copy() for name, array in full.items()}
        changed[split].view(np.uint32)[3, -1] ^= 1
        changed[other][[2, 30]] = changed[other][[30, 2]]
        seen = of(changed)
        differing = {name for name in names if seen[name] != true[name]}
        yield f"checksum/{slug(mesh)}/sees_changes", differing == {split, other}

    layouts = parameter_layouts(MODEL, Mesh(1, 4), score_head=True)
    held = shards(full, layouts, rank)
    if rank == 2:
        held["model.norm_out.weight"][0] += 1
    try:
        checksums(held.items(), layouts, groups[Mesh(1, 4)])
        yield "checksum/sees_unequal_copies", False
    except ReplicaMismatchError as fault:
        yield "checksum/sees_unequal_copies", str(fault).count(": ") == 1 and "model.norm_out" in str(fault)


class ShardedNet(nn.Cell):
    """Embedding, a gated pair of linears, and logits: every sharded layer once."""

    def __init__(self, groups: Groups) -> None:
        super().__init__()
        self.embedding = VocabParallelEmbedding(VOCAB, groups, ms.float32)
        self.copy = CopyToGroup(groups.mp_group)
        self.column = ColumnParallelLinear(ms.float32)
        self.row = RowParallelLinear(groups, ms.float32)

    def construct(
        self, ids: Tensor, x: Tensor, embedding: Tensor, up: Tensor, bias: Tensor, down: Tensor, head: Tensor
    ) -> tuple[Tensor, ...]:
        embedded = self.embedding(ids, embedding)
        inner = self.column(self.copy(embedded + x), up, bias)
        # A square, since MindSpore's tanh on CPU is off by 1e-5 and would hide what is tested here.
        hidden = self.row(inner * inner * SQUARE_SCALE, down)
        return embedded, hidden, self.column(self.copy(hidden), head)


class LogProbsOf(nn.Cell):
    """Log-probs and entropy, and the gradient of the logits from theirs."""

    def __init__(self, groups: Groups) -> None:
        super().__init__()
        self.log_probs = VocabParallelLogProbs(VOCAB, groups, valid_vocab_size=VALID_VOCAB)

    def construct(self, logits: Tensor, tokens: Tensor, w: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        return *self.log_probs(logits, tokens), self.log_probs.gradient(logits, tokens, w, u)


def net_inputs() -> dict[str, np.ndarray]:
    """Full weights and inputs of the sharded network; weights by cell name."""
    rng = np.random.default_rng(2)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    return {
        "embedding.embedding_weight": normal(VOCAB, HIDDEN),
        "up.weight": normal(INTER, HIDDEN),
        "up.bias": normal(INTER),
        "down.weight": normal(HIDDEN, INTER),
        "head.weight": normal(VOCAB, HIDDEN),
        # Repeated ids: their gradients add up. Every shard of the vocabulary is asked for.
        "ids": rng.integers(0, VOCAB, (BATCH, COLUMNS)).astype(np.int32),
        "x": normal(BATCH, COLUMNS, HIDDEN),
        "tokens": rng.integers(0, VALID_VOCAB, (BATCH, COLUMNS)).astype(np.int32),
        "g_hidden": normal(BATCH, COLUMNS, HIDDEN),
        "g_logprobs": normal(BATCH, COLUMNS),
        "g_entropy": normal(BATCH, COLUMNS),
    }


def run_sharded_net(groups: Groups) -> dict[str, np.ndarray]:
    """Outputs and gradients of the network on one mesh, weights and their gradients as local shards."""
    full = net_inputs()
    layouts = {
        "embedding.embedding_weight": Layout(groups.mesh, (VOCAB, HIDDEN), ("mp", None)),
        "up.weight": Layout(groups.mesh, (INTER, HIDDEN), ("mp", None)),
        "up.bias": Layout(groups.mesh, (INTER,), ("mp",)),
        "down.weight": Layout(groups.mesh, (HIDDEN, INTER), (None, "mp")),
        "head.weight": Layout(groups.mesh, (VOCAB, HIDDEN), ("mp", None)),
    }
    weights = [Tensor(np.ascontiguousarray(layouts[name].take(full[name], groups.rank))) for name in layouts]
    net = ShardedNet(groups)
    inputs = Tensor(full["ids"]), Tensor(full["x"].reshape(-1, HIDDEN)), *weights
    embedded, hidden, logits = net(*inputs)
    rows = [Tensor(full[name].reshape(-1)) for name in ("tokens", "g_logprobs", "g_entropy")]
    logprobs, entropy, d_logits = LogProbsOf(groups)(logits, *rows)
    # Weighted so that every element's gradient differs.
    douts = ops.zeros_like(embedded), Tensor(full["g_hidden"].reshape(-1, HIDDEN)), d_logits
    gradient = ops.GradOperation(get_all=True, sens_param=True)(net)
    _, of_x, *of_weights = gradient(*inputs, douts)
    named = {"embedded": embedded, "hidden": hidden, "logprobs": logprobs, "entropy": entropy}
    shape = (BATCH, COLUMNS)
    arrays = {
        f"out/{name}": value.asnumpy().reshape(*shape, *value.shape[1:]) for name, value in named.items()
    }
    arrays["grad/x"] = of_x.asnumpy().reshape(full["x"].shape)
    arrays |= {f"grad/{name}": value.asnumpy() for name, value in zip(layouts, of_weights, strict=True)}
    for name in layouts:
        begin = [part.start for part in layouts[name].slices(groups.rank)]
        arrays[f"begin/{name}"] = np.array(begin)
    return arrays


def check_all(rank: int) -> dict[str, Any]:
    """Name -> verdict or figure; the networks' arrays go to files beside the results."""
    results: dict[str, Any] = {}
    groups = {mesh: create_groups(mesh, rank) for mesh in MESHES}
    for check in (check_reshard, check_group_stack, check_model_reshard, check_checksums):
        begin = time.perf_counter()
        results.update(check(groups, rank))
        results[f"seconds/{check.__name__}"] = time.perf_counter() - begin
    begin = time.perf_counter()
    for mesh in MESHES:
        np.savez(results_directory() / f"net_{slug(mesh)}_rank{rank}.npz", **run_sharded_net(groups[mesh]))
    np.savez(results_directory() / f"inputs_rank{rank}.npz", **net_inputs())
    results["seconds/layers"] = time.perf_counter() - begin
    return results
