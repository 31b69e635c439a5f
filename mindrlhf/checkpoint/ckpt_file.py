"""MindSpore ``.ckpt`` files, read and written block by block, without MindSpore.

A ``.ckpt`` is one protobuf message (mindspore/ccsrc/utils/checkpoint.proto)::

    message Checkpoint     { repeated Value value = 1; }
    message Value          { string tag = 1; oneof { TensorProto tensor = 2; MapTensorProto maptensor = 3; } }
    message TensorProto    { repeated int64 dims = 1; string tensor_type = 2; bytes tensor_content = 3; }

Messages concatenate, so values can be appended one by one; consecutive values with the same tag are
pieces of one tensor. ``save_checkpoint(crc_check=True)`` appends ``crc_num`` and ten bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from mindrlhf.checkpoint.element_types import BY_MINDSPORE, MINDSPORE_NAMES
from mindrlhf.checkpoint.sources import Extent, FileSource, TensorInfo, WeightSource, open_for_reading
from mindrlhf.utils.errors import CheckpointError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_CRC_MARK, _CRC_LENGTH = b"crc_num", 17
_TEXT_TYPE = "str"
# Far above what a model needs; nothing larger is read into memory.
_MAX_DIMS_BYTES, _MAX_TEXT_BYTES = 1024, 65536


def open_ckpt(path: Path) -> FileSource:
    """A source on one ``.ckpt`` file; tensor bytes are skipped, not read.

    Raises:
        CheckpointError: the file is missing or damaged, or has an unknown element type.
    """
    descriptor = open_for_reading(path)
    try:
        return _Index(path, descriptor).source()
    except _DamagedError as error:
        raise CheckpointError(
            f"{path} is damaged, encrypted or not a MindSpore checkpoint ({error}): copy or save it again"
        ) from error
    finally:
        os.close(descriptor)


class _DamagedError(Exception):
    """The bytes do not follow the format."""


class _Index:
    """Walks the messages of a file and records where each tensor's bytes are."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._reader = _Reader(descriptor)
        self._tensors: dict[str, TensorInfo] = {}
        self._extents: dict[str, list[Extent]] = {}
        self._last = ""

    def source(self) -> FileSource:
        for field, extent in self._reader.fields(0, self._reader.end):
            if field != 1:
                raise _DamagedError(f"unknown field {field} at byte {extent.offset}")
            self._add_value(extent)
        for name, info in self._tensors.items():
            stored = sum(extent.length for extent in self._extents[name])
            if stored != info.nbytes:
                raise _DamagedError(f"{name} of shape {info.shape}, {info.dtype}, has {stored} bytes")
        return FileSource(self._path, self._tensors, self._extents)

    def _add_value(self, value: Extent) -> None:
        tag, tensor = "", None
        for field, extent in self._reader.fields(value.offset, value.offset + value.length):
            if field == 1:
                tag = self._reader.text(extent)
            elif field == 2:
                tensor = extent
            elif field == 3:
                raise _DamagedError(f"{tag} is a map parameter, which no model here has")
        if not tag or tensor is None:
            raise _DamagedError(f"a value without a name or tensor at byte {value.offset}")
        self._add_tensor(tag, tensor)

    def _add_tensor(self, tag: str, tensor: Extent) -> None:
        dims: list[int] = []
        type_name, content = "", Extent(tensor.offset, 0)
        for field, extent in self._reader.fields(tensor.offset, tensor.offset + tensor.length):
            if field == 1:
                if len(dims) + extent.length > _MAX_DIMS_BYTES:
                    raise _DamagedError(f"{tag} has too many dimensions")
                dims.extend(self._reader.varints(extent))
            elif field == 2:
                type_name = self._reader.text(extent)
            elif field == 3:
                content = extent
        if type_name == _TEXT_TYPE:
            return  # text that save_checkpoint(append_dict=...) stored beside the weights
        if type_name not in BY_MINDSPORE:
            raise _DamagedError(f"{tag} has the unknown type {type_name!r}")
        shape = () if dims == [0] and content.length else tuple(dims)
        info = TensorInfo(shape, BY_MINDSPORE[type_name])
        if tag not in self._tensors:
            self._tensors[tag] = info
            self._extents[tag] = []
        elif tag != self._last or info != self._tensors[tag]:
            raise _DamagedError(f"{tag} is stored twice")
        self._extents[tag].append(content)
        self._last = tag


