"""What files and flags must not be able to do: run code, leave their directory, eat memory, tell secrets."""

from __future__ import annotations

import ast
import json
import re
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from mindrlhf.checkpoint.ckpt_file import encode_ckpt
from mindrlhf.checkpoint.manifest import read_manifest
from mindrlhf.checkpoint.sources import ArraySource
from mindrlhf.checkpoint.weight_files import open_weights
from mindrlhf.utils.errors import CheckpointError
from mindrlhf.utils.provenance import provenance, write_provenance

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for top in ("mindrlhf", "examples", "scripts") for path in (ROOT / top).rglob("*.py"))

# Modules that unpickle or run what they read, and calls that do.
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "runpy", "code"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "ms.load_checkpoint",
                "mindspore.load_checkpoint", "load_checkpoint", "torch.jit.load", "yaml.unsafe_load",
                "yaml.full_load", "yaml.load_all"}  # fmt: skip
# Imports by a name that is not written at the call: the user's reward function; our own, from fixed tables.
DYNAMIC_IMPORTS = {"mindrlhf/trainer/reward_function.py", "mindrlhf/__init__.py",
                   "mindrlhf/models/families.py", "mindrlhf/trainer/trackers/registry.py",
                   "scripts/make_reference.py"}  # fmt: skip


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def safety_faults(source: str, name: str) -> Iterator[str]:
    """What a source file does that could run code it reads."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            )
            yield from (f"{node.lineno}: imports {module}" for module in modules if module in UNSAFE_MODULES)
        if not isinstance(node, ast.Call):
            continue
        called = _dotted(node.func)
        keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if called in UNSAFE_CALLS:
            yield f"{node.lineno}: calls {called}"
        is_import = called.endswith("import_module") and not isinstance(node.args[0], ast.Constant)
        if is_import and name not in DYNAMIC_IMPORTS:
            yield f"{node.lineno}: imports by name"
        if called == "torch.load" and keywords.get("weights_only") != "True":
            yield f"{node.lineno}: torch.load without weights_only=True"
        if called in ("np.load", "numpy.load") and keywords.get("allow_pickle", "False") != "False":
            yield f"{node.lineno}: unpickles arrays"
        if called == "yaml.load" and keywords.get("Loader") != "_StrictLoader":
            yield f"{node.lineno}: yaml.load with another loader than ours, which is a SafeLoader"
        if keywords.get("shell", "False") != "False":
            yield f"{node.lineno}: a shell"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_what_it_reads(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    assert list(safety_faults(path.read_text(encoding="utf-8"), name)) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from runpy import run_path", "eval('1')", "torch.load(p)", "yaml.load(t, Loader=X)",
        "torch.load(p, weights_only=False)", "np.load(p, allow_pickle=True)", "ms.load_checkpoint(p)",
        "importlib.import_module(name)", "subprocess.run('ls', shell=True)",
    ],
)  # fmt: skip
def test_the_check_sees(source: str) -> None:
    assert list(safety_faults(source, "mindrlhf/x.py"))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple[Callable[[Path], object], tuple[Path]]:
            return Path.touch, (marker,)

    for zipped in (True, False):
        path = tmp_path / f"pytorch_model_{zipped}.bin"
        torch.save({"w": torch.ones(2), "x": Payload()}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match="is damaged or not a torch weights file"):
            open_weights(path)
    assert not marker.exists()


def _safetensors(path: Path, shape: list[int], stop: int, length: int | None = None) -> Path:
    text = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, stop]}}).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + b"\0" * 16)
    return path


def _varint(number: int) -> bytes:
    return bytes([number & 0x7F | 0x80]) + _varint(number >> 7) if number > 0x7F else bytes([number])


def _ckpt(path: Path, dims: list[int], content: bytes = b"\0" * 16, name: bytes = b"w") -> Path:
    tensor = b"".join(b"\x08" + _varint(size) for size in dims) + b"\x12\x07Float32"
    tensor += b"\x1a" + _varint(len(content)) + content
    value = b"\x0a" + _varint(len(name)) + name + b"\x12" + _varint(len(tensor)) + tensor
    path.write_bytes(b"\x0a" + _varint(len(value)) + value)
    return path


HUGE = 1 << 40
CLAIMS: dict[str, Callable[[Path], Path]] = {
    "safetensors of 4 TB": lambda d: _safetensors(d / "a.safetensors", [HUGE], 4 * HUGE),
    "safetensors with a header of 1 TB": lambda d: _safetensors(d / "a.safetensors", [4], 16, HUGE),
    "safetensors whose shape is larger than its bytes": lambda d: _safetensors(
        d / "a.safetensors", [HUGE], 16
    ),
    "safetensors of 40 dimensions": lambda d: _safetensors(d / "a.safetensors", [1] * 39 + [4], 16),
    "safetensors of impossible and no elements": lambda d: _safetensors(d / "a.safetensors", [0, 1 << 62], 0),
    "ckpt of 4 TB": lambda d: _ckpt(d / "a.ckpt", [HUGE]),
    "ckpt of 40 dimensions": lambda d: _ckpt(d / "a.ckpt", [1] * 39 + [4]),
    "ckpt of impossible and no elements": lambda d: _ckpt(d / "a.ckpt", [0, 1 << 62], b""),
    "ckpt of a million dimensions": lambda d: _ckpt(d / "a.ckpt", [1] * 1_000_000),
    "ckpt with a name of 8 MB": lambda d: _ckpt(d / "a.ckpt", [4], name=b"x" * (8 << 20)),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_sizes_are_checked_before_memory_is_taken(tmp_path: Path, claim: str) -> None:
    path = CLAIMS[claim](tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=str(path)):
            open_weights(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_our_hand_made_ckpt_is_one(tmp_path: Path) -> None:
    """Else the claims above would be refused for another reason."""
    with open_weights(_ckpt(tmp_path / "a.ckpt", [4])) as source:
        assert source.read("w").tolist() == [0.0] * 4
    ours = b"".join(encode_ckpt(ArraySource({"w": np.zeros(4, np.float32)})))
    assert (tmp_path / "a.ckpt").read_bytes() == ours
    with open_weights(_safetensors(tmp_path / "a.safetensors", [4], 16)) as source:
        assert source.read("w").tolist() == [0.0] * 4


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "C:x", "x" * 300])
def test_an_index_cannot_leave_its_directory(tmp_path: Path, name: str) -> None:
    outside = tmp_path / "x"
    outside.write_bytes(b"secret")
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(CheckpointError, match="plain file names beside the index"):
        open_weights(directory)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", ""])
def test_a_manifest_cannot_leave_its_directory(tmp_path: Path, name: str) -> None:
    files = {name: {"size": 1, "sha256": "0" * 64}}
    (tmp_path / "manifest.json").write_text(json.dumps({"version": 1, "files": files}))
    with pytest.raises(CheckpointError, match="which is not in the checkpoint"):
        read_manifest(tmp_path)


def test_config_json_of_a_run_holds_nothing_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = {
        name: f"sesame-{number}"
        for number, name in enumerate(
            ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_OWN", "USER")
        )
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    configuration = {"password": "sesame-9", "url": "https://me:sesame-8@host/x", "seed": 1}
    text = write_provenance(tmp_path, provenance(configuration)).read_text(encoding="utf-8")
    assert '"seed": 1' in text
    assert "sesame" not in text


def test_dependencies_are_pinned_exactly() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    setup = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    for node in setup.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List):
            pins += [entry.value for entry in node.value.elts if isinstance(entry, ast.Constant)]
    assert len(pins) > 20
    for pin in pins:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", pin), pin
