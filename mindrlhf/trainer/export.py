"""The trained policy in Hugging Face format, at the end of a job."""

from __future__ import annotations

from pathlib import Path

from mindrlhf.checkpoint.conversion import export_hf
from mindrlhf.configs.flags import ExportOptions
from mindrlhf.configs.keys import ModelConfig
from mindrlhf.models.score_head import SCORE_HEAD
from mindrlhf.trainer.run import Run
from mindrlhf.utils.logging import get_logger

logger = get_logger(__name__)


def export_policy(weights: Path, model: ModelConfig, options: ExportOptions, run: Run) -> None:
    """Merges all ranks' shards into ``--export_hf_dir`` on the main rank; collective.

    Args:
        weights: rank directories.
        model: sizes of the policy.
        options: name the directory, and where the tokenizer files are copied from.
        run: this rank's; it knows whether an export that is there may be replaced.

    Raises:
        MindRLHFError: see :func:`mindrlhf.checkpoint.conversion.export_hf`.
    """
    assert options.export_hf_dir is not None
    if run.runtime.is_main:
        tokenizer = options.tokenizer_path
        export_hf(
            weights,
            options.export_hf_dir,
            model,
            tokenizer_dir=tokenizer if tokenizer and tokenizer.is_dir() else None,
            overwrite=run.replaces["--export_hf_dir"],
            # The value head of a shared critic is not part of the language model.
            leave_out=SCORE_HEAD,
        )
        logger.info("policy in Hugging Face format: %s", options.export_hf_dir)
    run.exchange.barrier()
