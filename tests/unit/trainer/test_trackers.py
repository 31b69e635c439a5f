"""Trackers: what an event file holds, read back; what the services are told; and that none stops a run."""

from __future__ import annotations

import argparse
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mindrlhf.configs.flags import tracker_names
from mindrlhf.trainer.recipe import EvaluationResult, HeldOut
from mindrlhf.trainer.recorder import Recorder
from mindrlhf.trainer.trackers import registry
from mindrlhf.trainer.trackers.registry import check_trackers, make_trackers
from mindrlhf.trainer.trackers.tensorboard import TensorBoardTracker
from mindrlhf.trainer.trackers.tracker import Histogram, RunStart, Tracker, Trackers
from mindrlhf.utils.errors import MindRLHFError

HELD_OUT = HeldOut("x", 8, "prompts")
SAMPLES = [
    {"prompt": "<|im_start|>a | b\n", "response": "*你好*", "score": 0.5, "kl": 1.25},
    {"prompt": [1, 2], "response": [3], "score": -1.0, "kl": 0.0},
]


def start(directory: Path, first_step: int = 0) -> RunStart:
    return RunStart(directory, {"configuration": {"seed": 1}}, first_step, first_step > 0)


def crc32c(data: bytes) -> int:
    """Castagnoli's CRC, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
    """As TensorFlow stores it."""
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def events_of(path: Path) -> Iterator[Any]:
    """The events of one TFRecord file, checksums held against the data."""
    from tensorboardX.proto.event_pb2 import Event

    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        assert struct.unpack("<I", data[8:12])[0] == masked(data[:8])
        message = data[12 : 12 + length]
        assert struct.unpack("<I", data[12 + length : 16 + length])[0] == masked(message)
        yield Event.FromString(message)
        data = data[16 + length :]


def points(directory: Path) -> dict[str, list[tuple[int, Any]]]:
    """Tag -> (step, value) as TensorBoard shows them: a START drops earlier files' from its step on."""
    from tensorboardX.proto.event_pb2 import SessionLog

    found: dict[str, list[tuple[int, Any]]] = {}
    for path in sorted(directory.iterdir()):
        assert "tfevents" in path.name, "TensorBoard looks for this"
        events = events_of(path)
        assert next(events).file_version == "brain.Event:2"
        for event in events:
            if event.session_log.status == SessionLog.START:
                found = {tag: [p for p in old if p[0] < event.step] for tag, old in found.items()}
            for value in event.summary.value:
                kind = value.WhichOneof("value")
                found.setdefault(value.tag, []).append((event.step, getattr(value, kind)))
    return found


def test_crc_of_the_test_is_the_standard_one() -> None:
    assert crc32c(b"123456789") == 0xE3069283


def test_event_file_holds_scalars_histograms_and_texts(tmp_path: Path) -> None:
    tracker = TensorBoardTracker()
    tracker.start(start(tmp_path))
    tracker.scalars(1, {"objective/kl": 0.5, "lr": np.float32(1e-3)})
    values = np.array([0.0, 1.0, 1.0, 4.0, np.nan])
    tracker.histograms(1, {"distribution/scores": Histogram.of(values, bins=4)})
    tracker.samples(1, "samples", SAMPLES)

    found = points(tmp_path / "tensorboard")  # not closed yet: a person looks while the run goes on

    assert found["objective/kl"] == [(1, 0.5)]
    assert found["lr"] == [(1, pytest.approx(1e-3))]
    [(step, histogram)] = found["distribution/scores"]
    assert step == 1
    assert (histogram.min, histogram.max, histogram.num) == (0, 4, 4)
    assert (histogram.sum, histogram.sum_squares) == (6, 18)
    assert list(histogram.bucket_limit) == [1, 2, 3, 4]
    assert list(histogram.bucket) == [1, 2, 0, 1]
    [(_, tensor)] = found["samples/text_summary"]
    (text,) = (part.decode() for part in tensor.string_val)
    assert text.splitlines()[0] == "| prompt | response | score | kl |"
    assert "&lt;|im" not in text, "a bar would begin a new cell"
    assert "\\*你好\\* | +0.500 | +1.250 |" in text
    assert "| \\[1, 2\\] | \\[3\\] | -1.000 | +0.000 |" in text
    tracker.close()


