"""Compares two Hugging Face checkpoints: same tensors, and how far training has moved the weights.

python scripts/compare_models.py BEFORE_DIR AFTER_DIR
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mindrlhf.checkpoint.sources import WeightSource
from mindrlhf.checkpoint.weight_files import open_weights
from mindrlhf.utils.command_line import new_parser, run_main
from mindrlhf.utils.errors import CheckpointError


def main() -> None:
    """Prints how many tensors differ and by how much; an error when the tensors are not the same set."""
    parser = new_parser(__doc__)
    files = parser.add_argument_group("files: .ckpt, .safetensors, or Hugging Face directories")
    files.add_argument("before", type=Path, help="weights to compare with")
    files.add_argument("after", type=Path, help="weights that may differ")
    arguments = parser.parse_args()
    with open_weights(arguments.before) as before, open_weights(arguments.after) as after:
        shapes = [{name: info.shape for name, info in source.tensors.items()} for source in (before, after)]
        if shapes[0] != shapes[1]:
            differing = sorted({name for name, _ in set(shapes[0].items()) ^ set(shapes[1].items())})
            raise CheckpointError(
                f"{arguments.before} and {arguments.after} hold other tensors: {', '.join(differing)}"
            )
        moved, largest = 0, 0.0
        for name in shapes[0]:
            change = np.abs(_float32(after, name) - _float32(before, name)).max()
            moved += bool(change > 0)
            largest = max(largest, float(change))
    print(f"{len(shapes[0])} tensors, the same names and shapes; {moved} changed, by at most {largest:.2e}")


def _float32(source: WeightSource, name: str) -> np.ndarray:
    return source.read(name).astype(np.float32)


if __name__ == "__main__":
    run_main(main)
