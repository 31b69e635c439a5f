"""What config.json of a run holds, and what must never be in it."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

import mindrlhf
from mindrlhf.utils import provenance as module
from mindrlhf.utils.provenance import (
    fingerprints,
    git_revision,
    machine,
    plain,
    provenance,
    versions,
    write_provenance,
)


@dataclass(frozen=True)
class Inner:
    sizes: tuple[int, ...] = (1, 2)
    options: Any = field(default_factory=lambda: MappingProxyType({"lr": 1e-6}))


@dataclass(frozen=True)
class Outer:
    path: Path = Path("a/b.yaml")
    inner: Inner = field(default_factory=Inner)
    name: str | None = None
    on: bool = True


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=directory, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A git tree with one committed package."""
    package = tmp_path / "tree" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    git(package, "init", "-q")
    git(package, "add", "__init__.py")
    git(package, "commit", "-q", "-m", "one")
    return package


def test_dataclasses_become_plain_json() -> None:
    assert plain(Outer()) == {
        "path": "a/b.yaml",
        "inner": {"sizes": [1, 2], "options": {"lr": 1e-6}},
        "name": None,
        "on": True,
    }
    assert plain({"x": [math.nan, math.inf, -math.inf, 1.5], 3: {2, 1}}) == {
        "x": ["nan", "inf", "-inf", 1.5],
        "3": [1, 2],
    }


@pytest.mark.parametrize(
    "key", ["password", "API_KEY", "apikey", "hf_token", "client_secret", "access_token", "token"]
)
def test_secrets_are_hidden(key: str) -> None:
    assert plain({"a": {key: "s3"}}) == {"a": {key: "(hidden)"}}


@pytest.mark.parametrize("key", ["pad_token_id", "stop_token_ids", "tokenizer_path", "max_tokens", "keys"])
def test_names_that_only_look_secret_are_kept(key: str) -> None:
    assert plain({key: 5}) == {key: 5}


def test_who_logs_in_is_cut_out_of_urls() -> None:
    assert plain(["https://me:s3@host/x", "http://host/a@b"]) == [
        "https://(hidden)@host/x",
        "http://host/a@b",
    ]


def test_versions_are_those_installed() -> None:
    found = versions()
    assert found["mindrlhf"] == mindrlhf.__version__
    assert found["numpy"] == np.__version__
    assert found["python"] == platform.python_version()
    assert set(found) == {"mindrlhf", "python", "numpy", "mindspore", "mindformers"}


def test_a_package_that_is_missing_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACKAGES", ("no-such-package-here",))
    assert versions()["no-such-package-here"] is None


def test_git_revision_and_whether_it_was_modified(tree: Path) -> None:
    head = git(tree, "rev-parse", "HEAD")
    assert re.fullmatch(r"[0-9a-f]{40}", head)
    assert git_revision(tree) == {"revision": head, "modified": False}
    (tree / "new.txt").write_text("untracked")
    assert git_revision(tree) == {"revision": head, "modified": False}
    (tree / "__init__.py").write_text("changed = 1\n")
    assert git_revision(tree) == {"revision": head, "modified": True}


def test_a_tree_that_does_not_track_the_package_is_not_ours(tree: Path) -> None:
    inside = tree / "venv" / "site-packages" / "package"
    inside.mkdir(parents=True)
    (inside / "__init__.py").write_text("")
    assert git_revision(inside) is None


def test_no_tree_no_git_no_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "__init__.py").write_text("")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_revision(tmp_path / "absent") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_revision(tmp_path) is None


def test_git_dir_of_a_hook_does_not_mislead(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "-q")
    expected = git_revision(tree)
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert expected is not None
    assert git_revision(tree) == expected


def test_machine_is_this_one() -> None:
    found = machine()
    assert set(found) == {
        "system", "architecture", "processor", "cpu_count", "cpu_usable", "memory_bytes"
    }  # fmt: skip
    assert found["cpu_count"] == os.cpu_count()
    assert 1 <= found["cpu_usable"] <= found["cpu_count"]
    assert 2**28 < found["memory_bytes"] < 2**50


def test_record_is_json_and_holds_nothing_of_the_environment(
    tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_VARIABLE", "a-very-secret-value")
    moment = datetime(2026, 11, 23, 9, 30, 15, 999, tzinfo=timezone(timedelta(hours=8)))
    record = provenance(Outer(), package_directory=tree, now=moment)
    assert list(record) == ["created", "versions", "git", "machine", "configuration"]
    assert record["created"] == "2026-11-23T01:30:15+00:00"
    file = write_provenance(tmp_path / "run", record)
    assert file == tmp_path / "run" / "config.json"
    text = file.read_text(encoding="utf-8")
    assert json.loads(text) == record
    assert "a-very-secret-value" not in text
    assert [path.name for path in file.parent.iterdir()] == ["config.json"]


def test_a_failed_write_keeps_the_older_file(tmp_path: Path) -> None:
    write_provenance(tmp_path, {"a": 1})
    with pytest.raises(TypeError):
        write_provenance(tmp_path, {"a": object()})
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_the_clock_is_read_in_utc() -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    created = datetime.fromisoformat(provenance({})["created"])
    assert before <= created <= datetime.now(UTC)


def test_fingerprints_know_content_names_and_sizes(tmp_path: Path) -> None:
    file, directory = tmp_path / "a.ckpt", tmp_path / "hf"
    (directory / "sub").mkdir(parents=True)
    for path in (file, directory / "x", directory / "sub" / "y"):
        path.write_bytes(b"0123456789")
    before = fingerprints({"one": file, "same": file, "all": directory, "none": None})
    assert (
        before["one"] == before["same"] == {"path": str(file), "bytes": 10, "digest": before["one"]["digest"]}
    )
    assert (before["all"]["bytes"], before.keys()) == (20, {"one", "same", "all"})
    moved = file.rename(tmp_path / "b.ckpt")
    assert fingerprints({"one": moved})["one"] == before["one"] | {"path": str(moved)}
    digests = {before["all"]["digest"]}
    for change in (
        lambda: (directory / "sub" / "y").write_bytes(b"012345678X"),
        lambda: (directory / "x").rename(directory / "z"),
        lambda: (directory / "z").rename(directory / "sub" / "x"),
    ):
        change()
        digests.add(fingerprints({"all": directory})["all"]["digest"])
    assert len(digests) == 4
    linked = tmp_path / "ranks"
    linked.mkdir()
    (linked / "rank_0").symlink_to(directory / "sub")
    found = fingerprints({}, {"all": linked})["all"]
    assert found["bytes"] == sum(file.stat().st_size for file in (directory / "sub").iterdir()) > 0
    assert fingerprints({"gone": tmp_path / "none"})["gone"]["bytes"] == 0, "who reads it says so"


@pytest.mark.parametrize(("size", "seen"), [(1, 1), (7, 7), (12, 12), (13, 12), (40, 12)])
def test_of_large_weights_evenly_spread_blocks_count_and_of_data_every_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, seen: int
) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", 4)
    monkeypatch.setattr(module, "_BLOCKS", 3)
    path = tmp_path / "weights"

    def digests(changed: int | None = None) -> list[str]:
        path.write_bytes(bytes(byte == changed for byte in range(size)))
        found = fingerprints({"data": path}, {"weights": path})
        return [found[name]["digest"] for name in ("data", "weights")]

    plain = digests()
    in_data, counted = (
        [byte for byte in range(size) if digests(byte)[which] != plain[which]] for which in (0, 1)
    )
    assert in_data == list(range(size))
    assert len(counted) == seen
    assert {0, size - 1} <= set(counted)
