"""SwanLab, through its ``swanlab`` package."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from mindrlhf.trainer.trackers.tracker import Histogram, RunStart, Tracker, run_id, sample_cells

PROJECT = "mindrlhf"


class SwanLabTracker(Tracker):
    """One SwanLab experiment, named after the directory of results; SWANLAB_MODE chooses online or not.

    A resumed run continues under its id: SwanLab accepts no second point for a step.
    """

    name = "swanlab"

    def __init__(self) -> None:
        self._run: Any = None

    def start(self, run: RunStart) -> None:
        """Joins or opens the experiment."""
        import swanlab

        self.close()
        self._run = swanlab.init(
            project=os.environ.get("SWANLAB_PROJECT", PROJECT),
            name=run.directory.resolve().name,
            id=run_id(run, self.name),
            resume="allow",
            log_dir=str(run.directory / "swanlab"),
            config=dict(run.configuration),
            # It must not ask for a key on the terminal, which may be unattended, nor take over its output.
            settings=swanlab.Settings(interactive=False),
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Sent under their names."""
        self._run.log(dict(values), step=step)

    def histograms(self, step: int, values: Mapping[str, Histogram]) -> None:
        """Sent as bar charts: SwanLab has no histograms."""
        import swanlab

        charts = {}
        for name, part in values.items():
            bar = swanlab.echarts.Bar()
            bar.add_xaxis([f"{edge:.4g}" for edge in part.edges[:-1]])
            bar.add_yaxis("count", [float(count) for count in part.counts])
            charts[name] = bar
        self._run.log(charts, step=step)

    def samples(self, step: int, name: str, samples: Sequence[Mapping[str, Any]]) -> None:
        """Sent as texts with a caption."""
        import swanlab

        texts = []
        for sample in samples:
            prompt, response, score, kl = sample_cells(sample)
            caption = f"score {score:+.3f} kl {kl:+.3f}"
            texts.append(swanlab.Text(f"{prompt}\n---\n{response}", caption=caption))
        self._run.log({name: texts}, step=step)

    def close(self) -> None:
        """Waits until everything is sent."""
        if self._run is not None:
            import swanlab

            swanlab.finish()
            self._run = None


TRACKER = SwanLabTracker
