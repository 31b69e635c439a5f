"""Layouts of every model of a job; needs neither device nor weights nor MindSpore."""

from __future__ import annotations

from mindrlhf.configs.keys import JobConfig, RunConfig
from mindrlhf.models.families import family_of
from mindrlhf.parallel.layout import Layout, mesh_of


def job_layouts(job: JobConfig) -> dict[str, dict[str, Layout]]:
    """Model name, as in the names of strategy files -> canonical parameter name -> layout.

    With a shared backbone the value head belongs to ``train_policy``, and ``critic`` is listed as well;
    with ``critic: none`` it is not.
    """

    def layouts(config: RunConfig, **heads: bool) -> dict[str, Layout]:
        result: dict[str, Layout] = family_of(config.model).layouts.parameter_layouts(
            config.model, mesh_of(config), **heads
        )
        return result

    models = {
        "infer_policy": layouts(job.infer),
        "train_policy": layouts(job.train, score_head=job.ppo.critic == "shared"),
        "ref": layouts(job.infer),
        "reward": layouts(job.reward, lm_head=False, score_head=True),
    }
    if job.ppo.critic != "none":
        models["critic"] = layouts(job.critic, lm_head=False, score_head=True)
    return models
