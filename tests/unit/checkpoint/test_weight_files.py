"""The three file formats against the libraries that own them."""

from __future__ import annotations

import contextlib
import math
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mindrlhf.checkpoint import sources as sources_module
from mindrlhf.checkpoint.ckpt_file import open_ckpt
from mindrlhf.checkpoint.element_types import parse_dtype
from mindrlhf.checkpoint.safetensors_file import open_safetensors
from mindrlhf.checkpoint.sources import ArraySource, CastSource
from mindrlhf.checkpoint.torch_file import TorchSource
from mindrlhf.checkpoint.weight_files import open_weights, write_weights
from mindrlhf.utils.errors import CheckpointError

RNG = np.random.default_rng(3)
ARRAYS = {
    "matrix": RNG.normal(size=(7, 5)).astype(np.float32),
    "half": RNG.normal(size=(3, 4)).astype(np.float16),
    "vector": np.arange(9, dtype=np.int64),
    "cube": np.arange(24, dtype=np.int32).reshape(2, 3, 4),
    "flags": np.array([True, False]),
    "empty": np.zeros((0, 4), np.float32),
    "step": np.array(17, np.int32),
}


@pytest.fixture
def small_blocks(monkeypatch):
    """Makes every tensor of more than 40 bytes go in several blocks."""
    monkeypatch.setattr(sources_module, "BLOCK_BYTES", 40)


def bfloat16_array(shape: tuple[int, ...]) -> np.ndarray:
    from mindspore.common.np_dtype import bfloat16

    return RNG.normal(size=shape).astype(np.float32).astype(bfloat16)


def assert_holds(source, arrays):
    assert set(source.tensors) == set(arrays)
    for name, array in arrays.items():
        assert source.tensors[name].shape == array.shape
        assert source.read(name).tobytes() == array.tobytes(), name


# --- safetensors ---


def test_reads_what_the_safetensors_library_wrote(tmp_path):
    from safetensors.numpy import save_file

    save_file(ARRAYS, tmp_path / "a.safetensors", metadata={"format": "pt"})
    with open_safetensors(tmp_path / "a.safetensors") as source:
        assert_holds(source, ARRAYS)


def test_the_safetensors_library_reads_what_we_wrote(tmp_path, small_blocks):
    from safetensors import safe_open
    from safetensors.numpy import load_file

    path = tmp_path / "a.safetensors"
    write_weights(path, ArraySource(ARRAYS))
    loaded = load_file(path)
    assert {name: array.tolist() for name, array in loaded.items()} == {
        name: array.tolist() for name, array in ARRAYS.items()
    }
    with safe_open(path, "np") as file:
        assert file.metadata() == {"format": "ms"}


def test_torch_reads_our_bfloat16_safetensors(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    array = bfloat16_array((4, 6))
    write_weights(tmp_path / "a.safetensors", ArraySource({"w": array, "odd": np.zeros(3, np.int8)}))
    loaded = load_file(tmp_path / "a.safetensors")["w"]
    assert loaded.dtype == torch.bfloat16
    assert loaded.view(torch.int16).numpy().tobytes() == array.tobytes()


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -1])
def test_a_cut_safetensors_file_is_named(tmp_path, keep):
    path = tmp_path / "a.safetensors"
    write_weights(path, ArraySource(ARRAYS))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"a\.safetensors is damaged"):
        open_safetensors(path)


# --- MindSpore ckpt ---


def test_reads_what_mindspore_wrote(tmp_path):
    import mindspore as ms

    arrays = {**{name: a for name, a in ARRAYS.items() if a.size}, "brain": bfloat16_array((5, 3))}
    items = [{"name": name, "data": ms.Tensor(array)} for name, array in arrays.items()]
    for crc_check in (False, True):
        path = tmp_path / f"crc_{crc_check}.ckpt"
        ms.save_checkpoint(items, str(path), crc_check=crc_check, append_dict={"note": "text", "epoch": 3})
        with open_ckpt(path) as source:
            assert source.tensors["brain"].dtype.name == "bfloat16"
            assert "note" not in source.tensors  # text beside the weights
            assert int(source.read("epoch")) == 3
            assert_holds_some(source, arrays)


def assert_holds_some(source, arrays):
    for name, array in arrays.items():
        assert source.tensors[name].shape == array.shape, name
        assert source.read(name).tobytes() == array.tobytes(), name


def test_mindspore_reads_what_we_wrote_in_blocks(tmp_path, small_blocks):
    import mindspore as ms

    arrays = {"brain": bfloat16_array((33, 3)), **{n: a for n, a in ARRAYS.items() if a.size}}
    path = tmp_path / "a.ckpt"
    write_weights(path, ArraySource(arrays))
    loaded = ms.load_checkpoint(str(path))
    assert set(loaded) == set(arrays)
    for name, array in arrays.items():
        assert loaded[name].shape == array.shape
        assert loaded[name].asnumpy().tobytes() == array.tobytes(), name


def test_our_bytes_are_protobufs(tmp_path):
    from mindspore.train.checkpoint_pb2 import Checkpoint

    long_name = "x" * 300  # a length that needs a second varint byte
    write_weights(tmp_path / "a.ckpt", ArraySource({long_name: np.ones((2, 200), np.float32)}))
    message = Checkpoint()
    message.ParseFromString((tmp_path / "a.ckpt").read_bytes())
    (value,) = message.value
    assert (value.tag, list(value.tensor.dims), value.tensor.tensor_type) == (long_name, [2, 200], "Float32")
    assert message.SerializeToString() == (tmp_path / "a.ckpt").read_bytes()


