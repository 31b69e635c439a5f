"""Everything around the steps of a training job: resuming, evaluating, recording, saving, stopping."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mindrlhf.configs.flags import RunOptions
from mindrlhf.configs.keys import RunConfig
from mindrlhf.runtime.device import check_device, check_matmul_dtype, start_runtime
from mindrlhf.runtime.host_exchange import HostExchange, together
from mindrlhf.runtime.host_memory import release_freed_memory
from mindrlhf.runtime.signals import StopRequest, stop_on_signals
from mindrlhf.runtime.watchdog import Watchdog, supervised
from mindrlhf.trainer.checkpoints import TrainingCheckpoints
from mindrlhf.trainer.console.open import open_console
from mindrlhf.trainer.console.state import RunState
from mindrlhf.trainer.output_paths import further_outputs, replaceable
from mindrlhf.trainer.recipe import HeldOut, Recipe, StepResult
from mindrlhf.trainer.recorder import Recorder
from mindrlhf.trainer.resume import choose_checkpoint
from mindrlhf.trainer.trackers.registry import make_trackers
from mindrlhf.trainer.trackers.tracker import Trackers
from mindrlhf.utils.errors import MindRLHFError, RewardError
from mindrlhf.utils.files import job_lock
from mindrlhf.utils.logging import get_logger
from mindrlhf.utils.ranks import env_world_size
from mindrlhf.utils.seeds import generator_states, restore_generators
from mindrlhf.utils.timers import PhaseListener, PhaseTimer

logger = get_logger(__name__)

_LIMITS = {"iteration": "total_iterations is", "step": "--epochs asks for"}
"""What sets the number of steps, by their unit."""


@dataclass(frozen=True)
class Observers:
    """What may stop a job, and what displays its progress.

    Attributes:
        resources: contexts that are left last, when trackers and console have written all.
    """

    stop: StopRequest
    console: RunState
    trackers: Trackers
    resources: ExitStack = field(default_factory=ExitStack)


@contextmanager
def observed(
    title: str, unit: str, watchdog_timeout: float, trackers: Collection[str]
) -> Iterator[Observers]:
    """Supervises the block, turns SIGTERM and SIGINT into requests to stop, opens console and trackers.

    Args:
        title: what runs.
        unit: what a step is called, ``iteration`` or ``step``.
        watchdog_timeout: seconds without progress after which the job is ended; 0: never.
        trackers: names.
    """
    with (
        supervised(watchdog_timeout),
        ExitStack() as resources,
        stop_on_signals() as stop,
        open_console(title, unit) as console,
        closing(Trackers([console, *make_trackers(trackers)])) as group,
    ):
        yield Observers(stop, console, group, resources)


def start_worker(config: RunConfig, scratch: str, save: Path, observers: Observers) -> HostExchange:
    """Takes the device of a YAML, joins the other workers, and keeps other jobs out of the results.

    Args:
        config: says which device, and what its products need.
        scratch: directory for the files that MindSpore writes of its own accord.
        save: directory of the results.
        observers: of the job.

    Raises:
        MindRLHFError: this machine does not have the device, or cannot do what ``--cpu_matmul_dtype`` asks;
            or the directory is in use or cannot be written.
    """
    check_device(config.context)
    check_matmul_dtype(config.model)
    use_parallel = env_world_size() > 1
    runtime = start_runtime(config.context, use_parallel=use_parallel, scratch_dir=scratch)
    exchange = HostExchange(runtime)
    for is_main in (True, False):  # the main rank first, and no other rank when it is refused
        with together(exchange, f"use --save_ckpt_dir {save}"):
            if runtime.is_main == is_main:
                lock = job_lock(save, joins=not is_main)
                observers.stop.on_first = observers.resources.enter_context(lock)
    return exchange


class Run:
    """One training job on this rank: its current step, and everything around the steps of its recipe.

    Args:
        checkpoints: of the whole training state.
        resume: the checkpoint to resume from; ``None`` for a fresh start.
        rewinds: whether to drop results of an earlier part of this run that wrote no checkpoint.
        observers: none by default.
        listeners: of the phases, after the console.
        experience_file: ``--save_data_file``.
        replaces: see :func:`mindrlhf.trainer.output_paths.replaceable`.

    Attributes:
        step: steps that are done.
        unit: what a step is called.
        timer: of the phases.
        recorder: writes the files of the run; ``None`` on all ranks except the main one.
    """

    def __init__(
        self,
        checkpoints: TrainingCheckpoints,
        *,
        resume: Path | None = None,
        rewinds: bool = False,
        observers: Observers | None = None,
        listeners: Iterable[PhaseListener] = (),
        experience_file: Path | None = None,
        replaces: Mapping[str, bool] | None = None,
    ) -> None:
        self.checkpoints = checkpoints
        self.replaces = replaces or {}
        self.exchange: HostExchange = checkpoints.exchange
        self.runtime = self.exchange.runtime
        self.unit = checkpoints.unit
        self.directory = checkpoints.directory
        self.stop = observers.stop if observers else StopRequest()
        self._console = observers.console if observers else None
        trackers = observers.trackers if observers else Trackers()
        listeners = list(listeners)
        self.timer = PhaseTimer([*([self._console] if self._console else []), *listeners])
        self._watchdogs = [listener for listener in listeners if isinstance(listener, Watchdog)]
        for watchdog in self._watchdogs:
            watchdog.follow(lambda: self._running_step)
        self.recorder = (
            Recorder(self.directory, self.unit, trackers, experience_file) if self.runtime.is_main else None
        )
        self.step = self._running_step = 0
        self._resume, self._rewinds = resume, rewinds
        self._first_step = 0
        self._step_started = 0.0

    def begin(self, recipe: Recipe) -> None:
        """Restores the training state when resuming, and opens the files of results; collective.

        Raises:
            MindRLHFError: see :meth:`resume`.
        """
        if self._resume is not None:
            self.resume(self._resume, recipe)
        elif self._rewinds:
            with together(self.exchange, f"set aside the results in {self.directory}"):
                if self.recorder is not None:
                    self.recorder.set_aside()
        total = recipe.schedule.total
        if self.step >= total:
            limit = _LIMITS[self.unit]
            logger.warning(
                "%d %ss are done, %s %d: nothing is left to do", self.step, self.unit, limit, total
            )
        recipe.begin()
        self._first_step = self.step
        if self._console is not None:
            self._console.total = recipe.schedule.total
            self._console.log_interval = recipe.schedule.log_interval
            self._console.columns, self._console.status = recipe.shown.columns, recipe.shown.status
        if self.recorder is not None:
            self.recorder.begin(self.checkpoints.provenance(), self.step, recipe.shown)
        # MindSpore collects garbage before every compilation; skip the objects that live as long as the job.
        release_freed_memory()
        gc.freeze()

    def resume(self, checkpoint: Path, recipe: Recipe) -> None:
        """Continues from a checkpoint of this or another layout; collective.

        Raises:
            CheckpointError: it does not fit the recipe's models; or later results cannot be set aside.
            MindRLHFError: the recorded evaluations are of other held-out data.
        """
        self.step = self.checkpoints.load(checkpoint, recipe.trained, recipe.stateful)
        self._check_held_out(recipe.held_out)  # before any result is changed
        # With nothing left to do, later results stay: the total may be a typing error.
        last_kept = self.step if self.step < recipe.schedule.total else sys.maxsize
        with together(self.exchange, f"set aside later results in {self.directory}"):
            self.checkpoints.set_newer_aside(last_kept)
            if self.recorder is not None:
                self.recorder.rewind(last_kept)
        logger.info("resumed from %s after %s %d", checkpoint, self.unit, self.step)

    def _check_held_out(self, held_out: HeldOut | None) -> None:
        if held_out is not None and self._main_decides(
            lambda recorder: recorder.has_other_evaluations(held_out, self.step)
        ):
            raise MindRLHFError(
                f"the evaluations in {self.directory} are of other held-out data; resume with the same "
                "held-out data and the same number of prompts, or without evaluation"
            )

    def _main_decides(self, question: Callable[[Recorder], bool]) -> bool:
        """The main rank's answer, on every rank: only the main one has the records; collective."""
        mine = self.recorder is not None and question(self.recorder)
        return bool(self.exchange.every_rank(np.array([mine], np.int32))[0, 0])

    def stop_agreed(self) -> bool:
        """Whether a signal has asked any rank to stop; collective, the same answer on every rank."""
        return self.stop.is_agreed(self.exchange)

    def evaluation_due(self, recipe: Recipe) -> bool:
        """Whether to evaluate now: before the first step, after the last, and every ``eval_interval`` steps.

        An evaluation that is already recorded is not repeated when a run resumes. Collective.
        """
        schedule = recipe.schedule
        interval = schedule.eval_interval
        is_time = self.step == schedule.total or bool(interval and self.step % interval == 0)
        if recipe.held_out is None or not (is_time or self.step == self._first_step):
            return False
        return self._main_decides(lambda recorder: recorder.lacks_evaluation(self.step, is_time=is_time))

    def record_evaluation(self, recipe: Recipe) -> None:
        """Evaluates the recipe and records the result; collective.

        Raises:
            RewardError: a reward function failed; the state after the last whole step is saved first.
        """
        started, held_out = time.perf_counter(), recipe.held_out
        assert held_out is not None
        phase = self.timer.phase("evaluate", held_out.size, held_out.unit)
        with self._saved_when_rewards_fail(recipe), phase:
            result = recipe.evaluate()
        if self.recorder is not None:
            self.recorder.add_evaluation(self.step, result, held_out, time.perf_counter() - started)

    @contextmanager
    def timed_step(self, recipe: Recipe) -> Iterator[None]:
        """Times a step and its phases for :meth:`record`; collective.

        Raises:
            RewardError: a reward function failed; the state after the last whole step is saved first.
        """
        self.timer.reset()
        self._running_step = self.step + 1
        self._step_started = time.perf_counter()
        with self._saved_when_rewards_fail(recipe):
            yield

    @contextmanager
    def _saved_when_rewards_fail(self, recipe: Recipe) -> Iterator[None]:
        """Saves the state of before the block when a reward function fails in it."""
        states = {name: dict(part.state_dict()) for name, part in recipe.stateful.items()}
        generators = generator_states()
        try:
            yield
        except RewardError as error:
            if self.step == self._first_step:
                raise  # nothing has been done since the start
            for name, state in states.items():
                recipe.stateful[name].load_state_dict(state)
            restore_generators(generators)
            saved = self.last_checkpoint or self.save(recipe)
            raise RewardError(
                f"{error}. The state after {self.unit} {self.step} is saved in {saved}: fix the function, "
                "then resume"
            ) from error

    def record(self, recipe: Recipe, result: StepResult) -> None:
        """Counts a step and records its result; collective.

        Raises:
            MindRLHFError: the result says that training cannot continue; the state is saved first.
        """
        seconds = time.perf_counter() - self._step_started
        self.step += 1
        if self.step == self._first_step + 1:
            release_freed_memory()  # every graph has been compiled
        if self.recorder is not None:
            times = {f"time/{phase}": spent for phase, spent in self.timer.seconds.items()}
            times |= {f"time/{self.unit}": seconds, "tokens_per_second": result.tokens / seconds}
            self.recorder.add_step(self.step, result, times, recipe.schedule)
        if result.failure:
            is_last = self.step == recipe.schedule.total
            remedy = f". It was the last {self.unit}: to train on, raise their number" if is_last else ""
            message = f"training fails in {self.unit} {self.step}: {result.failure}{remedy}"
            logger.error("%s", message)  # in case that the state cannot be saved
            raise MindRLHFError(f"{message}. The state is saved in {self.save(recipe)}")

    def save_due(self, recipe: Recipe) -> bool:
        """Whether a checkpoint is due after this step."""
        schedule = recipe.schedule
        at_end = schedule.save_at_end and self.step == schedule.total
        return at_end or bool(schedule.save_interval and self.step % schedule.save_interval == 0)

    def save(self, recipe: Recipe) -> Path:
        """Saves the whole training state; collective. Returns its directory."""
        with self.timer.phase("save"):
            directory = self.checkpoints.save(self.step, recipe.trained, recipe.stateful)
        logger.info("checkpoint: %s", directory)
        return directory

    def finish(self, recipe: Recipe) -> bool:
        """Saves what is not saved yet, and logs how the run ended; collective.

        A run that has ever saved its state saves it at the end, too: resuming it would otherwise repeat
        steps that are done.

        Returns:
            whether all steps are done.

        Raises:
            KeyboardInterrupt: SIGINT stopped the run.
        """
        saves = self.stop.agreed or recipe.schedule.save_at_end or self.checkpoints.has_own
        if saves and self.last_checkpoint is None:
            self.save(recipe)
        for watchdog in self._watchdogs:
            watchdog.suspend("finish")
        if self.stop.agreed:
            assert self.last_checkpoint is not None
            self.stop.leave(self.last_checkpoint)
            return False
        if self.recorder is not None:
            self.recorder.finish()
        return True

    @property
    def last_checkpoint(self) -> Path | None:
        """This run's checkpoint of the current step; ``None`` when it has not been saved."""
        return self.checkpoints.find(self.step)


def open_run(
    options: RunOptions,
    checkpoints: TrainingCheckpoints,
    observers: Observers,
    *,
    computing: frozenset[str],
    device_target: str,
    listeners: Iterable[PhaseListener] = (),
    experience_file: Path | None = None,
) -> Run:
    """The run that the flags ask for; collective.

    Args:
        options: say whether and from where it resumes.
        checkpoints, observers, experience_file: see :class:`Run`.
        computing: phases in which a worker that makes no progress hangs, see :class:`Watchdog`.
        device_target: of the job.
        listeners: of the phases, after a watchdog.

    Raises:
        MindRLHFError: the checkpoint to resume from is missing or damaged.
    """
    replaces = replaceable(options, checkpoints.directory)  # before the record is written anew
    checkpoints.outputs = further_outputs(options)
    return Run(
        checkpoints,
        replaces=replaces,
        resume=choose_checkpoint(checkpoints, options.resume_from, resume_training=options.resume_training),
        rewinds=options.resume_training,
        observers=observers,
        listeners=[
            Watchdog(options.watchdog_timeout, computing=computing, device_target=device_target),
            *listeners,
        ],
        experience_file=experience_file,
    )
