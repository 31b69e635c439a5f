"""Layouts of every model of a job; needs neither device nor weights nor MindSpore."""

from __future__ import annotations

from mindrlhf.configs.schema import JobConfig, RunConfig
from mindrlhf.models.qwen2.layouts import parameter_layouts
from mindrlhf.parallel.layout import Layout, mesh_of


def job_layouts(job: JobConfig) -> dict[str, dict[str, Layout]]:
    """Model name, as in the names of strategy files -> canonical parameter name -> layout.

    With a shared backbone the value head belongs to ``train_policy``; ``critic`` is listed all the same,
    so that the set of files does not depend on the hyper-parameters.
    """

    def language_model(config: RunConfig, *, value_head: bool = False) -> dict[str, Layout]:
        return parameter_layouts(config.model, mesh_of(config), score_head=value_head)

    def scalar_model(config: RunConfig) -> dict[str, Layout]:
        return parameter_layouts(config.model, mesh_of(config), lm_head=False, score_head=True)

    return {
        "infer_policy": language_model(job.infer),
        "train_policy": language_model(job.train, value_head=job.ppo.critic == "shared"),
        "ref": language_model(job.infer),
        "reward": scalar_model(job.reward),
        "critic": scalar_model(job.critic),
    }
