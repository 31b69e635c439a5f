"""safetensors files, read and written block by block (https://huggingface.co/docs/safetensors).

The library checks the file (lengths, offsets, overlaps). It maps what it reads, which counts as resident
memory, and writes only from memory, so the bytes are moved here.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mindrlhf.checkpoint.element_types import BY_SAFETENSORS, SAFETENSORS_NAMES
from mindrlhf.checkpoint.sources import Extent, FileSource, TensorInfo, WeightSource
from mindrlhf.utils.errors import CheckpointError

_LENGTH = struct.Struct("<Q")
_METADATA = "__metadata__"


def open_safetensors(path: Path) -> FileSource:
    """A source on one ``.safetensors`` file; only its header is read now.

    Raises:
        CheckpointError: the file is missing or damaged, or has an unknown element type.
    """
    header, data_start = _read_header(path)
    tensors: dict[str, TensorInfo] = {}
    extents: dict[str, list[Extent]] = {}
    unknown = []
    for name, entry in header.items():
        dtype = BY_SAFETENSORS.get(entry["dtype"])
        if dtype is None:
            unknown.append(f"{name} ({entry['dtype']})")
            continue
        start, stop = entry["data_offsets"]
        tensors[name] = TensorInfo(tuple(entry["shape"]), dtype)
        extents[name] = [Extent(data_start + start, stop - start)]
    if unknown:
        raise CheckpointError(
            f"{path}: unsupported element types: {', '.join(unknown)}; save it as one of "
            + ", ".join(BY_SAFETENSORS)
        )
    return FileSource(path, tensors, extents)


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header without metadata, and where the tensor bytes begin."""
    try:
        with safe_open(path, framework="np"):  # checks lengths, offsets and overlaps
            pass
        with path.open("rb") as file:
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
            header: dict[str, Any] = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (SafetensorError, ValueError, struct.error) as error:
        raise CheckpointError(
            f"{path} is damaged or not a safetensors file ({error}): copy it again"
        ) from error
    header.pop(_METADATA, None)
    return header, _LENGTH.size + length


def encode_safetensors(source: WeightSource, metadata: Mapping[str, str]) -> Iterator[bytes]:
    """The bytes of a ``.safetensors`` file with every tensor of ``source``, one block at a time.

    Args:
        source: what to write.
        metadata: texts for the header.
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    # Wide elements first, as the library does, so that every tensor starts at a multiple of its width.
    names = sorted(source.tensors, key=lambda name: -source.tensors[name].dtype.itemsize)
    position = 0
    for name in names:
        info = source.tensors[name]
        header[name] = {
            "dtype": SAFETENSORS_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [position, position + info.nbytes],
        }
        position += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield _LENGTH.pack(len(text)) + text
    for name in names:
        for block in source.blocks(name):
            yield block.tobytes()
