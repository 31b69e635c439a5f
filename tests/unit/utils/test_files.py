"""files.py: whole or not at all."""

from __future__ import annotations

import fcntl
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from mindrlhf.utils.errors import CheckpointError, MindRLHFError
from mindrlhf.utils.files import (
    atomic_directory,
    atomic_file,
    job_lock,
    parents_of,
    probe_directory,
    read_json_object,
)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', r"not JSON \(keys occur twice: 'b'\); fix it or copy it again"),
        (b'{"a": "\xff"}', r"not JSON \('utf-8'"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "expected a JSON object, found a JSON list"),
        (None, r"cannot be read \(No such file or directory\)"),
    ],
)
def test_a_json_object(tmp_path: Path, content: bytes | None, fault: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": {}}')
    assert read_json_object(path, CheckpointError) == {"a": {}}
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"a\.json: {fault}"):
        read_json_object(path, CheckpointError)


def test_file_appears_only_when_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "weights.ckpt"
    with atomic_file(target) as temporary:
        assert temporary.parent == target.parent
        assert temporary.name.startswith(".weights.ckpt.tmp-")
        temporary.write_bytes(b"new")
        assert not target.exists()
    assert target.read_bytes() == b"new"
    assert [entry.name for entry in target.parent.iterdir()] == ["weights.ckpt"]


def test_failed_file_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    target.write_text("old")

    def fail_half_way() -> None:
        with atomic_file(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail_half_way()
    assert target.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_file_never_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "a"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_directory_appears_only_when_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic_directory(target) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "x").write_text("1")
        assert not target.exists()
    assert (target / "sub" / "x").read_text() == "1"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_directory_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "stale").write_text("old")
    with atomic_directory(target) as temporary:
        (temporary / "fresh").write_text("new")
        assert (target / "stale").read_text() == "old"
    assert [entry.name for entry in target.iterdir()] == ["fresh"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_failed_directory_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "kept").write_text("old")

    def fail_half_way() -> None:
        with atomic_directory(target) as temporary:
            (temporary / "half").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_half_way()
    assert [entry.name for entry in target.iterdir()] == ["kept"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_failed_swap_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "kept").write_text("old")
    real_replace = Path.replace

    def replace(self: Path, other: Path) -> Path:
        if ".tmp-" in self.name:
            raise OSError("disk full")
        return real_replace(self, other)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(OSError, match="disk full"), atomic_directory(target):
        pass
    assert [entry.name for entry in target.iterdir()] == ["kept"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("make", [atomic_file, atomic_directory])
def test_directories_made_for_nothing_are_removed(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(OSError, match="disk full"), make(tmp_path / "there/a/b/out"):
        raise OSError("disk full")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["there"]


def test_directories_that_others_use_stay(tmp_path: Path) -> None:
    def fail_beside_others() -> None:
        with parents_of(tmp_path / "a/b/out"):
            (tmp_path / "a/theirs").touch()
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail_beside_others()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "theirs"]


def test_a_probe_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for place in (tmp_path, tmp_path / "not/yet/there"):
        probe_directory(place)
    for place in (file, file / "below", Path("/proc/none/x")):
        with pytest.raises(OSError):  # noqa: PT011  which one depends on the system
            probe_directory(place)
    assert list(tmp_path.iterdir()) == [file]


def test_a_job_keeps_others_out_until_its_last_process_has_left(tmp_path: Path) -> None:
    save = tmp_path / "deep" / "save"
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(job_lock(save))
        second.enter_context(job_lock(save, joins=True))
        first.close()
        with (
            pytest.raises(MindRLHFError, match=r"save is in use by process \d+ on .* since "),
            job_lock(save),
        ):
            pass
    assert list(save.iterdir()) == []
    with job_lock(save):
        pass


def test_a_lock_dies_with_its_process_and_leaves_nothing_of_a_job_that_fails(tmp_path: Path) -> None:
    save = tmp_path / "save"
    held = "with files.job_lock(files.Path(sys.argv[1])): print(flush=True); input()"
    command = [sys.executable, "-c", f"import sys\nfrom mindrlhf.utils import files\n{held}", save]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"\n"
    with pytest.raises(MindRLHFError, match=f"in use by process {holder.pid} on"), job_lock(save):
        pass
    holder.kill()
    holder.communicate()
    assert [path.name for path in save.iterdir()] == [".lock"], "as a killed job leaves it"
    save.joinpath(".lock").write_text("a longer text than ours, of some job long ago" * 9)
    with job_lock(save):
        assert re.fullmatch(r"process \d+ on .*:\d\d\n", (save / ".lock").read_text())
    assert list(save.iterdir()) == []
    with pytest.raises(KeyboardInterrupt), job_lock(tmp_path / "not" / "there"):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["save"]


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(descriptor: int, kind: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", missing)
    with job_lock(tmp_path):
        assert f"{tmp_path} cannot be locked (Function not implemented)" in caplog.text


def test_a_directory_that_cannot_be_locked_for_writing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        CheckpointError, match=r"--save_ckpt_dir .*below: cannot be written \(Not a directory"
    ):
        job_lock(tmp_path / "file" / "below").__enter__()
