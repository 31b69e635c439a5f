"""The training loop. Every recipe (PPO, SFT, reward model) runs through :func:`train`."""

from __future__ import annotations

from mindrlhf.trainer.recipe import Recipe
from mindrlhf.trainer.run import Run


def train(run: Run, recipe: Recipe) -> bool:
    """Trains until all steps are done or a signal stops the run; collective.

    Returns:
        whether all steps are done; otherwise the state has been saved.

    Raises:
        KeyboardInterrupt: SIGINT stopped the run; the state has been saved.
        MindRLHFError: a result says that training cannot continue, or a reward function failed, and the
            state after the last whole step has been saved; or a step or an evaluation failed otherwise, and
            the last checkpoint is what is left.
    """
    run.begin(recipe)
    while True:
        stopped = run.stop_agreed()
        if not stopped and run.evaluation_due(recipe):
            run.record_evaluation(recipe)
        if stopped or run.step >= recipe.schedule.total:
            break
        with run.timed_step(recipe):
            result = recipe.step(run.step)
        run.record(recipe, result)
        if run.save_due(recipe):
            run.save(recipe)
    return run.finish(recipe)
