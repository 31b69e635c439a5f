"""One model in ``rank_0/ rank_1/ ...``: a rank's part saved and loaded, merged, split, resharded."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mindrlhf.checkpoint.element_types import element_type, to_mindspore
from mindrlhf.checkpoint.hf_config import CONFIG_NAME, check_described, check_language_model, write_json
from mindrlhf.checkpoint.manifest import Digest
from mindrlhf.checkpoint.sources import (
    ArraySource,
    CastSource,
    LocalSource,
    MergedSource,
    WeightSource,
    closed_on_error,
    select,
)
from mindrlhf.checkpoint.weight_checks import (
    expected_layouts,
    find_faults,
    inferred,
    local_shapes,
)
from mindrlhf.checkpoint.weight_files import (
    CKPT,
    MINDSPORE_SUFFIXES,
    has_hf_weights,
    only_weights_file,
    open_weights,
    write_weights,
)
from mindrlhf.configs.keys import ModelConfig, RunConfig
from mindrlhf.models.families import family_of, family_of_names
from mindrlhf.models.score_head import SCORE_HEAD
from mindrlhf.parallel.layout import Layout, Mesh
from mindrlhf.utils.errors import CheckpointError, bullet_list
from mindrlhf.utils.files import atomic_directory
from mindrlhf.utils.outputs import Output, check_outputs, directory_of
from mindrlhf.utils.result_files import FINAL, MODELS, UNITS, checkpoint_directory, checkpoint_numbers

FILE_PREFIX = "checkpoint_"

_RANK_DIRECTORY = re.compile(r"rank_(\d+)")


def rank_directories(path: Path) -> dict[int, Path]:
    """Rank -> its directory, for every ``rank_i`` in directory ``path``, in rank order."""
    if not path.is_dir():
        return {}
    matches = ((_RANK_DIRECTORY.fullmatch(entry.name), entry) for entry in path.iterdir())
    found = {int(match.group(1)): entry for match, entry in matches if match and entry.is_dir()}
    return dict(sorted(found.items()))


def find_weights(path: Path, wanted: str | None = None) -> Path:
    """The file or directory of the weights that ``path`` stands for.

    A checkpoint stands for its one model, the results of a run for their last weights: ``final/``, or else
    the newest checkpoint. Any other path, one without weights included, stands for itself.

    Args:
        path: as the user gives it.
        wanted: which of :data:`mindrlhf.utils.result_files.MODELS` is meant where a checkpoint holds several.

    Raises:
        CheckpointError: a checkpoint holds several models, and none of them is ``wanted``.
    """
    if not path.is_dir() or has_hf_weights(path) or rank_directories(path):
        return path
    found = [path / name for name in (FINAL, *MODELS) if rank_directories(path / name)]
    if len(found) == 1 or path / FINAL in found:
        return found[0]
    if found:
        if wanted is not None and path / wanted in found:
            return path / wanted
        raise CheckpointError(f"{path} holds several models: name {' or '.join(map(str, found))}")
    for unit in UNITS:
        if numbers := checkpoint_numbers(path, unit):
            return find_weights(checkpoint_directory(path, numbers[0], unit), wanted)
    return path


def rank_file_name(rank: int, prefix: str = FILE_PREFIX, suffix: str = CKPT) -> str:
    """Path of the weights of ``rank`` below the directory of all ranks."""
    return f"rank_{rank}/{prefix}{rank}{suffix}"


def save_shard(
    directory: Path,
    rank: int,
    params: Mapping[str, np.ndarray],
    *,
    prefix: str = FILE_PREFIX,
    digest: Digest | None = None,
) -> Path:
    """Writes ``directory/rank_{rank}/{prefix}{rank}.ckpt``, which appears when complete.

    Args:
        directory: of all ranks.
        rank: whose part.
        params: canonical name -> local array, MindSpore's bfloat16 included.
        prefix: of the file name.
        digest: takes in the file's bytes.

    Returns:
        the file.

    Raises:
        CheckpointError: an array's type cannot be stored, or writing fails.
    """
    path = Path(directory) / rank_file_name(rank, prefix)
    write_weights(path, ArraySource(params), digest=digest)
    return path


def load_shard(
    path: Path,
    layouts: Mapping[str, Layout],
    rank: int,
    *,
    dtype: np.dtype[Any] | None = None,
    new: Collection[str] = (),
    ignore: Collection[str] = (),
    stored: Mesh | None = None,
) -> dict[str, np.ndarray]:
    """This rank's arrays by canonical name; nothing is loaded that does not fit exactly.

    Of each tensor only the bytes of this rank's slice are read, from the files that have them.

    Args:
        path: see :func:`open_fitting`.
        layouts: canonical name -> layout of everything the model has.
        rank: whose part.
        dtype: what to cast to; ``None`` keeps what is stored. bfloat16 is MindSpore's numpy type.
        new, ignore, stored: see :func:`open_fitting`.

    Raises:
        CheckpointError: as :func:`open_fitting`; damaged files; values that do not fit ``dtype``.
    """
    with open_fitting(Path(path), layouts, new=new, ignore=ignore, stored=stored) as source:
        local = LocalSource(source, layouts, rank)
        wanted = CastSource(local, None if dtype is None else element_type(dtype))
        arrays = {name: to_mindspore(wanted.read(name)) for name in wanted.tensors}
        wanted.check_overflow()
        return arrays


def merge_shards(directory: Path, layouts: Mapping[str, Layout], output_file: Path) -> None:
    """Writes the full model of the rank directories in ``directory`` to one file, block by block.

    Args:
        directory: holds ``rank_0/ rank_1/ ...``.
        layouts: canonical name -> layout over any ranks.
        output_file: ``.ckpt`` or ``.safetensors``; an older one is replaced.

    Raises:
        CheckpointError: ranks are missing, or do not fit ``layouts``, all faults in one error.
    """
    with open_fitting(Path(directory), layouts) as merged:
        write_weights(Path(output_file), merged)


def check_weights(path: Path, config: RunConfig, *, score_head: bool) -> None:
    """Refuses weights from which a model cannot be filled; reads names and shapes only.

    Args:
        path: see :func:`open_fitting`.
        config: the model's YAML.
        score_head: whether the model has a scalar head in place of the language-model head.

    Raises:
        CheckpointError: as :func:`open_model`; a reward model in place of a policy.
    """
    if not score_head:
        check_language_model(path)
    names = family_of(config.model).layouts
    layouts = names.parameter_layouts(config.model, Mesh(), lm_head=not score_head, score_head=score_head)
    open_model(path, config.model, layouts, str(config.path)).close()


def open_model(
    path: Path, model: ModelConfig, layouts: Mapping[str, Layout], where: str = "the YAML"
) -> WeightSource:
    """Opens weights to fill a model from: a scalar head may be missing, heads that it lacks may be stored.

    Args:
        path: see :func:`open_fitting`.
        model: sizes.
        layouts: canonical name -> layout of everything the model has.
        where: what states the sizes, for messages.

    Raises:
        CheckpointError: as :func:`open_fitting`; a ``config.json`` beside the weights is of another model.
    """
    check_described(path, model, where)
    lm_head = family_of(model).layouts.LM_HEAD
    ignore: tuple[str, ...] = ()
    if SCORE_HEAD[0] not in layouts:
        ignore = SCORE_HEAD
    elif lm_head not in layouts:
        ignore = (lm_head,)
    return open_fitting(path, layouts, new=SCORE_HEAD, ignore=ignore, where=where)


def open_full(
    path: Path, model: ModelConfig, where: str = "the model"
) -> tuple[WeightSource, dict[str, Layout]]:
    """Opens a whole model with the heads that are stored, checked against its sizes.

    Args:
        path: see :func:`open_fitting`.
        model: sizes.
        where: what states them, for messages.

    Returns:
        a source with exactly the model's canonical tensors, in model order, and their layouts, not split.

    Raises:
        CheckpointError: as :func:`open_model`.
    """
    check_described(path, model, where)
    parts, mesh = open_parts(path)
    layouts = expected_layouts(model, parts[0].tensors)
    return _merged(parts, mesh, layouts, path, where), layouts


def open_fitting(
    path: Path,
    layouts: Mapping[str, Layout],
    *,
    new: Collection[str] = (),
    ignore: Collection[str] = (),
    stored: Mesh | None = None,
    where: str = "the model",
) -> WeightSource:
    """The full tensors of ``layouts``, from one file or from its ranks, however these are split.

    Args:
        path: a full ``.ckpt`` or ``.safetensors`` file, a Hugging Face directory (its names are mapped), or
            a directory with ``rank_0/ rank_1/ ...``, one per rank or one per model-parallel index.
        layouts: canonical name -> layout, over any mesh, of everything that should be there.
        new: names that may be missing (fresh heads); they are then absent from the source.
        ignore: names that may be stored and that are not used. A tied model's ``lm_head.weight`` that
            equals the embedding need not be listed.
        stored: the mesh of rank directories whose tensors are not a model's; a model's own tell it.
        where: what states the sizes, for messages.

    Raises:
        CheckpointError: everything else that is missing, extra or misshapen, in one error; missing ranks.
    """
    return _merged(*open_parts(path, stored), layouts, path, where, new=new, ignore=ignore)


def open_parts(path: Path, stored: Mesh | None = None) -> tuple[list[WeightSource], Mesh]:
    """One source per model-parallel index, and the mesh over which ``path`` is split.

    Raises:
        CheckpointError: nothing can be opened, or ranks are missing.
    """
    directories = rank_directories(path)
    if not directories:
        return [open_weights(path)], Mesh()
    parts = [open_weights(only_weights_file(next(iter(directories.values()))))]
    with closed_on_error(parts):
        shapes = {name: info.shape for name, info in parts[0].tensors.items()}
        family = family_of_names(shapes)
        mp = family.layouts.stored_model_parallel(shapes) if stored is None else stored.mp
        count = -(-(max(directories) + 1) // mp) * mp
        if missing := [f"rank_{rank}" for rank in range(count) if rank not in directories]:
            raise CheckpointError(
                f"{path}: each of rank_0 .. rank_{count - 1} holds 1/{mp} of the model; copy what is missing:"
                + bullet_list(missing)
            )
        for index in range(1, mp):
            parts.append(open_weights(only_weights_file(directories[index])))
    return parts, Mesh(count // mp, mp)


def _merged(
    parts: Sequence[WeightSource],
    mesh: Mesh,
    layouts: Mapping[str, Layout],
    path: Path,
    where: str,
    *,
    new: Collection[str] = (),
    ignore: Collection[str] = (),
) -> WeightSource:
    """Full tensors from one source per model-parallel index of ``mesh``.

    Raises:
        CheckpointError: a part does not fit ``layouts``, or parts differ in element type.
    """
    first = parts[0]
    faults = []
    with closed_on_error(parts):
        try:
            layouts = {name: layout.on(mesh) for name, layout in layouts.items()}
        except ValueError as error:
            faults = [f"the model cannot be split over {mesh}: {error}"]
        for part in () if faults else parts:
            found = find_faults(part, local_shapes(layouts), new=new, ignore=ignore)
            found += [
                f"{name} is {info.dtype}, in {first.where} it is {first.tensors[name].dtype}"
                for name, info in part.tensors.items()
                if name in first.tensors and info.dtype != first.tensors[name].dtype
            ]
            faults += found if len(parts) == 1 else [f"{part.where}: {fault}" for fault in found]
        if faults:
            weights = first.where if mesh.size == 1 else path
            raise CheckpointError(
                f"{weights} ({inferred(first, mesh)}) does not fit {where}, {len(faults)} fault(s); "
                "give weights and YAML (or config.json) of one model:" + bullet_list(faults)
            )
    return select(first, layouts) if len(parts) == 1 else MergedSource(parts, layouts, str(path))


def split_to_ranks(
    source: WeightSource,
    layouts: Mapping[str, Layout],
    output_dir: Path,
    config: Mapping[str, Any],
    *,
    prefix: str = FILE_PREFIX,
    suffix: str = CKPT,
    overwrite: bool = False,
    description: str | None = None,
) -> list[Path]:
    """Writes the part of every rank, data-parallel copies included, to ``output_dir/rank_i``.

    Args:
        source: full tensors, already checked.
        layouts: canonical name -> layout of the ranks.
        output_dir: appears when whole.
        config: content of its ``config.json``, which states the model's sizes.
        prefix: of the file names.
        suffix: ``.ckpt`` or ``.safetensors``.
        overwrite: whether existing rank directories may be replaced.
        description: text of the progress bar; no bar without it.

    Returns:
        the files, in rank order.

    Raises:
        MindRLHFError: the output exists or cannot be written.
    """
    check_outputs([ranks_output("output", output_dir, overwrite=overwrite)], [])
    mesh = next(iter(layouts.values())).mesh
    names = [rank_file_name(rank, prefix, suffix) for rank in range(mesh.size)]
    try:
        with atomic_directory(output_dir) as temporary:
            for rank, name in enumerate(names):
                first = mesh.mp_index(rank)
                if rank == first:
                    shown = None if description is None else f"{description}, rank {rank}"
                    write_weights(temporary / name, LocalSource(source, layouts, rank), description=shown)
                else:
                    (temporary / name).parent.mkdir()
                    shutil.copyfile(temporary / names[first], temporary / name)
            write_json(temporary / CONFIG_NAME, config)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {output_dir}: {error.strerror or error}; free space, or write elsewhere"
        ) from error
    return [output_dir / name for name in names]


def ranks_output(flag: str, path: Path, *, overwrite: bool = False) -> Output:
    """A directory of rank directories, for :func:`mindrlhf.utils.outputs.check_outputs`."""
    fault = directory_of("a directory of ranks", _is_ours, lambda found: bool(rank_directories(found)))
    return Output(flag, path, fault, overwrite)


def _is_ours(entry: Path) -> bool:
    if entry.name == CONFIG_NAME:
        return entry.is_file()
    is_rank = entry.is_dir() and _RANK_DIRECTORY.fullmatch(entry.name) is not None
    return is_rank and all(file.suffix in MINDSPORE_SUFFIXES for file in entry.iterdir())
