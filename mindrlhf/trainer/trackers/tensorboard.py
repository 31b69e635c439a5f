"""TensorBoard event files, written with tensorboardX's messages.

Not with its ``SummaryWriter``: that hands events to a thread through a bounded queue, and when the thread
has died of a full disk the training waits on the queue forever.
"""

from __future__ import annotations

import importlib
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from mindrlhf.trainer.trackers.tracker import SAMPLE_COLUMNS, Histogram, RunStart, Tracker, sample_cells
from mindrlhf.utils.tables import markdown_table

DIRECTORY = "tensorboard"
_SHOWN_CHARACTERS = 2000  # of a text; samples.jsonl has the whole text


class TensorBoardTracker(Tracker):
    """Writes ``tensorboard/`` of the results; one event file each time a run starts or is resumed.

    A resumed run's file begins with the mark at which TensorBoard drops what earlier files hold from that
    step on.
    """

    name = "tensorboard"

    def __init__(self) -> None:
        self._file: BinaryIO | None = None

    def start(self, run: RunStart) -> None:
        """Opens an event file."""
        _import_tensorboardx()
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self.close()
        directory = run.directory / DIRECTORY
        directory.mkdir(parents=True, exist_ok=True)
        self._file = (directory / _file_name(directory)).open("xb")
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=run.first_step, session_log=start))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One event with all scalars."""
        from tensorboardX.proto.summary_pb2 import Summary

        self._add(
            step, [Summary.Value(tag=name, simple_value=float(value)) for name, value in values.items()]
        )

    def histograms(self, step: int, values: Mapping[str, Histogram]) -> None:
        """One event with all histograms."""
        from tensorboardX.proto.summary_pb2 import HistogramProto, Summary

        self._add(
            step,
            [
                Summary.Value(
                    tag=name,
                    histo=HistogramProto(
                        min=float(part.edges[0]),
                        max=float(part.edges[-1]),
                        num=float(part.counts.sum()),
                        sum=part.sum,
                        sum_squares=part.sum_squares,
                        bucket_limit=part.edges[1:].tolist(),
                        bucket=part.counts.tolist(),
                    ),
                )
                for name, part in values.items()
            ],
        )

    def samples(self, step: int, name: str, samples: Sequence[Mapping[str, Any]]) -> None:
        """One Markdown table, which TensorBoard's TEXT tab shows."""
        from tensorboardX.summary import text

        rows = []
        for sample in samples:
            prompt, response, score, kl = sample_cells(sample)
            rows.append((_shortened(prompt), _shortened(response), f"{score:+.3f}", f"{kl:+.3f}"))
        self._add(step, text(name, markdown_table(SAMPLE_COLUMNS, rows)).value)

    def close(self) -> None:
        """Closes the event file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _add(self, step: int, values: Sequence[Any]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def _write(self, event: Any) -> None:
        """One record of the TFRecord format: length, its checksum, the message, its checksum."""
        from tensorboardX.record_writer import masked_crc32c

        if self._file is None:
            raise RuntimeError("the tracker was not started")
        message = event.SerializeToString()
        length = struct.pack("<Q", len(message))
        sums = [struct.pack("<I", masked_crc32c(part)) for part in (length, message)]
        self._file.write(length + sums[0] + message + sums[1])
        self._file.flush()


TRACKER = TensorBoardTracker


def _import_tensorboardx() -> None:
    """Imports it without torch, which it would load where that is installed: 3 s and 190 MiB for nothing."""
    if "tensorboardX" in sys.modules or "torch" in sys.modules:
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        importlib.import_module("tensorboardX")
    finally:
        del sys.modules["torch"]


def _file_name(directory: Path) -> str:
    """TensorBoard reads files in the order of their names: later ones must sort last."""
    number = sum(1 for _ in directory.iterdir())
    return f"events.out.tfevents.{int(time.time()):010d}.{number:04d}"


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " ..."