def test_a_resumed_run_has_no_point_twice(tmp_path: Path) -> None:
    """Killed after iteration 5, resumed after iteration 3: TensorBoard must see 0 .. 6 once each."""
    trackers = Trackers([TensorBoardTracker()])
    records = Recorder(tmp_path, "iteration", trackers)
    trackers.start(start(tmp_path))
    records.add_evaluation(0, EvaluationResult({"eval/scores": 0.0}), HELD_OUT, 1.0)
    for iteration in range(1, 6):
        records.add_metrics({"iteration": iteration, "lr": iteration})
        records.add_samples([{"iteration": iteration, **SAMPLES[0]}])
        trackers.histograms(iteration, {"h": Histogram.of(np.arange(3))})
    records.add_evaluation(3, EvaluationResult({"eval/scores": 3.0}), HELD_OUT, 1.0)

    again = Trackers([TensorBoardTracker()])
    resumed = Recorder(tmp_path, "iteration", again)
    resumed.rewind(3)
    again.start(start(tmp_path, 4))
    for iteration in range(4, 7):
        resumed.add_metrics({"iteration": iteration, "lr": 10 * iteration})
        resumed.add_samples([{"iteration": iteration, **SAMPLES[0]}])
        again.histograms(iteration, {"h": Histogram.of(np.arange(3))})
    again.close()

    found = points(tmp_path / "tensorboard")
    assert found["lr"] == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50), (6, 60)]
    assert found["eval/scores"] == [(0, 0.0), (3, 3.0)]
    for tag in ("samples/text_summary", "h"):
        assert [step for step, _ in found[tag]] == [1, 2, 3, 4, 5, 6]
    assert set(found) == {"lr", "eval/scores", "seconds", "prompts", "samples/text_summary", "h"}, (
        "the step is not a scalar"
    )


class Failing(Tracker):
    name = "failing"

    def __init__(self) -> None:
        self.calls = 0

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.calls += 1
        raise OSError(28, "No space left on device")


def test_a_failing_tracker_is_dropped_with_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = Failing()
    trackers = Trackers([failing, TensorBoardTracker()])
    trackers.start(start(tmp_path))
    records = Recorder(tmp_path, "iteration", trackers)
    for iteration in (1, 2, 3):
        records.add_metrics({"iteration": iteration, "lr": 1.0})
    assert failing.calls == 1
    assert trackers.names == ["tensorboard"]
    assert [step for step, _ in points(tmp_path / "tensorboard")["lr"]] == [1, 2, 3]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("WARNING tracker failing fails and is dropped")
    assert "No space left on device" in line


def test_a_full_disk_ends_the_event_file_and_not_the_run(tmp_path: Path) -> None:
    """With tensorboardX's own writer the run would hang here: its queue is full and nobody reads it."""
    tracker = TensorBoardTracker()
    trackers = Trackers([tracker])
    trackers.start(start(tmp_path))
    tracker._file = open("/dev/full", "wb")  # noqa: SIM115, PTH123
    for step in range(200):
        trackers.scalars(step, {"lr": 1.0})
    assert trackers.names == []


def test_names() -> None:
    assert tracker_names("tensorboard") == ("tensorboard",)
    assert tracker_names(" wandb, TensorBoard,wandb") == ("wandb", "tensorboard")
    assert tracker_names("none") == tracker_names("") == ()
    with pytest.raises(MindRLHFError, match="no tracker 'mlflow'; there are tensorboard, wandb"):
        check_trackers(tracker_names("wandb,mlflow"))
    with pytest.raises(argparse.ArgumentTypeError, match="none stands alone"):
        tracker_names("none,wandb")


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "find_spec", lambda name: None if name == "swanlab" else object())
    check_trackers(("tensorboard", "wandb"))
    with pytest.raises(MindRLHFError, match="not installed: swanlab; pip install swanlab, or leave it out"):
        check_trackers(("tensorboard", "swanlab"))
    assert [tracker.name for tracker in make_trackers(("swanlab", "wandb"))] == ["swanlab", "wandb"]


