"""Do the stored tensors fit the model? All faults in one error, before anything is read or written."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import zip_longest

import numpy as np

from mindrlhf.checkpoint.element_types import FLOAT32, WEIGHT_TYPES
from mindrlhf.checkpoint.sources import CastSource, WeightSource
from mindrlhf.configs.keys import ModelConfig
from mindrlhf.models.families import family_of, family_of_names
from mindrlhf.models.score_head import SCORE_HEAD
from mindrlhf.parallel.layout import Layout, Mesh

Shapes = Mapping[str, tuple[int, ...]]


def expected_layouts(model: ModelConfig, present: Collection[str]) -> dict[str, Layout]:
    """Layouts, not split, of the weights that a file holding the tensors ``present`` should have.

    A file with a scalar head may lack the language-model head (a reward model), any other may not.
    """
    names = family_of(model).layouts
    score_head = any(name in present for name in SCORE_HEAD)
    layouts: dict[str, Layout] = names.parameter_layouts(
        model, Mesh(), lm_head=names.LM_HEAD in present or not score_head, score_head=score_head
    )
    return layouts


def local_shapes(layouts: Mapping[str, Layout]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of one rank's part."""
    return {name: layout.local_shape for name, layout in layouts.items()}


def find_faults(
    source: WeightSource, shapes: Shapes, *, new: Collection[str] = (), ignore: Collection[str] = ()
) -> list[str]:
    """One line per missing, extra or misshapen tensor, or weight that is not a float, of ``source``.

    A tied model's ``lm_head.weight`` that repeats the embedding is not a fault; it is not used.

    Args:
        source: what is stored.
        shapes: what should be: canonical name -> shape.
        new: names that may be missing.
        ignore: names that may be stored without being in the model.
    """
    family = family_of_names(shapes)
    lm_head = family.layouts.LM_HEAD
    if lm_head not in ignore and redundant_lm_head(source, shapes):
        ignore = {*ignore, lm_head}
    faults = [
        f"missing: {source.display(name)} {shapes[name]}"
        for name in shapes
        if name not in source.tensors and name not in new
    ]
    faults += [
        f"not in the model: {source.display(name)} {info.shape}"
        + (", which is not a copy of the embedding either" if name == lm_head else "")
        for name, info in source.tensors.items()
        if name not in shapes and name not in ignore
    ]
    layers = family.weight_names.count_layers(shapes)
    weights = family.weight_names.canonical_to_hf(layers)  # other tensors (an optimizer's) may be integers
    for name, shape in shapes.items():
        info = source.tensors.get(name)
        if info is not None and info.shape != shape:
            faults.append(f"wrong shape: {source.display(name)} is {info.shape}, the model has {shape}")
        if info is not None and name in weights and info.dtype not in WEIGHT_TYPES:
            faults.append(f"wrong type: {source.display(name)} is {info.dtype}, a weight must be a float")
    return faults


def inferred(source: WeightSource, mesh: Mesh) -> str:
    """What a file's names and shapes tell of the model, for messages.

    Args:
        source: a whole model, or one rank's part.
        mesh: over which the model is split.
    """
    family = family_of_names(source.tensors)
    known = [str(mesh)] if mesh.size > 1 else []
    known += [f"layers {layers}"] if (layers := family.weight_names.count_layers(source.tensors)) else []
    embedding = source.tensors.get(family.layouts.EMBEDDING)
    if embedding is not None and len(embedding.shape) == 2:
        vocab, hidden = embedding.shape
        known += [f"vocabulary {vocab * mesh.mp}", f"hidden size {hidden}"]
    return ", ".join(known) or "no layers"


def redundant_lm_head(source: WeightSource, shapes: Shapes) -> bool:
    """Whether ``source`` repeats the embedding as ``lm_head.weight`` that the model does not have (tied).

    Both are read block by block; a head that differs is a fault of the file.
    """
    names = family_of_names(shapes).layouts
    if names.LM_HEAD in shapes or not {names.LM_HEAD, names.EMBEDDING} <= source.tensors.keys():
        return False
    head, embedding = source.tensors[names.LM_HEAD], source.tensors[names.EMBEDDING]
    if head.shape != embedding.shape or not {head.dtype, embedding.dtype} <= {*WEIGHT_TYPES}:
        return False
    same_type = CastSource(source, None if head.dtype == embedding.dtype else FLOAT32)
    pairs = zip_longest(same_type.blocks(names.LM_HEAD), same_type.blocks(names.EMBEDDING))
    return all(np.array_equal(*pair) for pair in pairs)
