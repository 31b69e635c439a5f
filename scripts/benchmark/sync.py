#!/usr/bin/env python
"""What the weight sync train -> infer moves: bytes for pairs of layouts, and the time in one process.

    python scripts/benchmark/sync.py [--model default] [--world 4]

For each pair (train layout -> infer layout) over --world ranks, all ranks together, in MB:

  needed    bytes of the ranks' infer slices that lie outside their own train slices: no scheme receives less
  moved     what Resharder's plan sends, the filling of its last buckets included
  AllGather what gathering in the train groups would bring, for comparison

with the buckets that are sent, and the pairs of ranks between which they are sent.

In one process nothing is moved; there the time counts, against that of copying the weights once: fused
weights of the generating model are a change of layout, so one copy of each weight is what is needed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from common import MODELS, copy_bandwidth, model_config, random_shards, seconds_of
from results import table

from mindrlhf.parallel.exchange_plan import plan_exchange
from mindrlhf.parallel.layout import Layout, Mesh
from mindrlhf.parallel.parameters import parameter_layouts
from mindrlhf.parallel.reshard import BUCKET_BYTES

BYTES = 4  # of a float32
TEMPERATURE = 1.0


def parse_args() -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="default", help="sizes by name (default: default)")
    parser.add_argument("--world", type=int, default=4, help="ranks of the pairs of layouts (default: 4)")
    parser.add_argument("--repeats", type=int, default=7, help="syncs in one process (default: 7)")
    return parser.parse_args()


@dataclass
class Traffic:
    """What all ranks together receive, in bytes."""

    needed: int = 0
    moved: int = 0
    gathered: int = 0
    buckets: int = 0
    pairs: int = 0


def overlap(a: tuple[slice, ...], b: tuple[slice, ...]) -> int:
    """Elements that two boxes share."""
    return prod(max(0, min(x.stop, y.stop) - max(x.start, y.start)) for x, y in zip(a, b, strict=True))


def traffic(source: Mapping[str, Layout], target: Mapping[str, Layout], bucket_bytes: int) -> Traffic:
    """Bytes for one pair of layouts: the minimum from the layouts alone, the rest as planned."""
    plan = plan_exchange(source, target, bucket_elements=bucket_bytes // BYTES)
    total = Traffic(
        moved=BYTES * sum(transfer.moved for transfer in plan.transfers),
        buckets=plan.collectives,
        pairs=len(plan.transfers),
    )
    for name, wanted in target.items():
        layout = source[name]
        missing = [
            prod(wanted.local_shape) - overlap(layout.slices(rank), wanted.slices(rank))
            for rank in range(layout.mesh.size)
        ]
        total.needed += BYTES * sum(missing)
        if any(missing):  # a collective is for all ranks
            total.gathered += BYTES * layout.mesh.size * (layout.mesh.mp - 1) * prod(layout.local_shape)
    return total


def layout_pairs(world: int) -> Iterator[tuple[Mesh, Mesh]]:
    """All (train, infer) meshes of ``world`` ranks."""
    meshes = [Mesh(world // mp, mp) for mp in range(1, world + 1) if world % mp == 0]
    return ((train, infer) for train in meshes for infer in meshes)


def print_traffic(name: str, world: int) -> None:
    """The table of all pairs whose sizes divide."""
    config, rows = model_config(name), []
    whole = sum(BYTES * prod(layout.shape) for layout in parameter_layouts(config, Mesh()).values())
    for train, infer in layout_pairs(world):
        try:
            moved = traffic(parameter_layouts(config, train), parameter_layouts(config, infer), BUCKET_BYTES)
        except ValueError:  # a dimension does not divide
            continue
        rows.append(
            (
                f"dp{train.dp} mp{train.mp} -> dp{infer.dp} mp{infer.mp}",
                *(f"{part / 1e6:.1f}" for part in (moved.needed, moved.moved, moved.gathered)),
                f"{moved.moved / moved.needed:.3f}" if moved.needed else "",
                str(moved.buckets),
                str(moved.pairs),
            )
        )
    print(
        f"{name}: {whole / 1e6:.1f} MB of float32 weights, {world} ranks; MB received by all ranks together"
    )
    columns = ("train -> infer", "needed", "moved", "AllGather", "moved/needed", "buckets", "pairs")
    print(table(columns, rows))


def build_sync(name: str) -> tuple[Any, dict[str, np.ndarray]]:
    """A sync between two models in one process, and the weights of the trained one."""
    from mindrlhf.models.infer import GenerationConfig, PPOModelInfer
    from mindrlhf.models.train import PPOModelTrain
    from mindrlhf.parallel.groups import Groups
    from mindrlhf.trainer.weight_sync import WeightSync

    config, groups = model_config(name), Groups(Mesh(), 0)
    generation = GenerationConfig(
        max_prompt_length=8, max_response_length=8, valid_vocab_size=config.vocab_size
    )
    train = PPOModelTrain(
        config,
        groups,
        prompt_length=8,
        temperature=TEMPERATURE,
        valid_vocab_size=config.vocab_size,
    )
    infer = PPOModelInfer(config, groups, generation, batch_size=1)
    weights = random_shards(train.layouts)
    train.load(weights)
    return WeightSync(train, infer, parameter_layouts(config, Mesh()), groups), weights


def print_one_process(name: str, repeats: int) -> None:
    """Time of a sync in one process, and of one copy of the same arrays between warm buffers."""
    import mindspore as ms

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    sync, weights = build_sync(name)
    size = sum(array.nbytes for array in weights.values())
    targets = {key: np.empty_like(array) for key, array in weights.items()}

    def copy_once() -> None:
        for key, array in weights.items():
            np.copyto(targets[key], array)

    sync.sync()
    copy_once()
    seconds, once = (statistics.median(seconds_of(call, repeats)) for call in (sync.sync, copy_once))
    shown = next(iter(sync.train.parameters_dict().values()))
    shared = np.shares_memory(shown.asnumpy(), shown.asnumpy())
    print(
        f"\none process: sync {seconds * 1e3:.1f} ms for {size / 1e6:.1f} MB, {size / seconds / 1e9:.1f} GB/s"
    )
    print(f"one copy by one thread {once * 1e3:.1f} ms: the sync takes {seconds / once:.2f} such copies")
    print(f"reading a parameter copies it: {'no' if shared else 'yes'}")
    print(f"a copy by all cores reads and writes {copy_bandwidth() / 1e9:.1f} GB/s")
    print(f"policies differ after the sync: {sync.differences() or 'no'}")


def main() -> None:
    """Both parts."""
    args = parse_args()
    print_traffic(args.model, args.world)
    print_one_process(args.model, args.repeats)


if __name__ == "__main__":
    main()