class Service:
    """Stands for a service's package and for its run; notes what it is told."""

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0

    def init(self, **settings: Any) -> Service:
        self.settings = settings
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Service:
    service = Service()
    module = ModuleType("wandb")
    module.__dict__.update(
        init=service.init,
        api=SimpleNamespace(api_key=None),
        Settings=lambda **options: options,
        Histogram=lambda np_histogram: ("histogram", np_histogram),
        Table=lambda columns, data: ("table", columns, data),
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return service


@pytest.fixture
def swanlab(monkeypatch: pytest.MonkeyPatch) -> Service:
    service = Service()
    module = ModuleType("swanlab")

    class Bar:
        def add_xaxis(self, labels: list[str]) -> None:
            self.labels = labels

        def add_yaxis(self, name: str, counts: list[float]) -> None:
            self.counts = counts

    module.__dict__.update(
        init=service.init,
        finish=service.finish,
        Settings=lambda **options: options,
        echarts=SimpleNamespace(Bar=Bar),
        Text=lambda text, caption: (text, caption),
    )
    monkeypatch.setitem(sys.modules, "swanlab", module)
    return service


def tell_all(name: str, directory: Path, first_step: int = 0) -> None:
    trackers = Trackers(make_trackers([name]))
    trackers.start(start(directory, first_step))
    trackers.scalars(4, {"lr": 1.0})
    trackers.histograms(4, {"h": Histogram.of(np.array([0.0, 1.0, 1.0]), bins=2)})
    trackers.samples(4, "samples", SAMPLES)
    assert trackers.names == [name], "nothing failed"
    trackers.close()
    trackers.close()


def test_weights_and_biases_is_told_all(wandb: Service, tmp_path: Path) -> None:
    directory = tmp_path / "cheerful"
    directory.mkdir()
    tell_all("wandb", directory)
    assert wandb.settings["name"] == "cheerful"
    assert wandb.settings["project"] == "mindrlhf"
    assert wandb.settings["config"] == {"configuration": {"seed": 1}}
    assert wandb.settings["settings"] == {"console": "off", "silent": True}
    first = wandb.settings["id"]
    (_, scalars), (_, histograms), (_, tables) = wandb.logged
    assert scalars == {"lr": 1.0}
    counts, edges = histograms["h"][1]
    assert (counts.tolist(), edges.tolist()) == ([1, 2], [0, 0.5, 1])
    assert tables["samples"][2][0] == ["<|im_start|>a | b\n", "*你好*", 0.5, 1.25]
    assert [step for step, _ in wandb.logged] == [4, 4, 4]
    assert wandb.finished == 1
    tell_all("wandb", directory, first_step=4)
    assert (wandb.settings["id"], wandb.settings["resume"]) == (first, "allow"), "goes on where it was"
    tell_all("wandb", directory)
    assert wandb.settings["id"] != first, "a run that begins anew is another one"


def test_without_a_login_weights_and_biases_is_left_out_and_does_not_ask(
    wandb: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    trackers = Trackers(make_trackers(["wandb"]))
    trackers.start(start(tmp_path))
    assert trackers.names == []
    assert wandb.settings == {}
    assert "not logged in to W&B: wandb login, or set WANDB_MODE=offline" in capsys.readouterr().err


def test_swanlab_is_told_all(swanlab: Service, tmp_path: Path) -> None:
    tell_all("swanlab", tmp_path)
    assert swanlab.settings["settings"] == {"interactive": False}
    first = swanlab.settings["id"]
    (_, scalars), (_, charts), (_, texts) = swanlab.logged
    assert scalars == {"lr": 1.0}
    assert (charts["h"].labels, charts["h"].counts) == (["0", "0.5"], [1.0, 2.0])
    assert texts["samples"][0] == ("<|im_start|>a | b\n\n---\n*你好*", "score +0.500 kl +1.250")
    assert swanlab.finished == 1
    tell_all("swanlab", tmp_path, first_step=4)
    assert swanlab.settings["id"] == first
