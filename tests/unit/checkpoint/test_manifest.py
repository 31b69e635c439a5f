"""Manifests: what is whole passes, and every kind of damage is found by the file's name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from mindrlhf.checkpoint.manifest import (
    MANIFEST_FILE,
    Digest,
    FileRecord,
    digest_file,
    find_damaged,
    find_size_faults,
    read_manifest,
    write_manifest,
)
from mindrlhf.checkpoint.shards import save_shard
from mindrlhf.utils.errors import CheckpointError

FILES = {"policy/rank_0/a.ckpt": b"weights" * 1000, "state.json": b"{}"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    write_manifest(tmp_path, {name: digest_file(tmp_path / name) for name in FILES})
    return tmp_path


def faults(directory: Path) -> tuple[list[str], list[str]]:
    files = read_manifest(directory)
    return find_size_faults(directory, files), find_damaged(directory, files, files)


def test_what_is_written_is_read(checkpoint: Path) -> None:
    assert read_manifest(checkpoint) == {
        name: FileRecord(len(content), hashlib.sha256(content).hexdigest()) for name, content in FILES.items()
    }
    assert faults(checkpoint) == ([], [])


def test_a_truncated_file(checkpoint: Path) -> None:
    with (checkpoint / "policy/rank_0/a.ckpt").open("r+b") as file:
        file.truncate(6999)
    assert faults(checkpoint) == (
        ["policy/rank_0/a.ckpt has 6999 bytes, the manifest says 7000"],
        ["policy/rank_0/a.ckpt"],
    )


def test_a_missing_file(checkpoint: Path) -> None:
    (checkpoint / "policy/rank_0/a.ckpt").unlink()
    assert faults(checkpoint) == (["policy/rank_0/a.ckpt is missing"], ["policy/rank_0/a.ckpt"])


@pytest.mark.parametrize("bit", [0, 7])
@pytest.mark.parametrize("place", [0, 3456, 6999])
def test_one_flipped_bit_of_content(checkpoint: Path, place: int, bit: int) -> None:
    content = bytearray(FILES["policy/rank_0/a.ckpt"])
    content[place] ^= 1 << bit
    (checkpoint / "policy/rank_0/a.ckpt").write_bytes(content)
    assert faults(checkpoint) == ([], ["policy/rank_0/a.ckpt"])


def test_no_manifest_is_no_whole_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no manifest\.json, so this is not a complete checkpoint"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"version": 1}',
        '{"version": 1, "files": {}}',
        '{"version": 1, "files": []}',
        '{"version": 1, "files": {"a": {"size": 1}}}',
        '{"version": 1, "files": {"a": {"size": "many", "sha256": "0"}}}',
        "\x00\x01",
    ],
)
def test_a_damaged_manifest_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=rf"{MANIFEST_FILE}: damaged"):
        read_manifest(tmp_path)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_FILE).write_bytes(b"\xff\xfe{")
    with pytest.raises(CheckpointError, match="damaged"):
        read_manifest(tmp_path)


def test_another_version_is_refused(checkpoint: Path) -> None:
    content = json.loads((checkpoint / MANIFEST_FILE).read_text())
    (checkpoint / MANIFEST_FILE).write_text(json.dumps(content | {"version": 2}))
    with pytest.raises(CheckpointError, match="version 2, this program reads 1"):
        read_manifest(checkpoint)


@pytest.mark.parametrize("name", ["/etc/hostname", "../state.json", "policy/../../x", "."])
def test_names_cannot_leave_the_checkpoint(checkpoint: Path, name: str) -> None:
    content = json.loads((checkpoint / MANIFEST_FILE).read_text())
    content["files"][name] = content["files"]["state.json"]
    (checkpoint / MANIFEST_FILE).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="not in the checkpoint"):
        read_manifest(checkpoint)


def test_a_shard_is_hashed_while_it_is_written(tmp_path: Path) -> None:
    digest = Digest()
    arrays = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(5, np.float32)}
    path = save_shard(tmp_path, 3, arrays, digest=digest)
    content = path.read_bytes()
    assert digest.record == FileRecord(len(content), hashlib.sha256(content).hexdigest())
    assert digest.record == digest_file(path)
