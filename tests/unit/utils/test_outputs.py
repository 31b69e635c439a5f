"""outputs.py: what an output must not be, hold or lie in, and what it may replace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mindrlhf.utils.errors import MindRLHFError
from mindrlhf.utils.outputs import Output, check_outputs, directory_of, file_of

TEXT = file_of("a text", lambda path: path.read_text().startswith("text"))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, beside a directory ``data`` with two files."""
    for name in ("a", "b"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_text(f"text {name}")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def refusal(*outputs: Output, **inputs: str) -> str:
    with pytest.raises(MindRLHFError) as error:
        check_outputs(outputs, ((f"--{name}", Path(path)) for name, path in inputs.items()))
    return str(error.value)


def new(path: str | Path, **settings: bool) -> Output:
    return Output("--out", Path(path), TEXT, **settings)


def test_what_has_nothing_to_do_with_the_inputs_is_let_through(here: Path) -> None:
    for path in ("new", "../data2", "not/yet/there"):
        check_outputs([new(path), new(f"{path}.db")], [("--in", here.parent / "data"), ("--none", None)])
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("path", "relation"),
    [
        ("../data", "is --in ../data"), ("../here/../data/", "is --in ../data"), ("link", "is --in ../data"),
        ("../data/a", "is --in ../data/a"), ("hard", "is --in ../data/a"), ("..", "holds --in ../data"),
        ("../data/new", "lies in --in ../data"), ("link/new/x", "lies in --in ../data"),
    ],
)  # fmt: skip
def test_an_input_is_recognised_under_every_name(here: Path, path: str, relation: str) -> None:
    (here / "link").symlink_to("../data")
    (here / "hard").hardlink_to("../data/a")
    assert refusal(new(path, overwrite=True), **{"in": "../data"}) == (
        f"--out {Path(path)}: {relation}; give another path"
    )


def test_a_file_that_an_input_links_to(here: Path) -> None:
    (here.parent / "data" / "blob").symlink_to(here / "elsewhere")
    (here / "elsewhere").write_text("text")
    assert "is --in ../data/blob" in refusal(new("elsewhere", overwrite=True), **{"in": "../data"})


def test_a_new_name_in_the_working_directory_may_lie_in_an_input(here: Path) -> None:
    (here / "there").write_text("text")
    check_outputs([new("new")], [("--in", Path())])
    assert "is --in there" in refusal(new("there", overwrite=True), **{"in": "."})
    assert "is --in ." in refusal(new("../here"), **{"in": "."})
    assert "the working directory" in refusal(new("../here"))


def test_files_behind_links_are_inputs(here: Path) -> None:
    for place in ("store/rank_0", "ranks/rank_1"):
        (here / place).mkdir(parents=True)
    (here / "store" / "rank_0" / "part").write_text("text")
    (here / "store" / "file").write_text("text")
    (here / "ranks" / "rank_0").symlink_to(here / "store" / "rank_0")
    (here / "ranks" / "rank_1" / "part").symlink_to(here / "store" / "file")
    for path in ("store/rank_0/part", "store/file"):
        assert "is --in ranks/rank_" in refusal(new(path, overwrite=True), **{"in": "ranks"})


def test_outputs_are_held_against_each_other() -> None:
    assert "--out new: holds --out new/x" in refusal(new("new/x"), new("new"))
    assert "--out new: is --out x/../new" in refusal(new("new"), new("x/../new"))


def test_a_directory_that_is_added_to() -> None:
    run = Output("--run", Path("run"), names=re.compile(r"step_\d+"))
    check_outputs([run, new("run/page")], [("--in", Path("run/weights"))])
    assert "--run run: writes in --out run/step_1/x" in refusal(run, new("run/step_1/x"))
    assert "--run run: writes in --in run/step_1" in refusal(run, **{"in": "run/step_1"})
    assert "--run run: lies in --in run" in refusal(run, **{"in": "run"})


def test_what_is_there_is_replaced_by_its_kind_alone_and_when_told(here: Path) -> None:
    (here / "empty").mkdir()
    (here / "ours").write_text("text")
    (here / "other").write_text("other")
    check_outputs([new("ours", overwrite=True)], [])
    assert "ours: exists; give another path, or --overwrite" in refusal(new("ours"))
    for overwrite in (False, True):
        assert "other: is not a text" in refusal(new("other", overwrite=overwrite))
        assert "empty: is a directory, not a text" in refusal(new("empty", overwrite=overwrite))
    kind = directory_of("a set", lambda entry: entry.name in "ab", lambda path: (path / "a").exists())
    check_outputs([Output("--out", Path("empty"), kind)], [])
    for name in ("b", "x"):
        (here / "empty" / name).touch()
        found = refusal(Output("--out", Path("empty"), kind, overwrite=True))
        assert {"b": "empty: is not a set;", "x": "is not a set alone, it also holds x;"}[name] in found


def test_a_place_where_nothing_can_be_written() -> None:
    assert "cannot be written (" in refusal(new("/proc/none/x"))