class _Reader:
    """Protobuf's wire format, read through a small window."""

    _WINDOW = 1024

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._window, self._window_start = b"", 0
        self.end = os.fstat(descriptor).st_size
        trailer = os.pread(descriptor, _CRC_LENGTH, max(0, self.end - _CRC_LENGTH))
        if trailer.startswith(_CRC_MARK):
            self.end -= _CRC_LENGTH

    def fields(self, position: int, end: int) -> Iterator[tuple[int, Extent]]:
        """Field number and bytes of every field between two positions."""
        while position < end:
            key, start = self._varint(position, end)
            wire = key & 7
            if wire == _BYTES:
                length, start = self._varint(start, end)
            elif wire == _VARINT:
                length = self._varint(start, end)[1] - start
            elif wire in (_FIXED64, _FIXED32):
                length = 8 if wire == _FIXED64 else 4
            else:
                raise _DamagedError(f"wire type {wire} at byte {position}")
            if start + length > end:
                raise _DamagedError(f"{start + length - end} bytes are missing after byte {end}")
            yield key >> 3, Extent(start, length)
            position = start + length

    def varints(self, extent: Extent) -> Iterator[int]:
        """The numbers of a repeated field: one when it is not packed, several when it is."""
        position, end = extent.offset, extent.offset + extent.length
        while position < end:
            number, position = self._varint(position, end)
            yield number

    def text(self, extent: Extent) -> str:
        """A short string field."""
        if extent.length > _MAX_TEXT_BYTES:
            raise _DamagedError(f"a name of {extent.length} bytes at byte {extent.offset}")
        try:
            return os.pread(self._descriptor, extent.length, extent.offset).decode()
        except UnicodeDecodeError as error:
            raise _DamagedError(f"no text at byte {extent.offset}") from error

    def _varint(self, position: int, end: int) -> tuple[int, int]:
        """The number at ``position`` and where it ends."""
        number = 0
        for shift in range(0, 70, 7):
            if position >= end:
                raise _DamagedError(f"it ends inside a number at byte {end}")
            byte = self._byte(position)
            position += 1
            number |= (byte & 0x7F) << shift
            if byte < 0x80:
                return number, position
        raise _DamagedError(f"no number at byte {position - 10}")

    def _byte(self, position: int) -> int:
        offset = position - self._window_start
        if not 0 <= offset < len(self._window):
            self._window = os.pread(self._descriptor, self._WINDOW, position)
            self._window_start, offset = position, 0
            if not self._window:
                raise _DamagedError(f"it ends at byte {position}")
        return self._window[offset]


def encode_ckpt(source: WeightSource) -> Iterator[bytes]:
    """The bytes of a ``.ckpt`` file with every tensor of ``source``, in its order, one message per block."""
    for name, info in source.tensors.items():
        for block in source.blocks(name):
            yield _value_head(name, info, block.nbytes)
            yield block.tobytes()


def _value_head(name: str, info: TensorInfo, content_bytes: int) -> bytes:
    """A value message up to the tensor's bytes, which come last."""
    dims = b"".join(b"\x08" + _encode(size) for size in info.shape)
    head = dims + _field(2, MINDSPORE_NAMES[info.dtype].encode()) + b"\x1a" + _encode(content_bytes)
    value = _field(1, name.encode()) + b"\x12" + _encode(len(head) + content_bytes) + head
    return b"\x0a" + _encode(len(value) + content_bytes) + value


def _field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | _BYTES]) + _encode(len(content)) + content


def _encode(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