def test_a_ckpt_cut_anywhere_is_an_error_or_lacks_tensors(tmp_path):
    """A cut between two messages is a shorter checkpoint; the check against the model finds that."""
    path, cut = tmp_path / "a.ckpt", tmp_path / "cut.ckpt"
    write_weights(path, ArraySource({"a": np.arange(3, dtype=np.float32), "b": np.ones((2, 2), np.float16)}))
    content = path.read_bytes()
    outcomes = set()
    for keep in range(len(content)):
        cut.write_bytes(content[:keep])
        try:
            with open_ckpt(cut) as source:
                outcomes.add(tuple(source.tensors))
        except CheckpointError as error:
            outcomes.add("damaged" if "cut.ckpt is damaged" in str(error) else str(error))
    assert outcomes == {(), ("a",), "damaged"}


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_arbitrary_bytes_never_crash_the_ckpt_reader(tmp_path, content):
    path = tmp_path / "junk.ckpt"
    path.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        open_ckpt(path).close()


def test_a_tensor_stored_twice_is_refused(tmp_path):
    first, second = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    write_weights(first, ArraySource({"a": np.ones(2, np.float32), "b": np.ones(2, np.float32)}))
    second.write_bytes(first.read_bytes() * 2)
    with pytest.raises(CheckpointError, match="a is stored twice"):
        open_ckpt(second)


# --- torch ---


@pytest.mark.parametrize("zipped", [True, False])
def test_reads_torch_files(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    arrays = {name: array for name, array in ARRAYS.items() if array.dtype != np.int64}
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    tensors["brain"] = torch.randn(6, 4).to(torch.bfloat16)
    torch.save(tensors, tmp_path / "w.bin", _use_new_zipfile_serialization=zipped)
    with TorchSource([tmp_path / "w.bin"], "w") as source:
        assert_holds_some(source, arrays)
        assert source.tensors["brain"].dtype.name == "bfloat16"
        expected = tensors["brain"].view(torch.int16).numpy()[1:3, 2:]
        assert source.read_slice("brain", (slice(1, 3), slice(2, 4))).tobytes() == expected.tobytes()


def test_bad_torch_files(tmp_path):
    torch = pytest.importorskip("torch")
    (tmp_path / "text.bin").write_text("hello")
    torch.save([1, 2], tmp_path / "list.bin")
    torch.save({"f": Path("x")}, tmp_path / "code.bin")
    torch.save({"w": torch.ones(4)}, tmp_path / "cut.bin")
    cut = tmp_path / "cut.bin"
    cut.write_bytes(cut.read_bytes()[:-40])
    for name in ("text", "list", "code", "cut"):
        with pytest.raises(CheckpointError, match=f"{name}.bin"):
            open_weights(tmp_path / f"{name}.bin")


# --- all of them ---


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_slice_equals_numpys(tmp_path, data):
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    array = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    slices = []
    for size in shape[: data.draw(st.integers(0, len(shape)))]:
        start = data.draw(st.integers(0, size))
        slices.append(slice(start, data.draw(st.integers(start, size))))
    for suffix in (".safetensors", ".ckpt"):
        path = tmp_path / f"slice{suffix}"
        write_weights(path, ArraySource({"w": array}))
        with open_weights(path) as source:
            part = source.read_slice("w", tuple(slices))
        assert part.shape == array[tuple(slices)].shape
        assert np.array_equal(part, array[tuple(slices)])


def test_a_slice_touches_only_its_bytes(tmp_path, monkeypatch):
    """Of 4 column slices, one reads a quarter of the file's tensor bytes."""
    array = np.arange(64 * 32, dtype=np.float32).reshape(64, 32)
    path = tmp_path / "w.ckpt"
    write_weights(path, ArraySource({"w": array}))
    read = []
    original = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda fd, buffers, at: read.append(n := original(fd, buffers, at)) or n
    )
    with open_weights(path) as source:
        part = source.read_slice("w", (slice(None), slice(8, 16)))
    assert np.array_equal(part, array[:, 8:16])
    assert sum(read) == array.nbytes // 4


def test_memory_is_a_few_blocks_whatever_the_tensor(tmp_path, monkeypatch):
    """16 MB of tensor in blocks of 256 KB, cast to twice the size: never 2 MB at once."""
    monkeypatch.setattr(sources_module, "BLOCK_BYTES", 256 << 10)
    write_weights(tmp_path / "a.safetensors", ArraySource({"w": np.ones((4096, 2048), np.float16)}))
    tracemalloc.start()
    try:
        with open_weights(tmp_path / "a.safetensors") as source:
            write_weights(tmp_path / "b.ckpt", CastSource(source, parse_dtype("fp32")))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "b.ckpt").stat().st_size > 32 << 20
    assert peak < 2 << 20


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, left_overs):
    path = tmp_path / "a.ckpt"
    write_weights(path, ArraySource({"a": np.ones(2, np.float32)}))
    before = path.read_bytes()

    class Failing(ArraySource):
        def read_slice(self, name, slices):
            raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"cannot write .*a\.ckpt: No space left"):
        write_weights(path, Failing({"a": np.ones(2, np.float32)}))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.ckpt"]
    assert left_overs() == []


def test_what_is_not_there_and_what_is_not_known(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        open_weights(tmp_path / "no.ckpt")
    (tmp_path / "w.npz").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"\.ckpt, \.safetensors, \.bin"):
        open_weights(tmp_path / "w.npz")
    with pytest.raises(CheckpointError, match="found none"):
        open_weights(tmp_path)
    with pytest.raises(CheckpointError, match=r"must end with \.ckpt or \.safetensors"):
        write_weights(tmp_path / "w.bin", ArraySource({}))
