"""Speed and memory of weight conversion on a synthetic model: convert.py [--gigabytes 1.5] [--work_dir DIR].

Each conversion runs in its own process, whose peak resident memory is compared with the limit of
"largest input shard + 1 GiB".
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mindrlhf.checkpoint.conversion import hf_to_mindspore, mindspore_to_hf, write_hf_directory
from mindrlhf.checkpoint.element_types import BFLOAT16, parse_dtype
from mindrlhf.checkpoint.hf_config import hf_config_from_model
from mindrlhf.checkpoint.sources import CastSource, Slices, TensorInfo, WeightSource, bounded
from mindrlhf.configs.keys import ModelConfig
from mindrlhf.models.qwen2.layouts import parameter_layouts
from mindrlhf.models.qwen2.weight_names import canonical_to_hf
from mindrlhf.parallel.layout import Mesh

HIDDEN, INTERMEDIATE, VOCAB = 2048, 5632, 151936
BYTES_PER_LAYER = 2 * HIDDEN * (HIDDEN * 5 // 2 + 3 * INTERMEDIATE)
LIMIT_ABOVE_SHARD = 1 << 30


class RandomSource(WeightSource):
    """Random bfloat16 weights under Hugging Face names, generated on reading."""

    def __init__(self, model: ModelConfig) -> None:
        names = canonical_to_hf(model.num_layers)
        layouts = parameter_layouts(model, Mesh())
        self.where = "random"
        self.tensors = {names[name]: TensorInfo(layout.shape, BFLOAT16) for name, layout in layouts.items()}
        self._rng = np.random.default_rng(0)

    def read_slice(self, name: str, slices: Slices) -> np.ndarray:
        """Fresh numbers at every call."""
        shape = [part.stop - part.start for part in bounded(self.tensors[name].shape, slices)]
        return self._rng.standard_normal(shape, np.float32).astype(BFLOAT16)


def make_model(directory: Path, gigabytes: float, shard_bytes: int) -> None:
    """Writes a Hugging Face directory of about ``gigabytes``."""
    embeddings = 2 * 2 * VOCAB * HIDDEN
    layers = max(1, round((gigabytes * 1e9 - embeddings) / BYTES_PER_LAYER))
    model = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_layers=layers,
        num_heads=16,
        n_kv_heads=4,
        intermediate_size=INTERMEDIATE,
    )
    source = CastSource(RandomSource(model), None)
    write_hf_directory(directory, source, hf_config_from_model(model), max_shard_bytes=shard_bytes)


def measured(
    convert: Callable[..., object], args: tuple[Any, ...], options: dict[str, Any]
) -> dict[str, float]:
    """Runs in the child: seconds, peak resident bytes, and how many of them the imports took."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.perf_counter()
    convert(*args, **options)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "peak": peak, "imports": before}


def in_child(function: Callable[..., Any], *args: Any) -> Any:
    """Calls ``function`` in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def largest_file(path: Path) -> int:
    """Bytes of the largest weights file."""
    return max(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size


def run(work_dir: Path, gigabytes: float, shard_bytes: int) -> bool:
    """All conversions; whether each stayed below the limit."""
    source = work_dir / "hf"
    in_child(make_model, source, gigabytes, shard_bytes)
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    print(f"input: {size / 1e9:.2f} GB bfloat16, largest shard {largest_file(source) / 1e9:.2f} GB")
    limit = largest_file(source) + LIMIT_ABOVE_SHARD
    ckpt, wide, back = work_dir / "model.ckpt", work_dir / "model.safetensors", work_dir / "back"
    back_options = {"config": source, "dtype": parse_dtype("bf16"), "max_shard_bytes": shard_bytes}
    steps: list[tuple[str, Callable[..., object], tuple[Any, ...], dict[str, Any]]] = [
        ("hf -> ckpt bf16", hf_to_mindspore, (source, ckpt), {}),
        ("hf -> safetensors fp32", hf_to_mindspore, (source, wide), {"dtype": parse_dtype("fp32")}),
        ("ckpt bf16 -> hf", mindspore_to_hf, (ckpt, back), back_options),
        ("safetensors fp32 -> hf bf16", mindspore_to_hf, (wide, work_dir / "back2"), back_options),
    ]
    within = True
    for title, convert, args, options in steps:
        result = in_child(measured, convert, args, options)
        within &= result["peak"] < limit
        print(
            f"{title:28} {result['seconds']:6.1f} s {size / 1e6 / result['seconds']:7.0f} MB/s   "
            f"peak {result['peak'] / 2**20:5.0f} MiB (imports {result['imports'] / 2**20:.0f}), "
            f"limit {limit / 2**20:.0f} MiB"
        )
    same = all(
        (back / name).read_bytes() == (work_dir / "back2" / name).read_bytes()
        for name in json.loads((source / "model.safetensors.index.json").read_text())["weight_map"].values()
    )
    print(f"both conversions back give the same files: {same}")
    return within and same


def main() -> int:
    """Parses and runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.5, help="size of the model in bfloat16")
    parser.add_argument("--shard_megabytes", type=int, default=700, help="size of its shards")
    parser.add_argument("--work_dir", type=Path, help="where the files go; default: a temporary directory")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work_dir) as directory:
        return 0 if run(Path(directory), args.gigabytes, args.shard_megabytes * 10**6) else 1


if __name__ == "__main__":
    raise SystemExit(main())
