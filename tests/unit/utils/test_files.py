"""files.py: whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from mindrlhf.utils.files import atomic_directory, atomic_file


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
