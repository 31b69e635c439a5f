#!/usr/bin/env python
"""What the weight sync train -> infer moves, bytes and messages for pairs of layouts, and how long it takes.

    python scripts/benchmark/sync.py [--model default] [--world 4]
    python scripts/msrun_launcher.py --workers 4 scripts/benchmark/sync.py [--model default]

Alone: for each pair (train layout -> infer layout) over --world ranks, all ranks together, in MB:

  needed   bytes of the ranks' infer slices that lie outside their own train slices: no scheme receives less;
           counted element by element from the layouts, not from the plan
  moved    bytes that the plan of the sync brings, and in how many messages between how many pairs of ranks

and the time of a sync in one process, where nothing is moved, against that of copying the weights once: fused
weights of the generating model are a change of layout, so one copy of each weight is needed.

Under msrun: the time of the exchange itself for each pair of layouts of all workers, in the same table.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import numpy as np
from common import MODELS, copy_bandwidth, model_config, random_shards, seconds_of
from results import table

from mindrlhf.models.qwen2.layouts import parameter_layouts
from mindrlhf.parallel.layout import Layout, Mesh
from mindrlhf.parallel.reshard import Resharder
from mindrlhf.utils.ranks import env_rank, env_world_size

BYTES = 4  # of a float32
TEMPERATURE = 1.0
COLUMNS = ("train -> infer", "needed", "moved", "x needed", "messages", "pairs")


def parse_args() -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="default", help="sizes by name (default: default)")
    parser.add_argument("--world", type=int, default=4, help="ranks of the pairs of layouts (default: 4)")
    parser.add_argument("--repeats", type=int, default=7, help="syncs that are timed (default: 7)")
    return parser.parse_args()


def bytes_needed(source: Mapping[str, Layout], target: Mapping[str, Layout]) -> int:
    """What the infer slices of all ranks hold that their train slices do not."""
    total = 0
    for name, wanted in target.items():
        for rank in range(wanted.mesh.size):
            boxes = zip(source[name].slices(rank), wanted.slices(rank), strict=True)
            own = prod(max(0, min(a.stop, b.stop) - max(a.start, b.start)) for a, b in boxes)
            total += BYTES * (prod(wanted.local_shape) - own)
    return total


def layout_pairs(name: str, world: int) -> Iterator[tuple[str, dict[str, Layout], dict[str, Layout]]]:
    """All (train, infer) layouts over ``world`` ranks whose sizes divide."""
    config = model_config(name)
    meshes = [Mesh(world // mp, mp) for mp in range(1, world + 1) if world % mp == 0]
    layouts: dict[Mesh, dict[str, Layout]] = {}
    for mesh in meshes:
        try:
            layouts[mesh] = parameter_layouts(config, mesh)
        except ValueError:  # a dimension does not divide
            continue
    for train, before in layouts.items():
        for infer, after in layouts.items():
            yield f"dp{train.dp} mp{train.mp} -> dp{infer.dp} mp{infer.mp}", before, after


def traffic_row(label: str, source: Mapping[str, Layout], target: Mapping[str, Layout]) -> tuple[str, ...]:
    """One row of the table, from the plan that the sync itself uses."""
    plan = Resharder(source, target, 0).plan
    moved = BYTES * sum(transfer.elements for transfer in plan.transfers)
    needed = bytes_needed(source, target)
    times = moved / needed if needed else 1.0 if not moved else float("inf")
    return (
        label,
        f"{needed / 1e6:.1f}",
        f"{moved / 1e6:.1f}",
        f"{times:.2f}",
        str(plan.collectives),
        str(len(plan.transfers)),
    )


def print_traffic(name: str, world: int) -> None:
    """The table of all pairs."""
    whole = sum(
        BYTES * prod(layout.shape) for layout in parameter_layouts(model_config(name), Mesh()).values()
    )
    print(
        f"{name}: {whole / 1e6:.1f} MB of float32 weights, {world} ranks; MB received by all ranks together"
    )
    print(table(COLUMNS, [traffic_row(*pair) for pair in layout_pairs(name, world)]))


def time_exchanges(name: str, repeats: int) -> None:
    """Under msrun: seconds of every pair, on rank 0, from when all ranks are ready until all are done."""
    import mindspore as ms
    from mindspore import Tensor
    from mindspore.communication import init

    from mindrlhf.runtime.device import Runtime
    from mindrlhf.runtime.host_exchange import HostExchange

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    init()
    rank, world = env_rank(), env_world_size()
    exchange = HostExchange(Runtime(rank, world))
    full = random_shards(parameter_layouts(model_config(name), Mesh()))
    rows = []
    for label, source, target in layout_pairs(name, world):
        held = {
            key: Tensor(np.ascontiguousarray(layout.take(full[key], rank))) for key, layout in source.items()
        }
        resharder = Resharder(source, target, rank)

        def pass_through(resharder: Resharder = resharder, held: dict[str, Any] = held) -> None:
            for _ in resharder.reshard(held):
                pass
            exchange.barrier()

        exchange.barrier()
        first, *later = seconds_of(pass_through, 1 + repeats)
        right = all(
            np.array_equal(part, target[key].take(full[key], rank)) for key, part in resharder.reshard(held)
        )
        equal = exchange.every_rank(np.array([right], np.int32)).all()
        rows.append(
            (
                *traffic_row(label, source, target),
                f"{first:.3f}",
                f"{statistics.median(later):.3f}",
                "yes" if equal else "NO",
            )
        )
    if rank == 0:
        print(table((*COLUMNS, "first s", "later s", "bit-equal"), rows))


def build_sync(name: str) -> tuple[Any, dict[str, np.ndarray]]:
    """A sync between two models in one process, and the weights of the trained one."""
    from mindrlhf.models.generator import GenerationConfig, PPOModelInfer
    from mindrlhf.models.networks import PPOModelTrain
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
    return WeightSync(train, infer), weights


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
    """Under msrun the exchange, else the table and one process."""
    args = parse_args()
    if env_world_size() > 1:
        time_exchanges(args.model, args.repeats)
        return
    print_traffic(args.model, args.world)
    print_one_process(args.model, args.repeats)


if __name__ == "__main__":
    main()
