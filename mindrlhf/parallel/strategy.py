"""MindSpore's own parallel strategy files, written from layouts.

A strategy file tells ``mindspore.transform_checkpoints`` how every parameter is split. It normally
comes out of compiling a network on as many devices as the job has; ours follows from
:class:`~mindrlhf.parallel.layout.Layout`, so it needs no device, data or weights.

Every rank's file of one model is the same: the device matrix ``[dp, mp]`` covers all ranks and a
rank's place in it follows from its number. How they are used (measured with MindSpore 2.9.0)::

    from mindspore import merge_pipeline_strategys, transform_checkpoints

    infer_file = "strategy/infer_policy_strategy/strategy_0.ckpt"
    train_file = "strategy/train_policy_strategy/strategy_0.ckpt"
    # full file (as full/rank_0/any.ckpt) -> one directory rank_0 .. rank_{n-1} per rank, dp copies included
    transform_checkpoints("full", "infer", "checkpoint_", None, infer_file)
    # layout -> layout, any dp x mp over any number of ranks
    transform_checkpoints("infer", "train", "checkpoint_", infer_file, train_file)
    # layout -> full (as full/rank_0/checkpoint_0.ckpt)
    transform_checkpoints("train", "full", "checkpoint_", train_file, None)

* A strategy argument is ONE file, as a string: that of any rank, or the merged file that
  ``merge_pipeline_strategys("strategy/train_policy_strategy", "merged.ckpt")`` writes. ``None`` means
  "not split" and belongs to the side that is a full file. A directory is refused.
* All checkpoint directories hold ``rank_{r}`` sub-directories, the full file's too. Of several files
  in one of them MindSpore takes the last in alphabetical order, and refuses a mix of ``.ckpt`` and
  ``.safetensors``.
* Replicated parameters are in the file (tensor map all -1) and come out as equal copies. A parameter
  of the checkpoint that the strategy does not name is copied from the rank with the same number.
* When the source names a strict subset of the target's parameters (a policy into a critic, which also
  has a score head), MindSpore's output files are called ``{prefix}{rank}_part0.ckpt``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindrlhf.parallel.layout import Layout, Mesh
from mindrlhf.utils.errors import CheckpointError
from mindrlhf.utils.files import atomic_file

# A tensor map counts mesh axes from the right: in [dp, mp] the model-parallel axis is number 0.
_MP_AXIS = 0
_NOT_SPLIT = -1
_ONLY_STAGE = 0
_MAX_FILE_BYTES = 64 << 20  # a model of 1,000 layers has 2 MB


@dataclass(frozen=True)
class Strategy:
    """What a strategy file says.

    Attributes:
        mesh: the grid of ranks.
        split_dims: parameter name -> the dimension that is split, ``None`` for copies on every rank.
    """

    mesh: Mesh
    split_dims: Mapping[str, int | None]


def write_strategy(layouts: Mapping[str, Layout], path: Path) -> None:
    """Writes the strategy file of one model atomically.

    Args:
        layouts: canonical parameter name -> layout; all on one mesh.
        path: file to write; its directory is made when missing.

    Raises:
        ValueError: ``layouts`` is empty or mixes meshes.
    """
    _write(_serialized(layouts), path)


def write_strategies(
    directory: Path, models: Mapping[str, Mapping[str, Layout]], ranks: Iterable[int]
) -> list[Path]:
    """Writes ``directory/{model}_strategy/strategy_{rank}.ckpt`` for every model and rank.

    Args:
        directory: where the ``{model}_strategy`` directories go.
        models: model name (``infer_policy``, ``train_policy``, ``ref``, ``reward``, ``critic``) -> layouts.
        ranks: ranks to write for; all of them, or a worker's own.

    Returns:
        The written files, by model and then by rank.

    Raises:
        ValueError: a model has no layouts or mixes meshes, or a rank lies outside a model's mesh.
        CheckpointError: the directory holds files of another layout, which MindSpore would mix with these.
    """
    wanted = list(ranks)
    _check_existing(Path(directory), models, wanted)
    written: list[Path] = []
    for model, layouts in models.items():
        content = _serialized(layouts)
        mesh = next(iter(layouts.values())).mesh
        outside = [rank for rank in wanted if not 0 <= rank < mesh.size]
        if outside:
            raise ValueError(
                f"model {model}: ranks {outside} are outside its mesh {mesh} of {mesh.size} ranks"
            )
        for rank in wanted:
            path = Path(directory) / f"{model}_strategy" / f"strategy_{rank}.ckpt"
            _write(content, path)
            written.append(path)
    return written


def read_strategy(path: Path) -> Strategy:
    """Mesh and split of every parameter, as :func:`write_strategy` wrote them.

    Raises:
        CheckpointError: it is missing, damaged, or of a form that these files do not have (pipeline stages,
            optimizer sharding, two split dimensions).
    """
    from google.protobuf.message import DecodeError
    from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

    strategies = ParallelStrategyMap()
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes are too many for one")
        strategies.ParseFromString(path.read_bytes())
        return _as_strategy(strategies)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (DecodeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged or is not a strategy file of one model ({error}); remove it, and write it "
            "again with --only_save_strategy True"
        ) from error


def _as_strategy(strategies: Any) -> Strategy:
    meshes: set[Mesh] = set()
    split_dims: dict[str, int | None] = {}
    for item in strategies.parallel_layout_item:
        name, parallel = item.param_name, item.parallel_layouts
        if not name or name in split_dims:
            raise ValueError(f"parameter {name!r} occurs twice" if name else "a parameter has no name")
        grids, maps = (
            [list(entry.dim) for entry in part] for part in (parallel.dev_matrix, parallel.tensor_map)
        )
        if [len(grid) for grid in grids] != [2] or len(maps) != 1 or parallel.opt_weight_shard_size:
            raise ValueError(f"{name} is not split over data and model parallel ranks alone")
        if not set(maps[0]) <= {_MP_AXIS, _NOT_SPLIT} or maps[0].count(_MP_AXIS) > 1:
            raise ValueError(f"{name} has the tensor map {maps[0][:8]}")
        meshes.add(Mesh(*grids[0]))
        split_dims[name] = maps[0].index(_MP_AXIS) if _MP_AXIS in maps[0] else None
    if len(meshes) != 1:
        raise ValueError(f"{len(meshes)} device matrices, expected one")
    return Strategy(meshes.pop(), split_dims)


def _check_existing(
    directory: Path, models: Mapping[str, Mapping[str, Layout]], ranks: Iterable[int]
) -> None:
    """Refuses to put files beside, or in place of, those of another layout."""
    faults: list[str] = []
    for model, layouts in models.items():
        folder = directory / f"{model}_strategy"
        mesh = next((layout.mesh for layout in layouts.values()), Mesh())
        wanted = {name: layout.split_dim if layout.is_split else None for name, layout in layouts.items()}
        for path in map(folder.joinpath, (f"strategy_{rank}.ckpt" for rank in ranks)):
            if path.exists() and read_strategy(path) != Strategy(mesh, wanted):
                faults.append(f"{path} is of {read_strategy(path).mesh} or another model, not of {mesh}")
        known = {f"strategy_{rank}.ckpt" for rank in range(mesh.size)}
        faults += [
            f"{path} is of a rank that {mesh} does not have"
            for path in sorted(folder.glob("strategy_*.ckpt"))
            if path.name not in known
        ]
    if faults:
        raise CheckpointError(
            f"{directory} holds strategy files of another job; remove it or work elsewhere:"
            + "".join(f"\n  - {fault}" for fault in faults)
        )


def _write(content: bytes, path: Path) -> None:
    try:
        with atomic_file(Path(path)) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}; work in a directory that can be written"
        ) from error


def _serialized(layouts: Mapping[str, Layout]) -> bytes:
    from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

    meshes = {layout.mesh for layout in layouts.values()}
    if len(meshes) != 1:
        raise ValueError(
            "a strategy file describes one model on one mesh, "
            + (f"got meshes {', '.join(sorted(map(str, meshes)))}" if meshes else "got no parameters")
        )
    strategies = ParallelStrategyMap()
    strategies.current_stage = _ONLY_STAGE
    for name, layout in layouts.items():
        _add_parameter(strategies, name, layout)
    content: bytes = strategies.SerializeToString()
    return content


def _add_parameter(strategies: Any, name: str, layout: Layout) -> None:
    """Appends the cut and the layout of one parameter to a ``ParallelStrategyMap``."""
    split_dim = layout.split_dim if layout.is_split else None
    dims = range(len(layout.shape))

    # MindSpore lists the cut of every operator here; merging and stage-wise transforming only ask that
    # the list is not empty and read the stage from it. The parameter stands for the operator that owns it.
    cut = strategies.parallel_strategy_item.add()
    cut.node_name = name
    cut.parallel_strategys.stage = _ONLY_STAGE
    cut.parallel_strategys.parallel_strategy.add().dim.extend(
        layout.mesh.mp if dim == split_dim else 1 for dim in dims
    )

    item = strategies.parallel_layout_item.add()
    item.param_name = name
    parallel = item.parallel_layouts
    parallel.dev_matrix.add().dim.extend([layout.mesh.dp, layout.mesh.mp])
    parallel.tensor_map.add().dim.extend(_MP_AXIS if dim == split_dim else _NOT_SPLIT for dim in dims)
    # Both lists stay empty for even splits, but readers index their first entry.
    parallel.param_split_shape.add()
    parallel.indices_offset.add()
    parallel.field = 0
    # No optimizer-parallel sharding.
    parallel.opt_weight_shard_step = 0
    parallel.opt_weight_shard_size = 0
