"""Generates replies with a saved model, compiled for the number of prompt columns that prompts need."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mindrlhf.chat.saved_model import SavedModel
from mindrlhf.configs.flags import ChatOptions
from mindrlhf.configs.keys import ModelConfig
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layout import Mesh
from mindrlhf.utils.errors import MindRLHFError
from mindrlhf.utils.timers import Timer

if TYPE_CHECKING:
    from mindrlhf.models.generator import PPOModelInfer

SMALLEST_BUCKET = 64
"""Prompt columns of the first graph; they double when a prompt does not fit."""


class ReplyGenerator:
    """Generates replies to prompts of any length up to ``limit``. Collective: every rank makes one.

    Graphs are compiled for a number of prompt columns, so columns come in buckets: 64, 128, 256 and so on.
    The model is built and compiled again when a prompt outgrows its bucket.

    Args:
        model: whose weights are used.
        groups: this rank's.
        options: sampling and lengths.
        stop_ids: end a reply.
        rows: prompts per call.
        notice: called with a line when a model has been built.

    Attributes:
        limit: maximum number of ids of a prompt.

    Raises:
        MindRLHFError: the model has no room for a reply of ``--max_tokens``.
    """

    def __init__(
        self,
        model: SavedModel,
        groups: Groups,
        options: ChatOptions,
        stop_ids: Sequence[int],
        *,
        rows: int = 1,
        notice: Callable[[str], None],
    ) -> None:
        self.model, self.options, self.stop_ids, self.rows = model, options, tuple(stop_ids), rows
        self.limit = prompt_limit(model, options)
        self._groups, self._notice = groups, notice
        self._built: PPOModelInfer | None = None
        self._columns = 0

    def stream(self, prompts: Sequence[Sequence[int]], uniforms: np.ndarray) -> Iterator[np.ndarray]:
        """Yields replies to ``rows`` prompts as (rows, n) int32 ids, until all rows have ended.

        Args:
            prompts: ids, at most ``limit`` each.
            uniforms: (rows, max_tokens) in [0, 1).
        """
        generator = self.prepare(max(map(len, prompts)))
        ids = np.full((self.rows, self._columns), self.model.tokenizer.special.pad, np.int32)
        for row, prompt in enumerate(prompts):
            ids[row, self._columns - len(prompt) :] = prompt
        return generator.stream(ids, np.array([len(prompt) for prompt in prompts], np.int32), uniforms)

    def prepare(self, length: int) -> PPOModelInfer:
        """The generating model for prompts of ``length`` ids; built again when they do not fit.

        Raises:
            CheckpointError: the weights do not fit.
        """
        if self._built is not None and length <= self._columns:
            return self._built
        columns = bucket(length, self.limit)
        why = "" if self._built is None else f"the conversation has {length} tokens now; "
        with Timer() as timer:
            self._built = self._build(columns)
        self._notice(
            f"{self.model.name}: {why}ready for prompts of up to {columns} tokens in "
            f"{timer.seconds:.1f} s; the next reply begins once that is compiled"
        )
        self._columns = columns
        return self._built

    def _build(self, columns: int) -> PPOModelInfer:
        from mindrlhf.models.generator import GenerationConfig, PPOModelInfer  # takes seconds to import

        options, tokenizer = self.options, self.model.tokenizer
        generation = GenerationConfig(
            max_prompt_length=columns,
            max_response_length=options.max_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            do_sample=not options.greedy,
            stop_token_ids=self.stop_ids,
            pad_token_id=tokenizer.special.pad,
            valid_vocab_size=tokenizer.size,
        )
        generator = PPOModelInfer(
            self.model.sizes.model,
            self._groups,
            generation,
            batch_size=self.rows,
            decode_steps_per_call=1,  # tokens are seen as they come, and compiling is much faster
        )
        if self._built is None:
            generator.load(self.model.shards(self._groups.mesh, self._groups.rank))
        else:
            # From memory: a run that is still training may have removed its checkpoint meanwhile.
            generator.load(self._built.shards())
        self._built = None
        gc.collect()  # reference cycles keep the previous model alive, and its memory is needed now
        return generator


def bucket(length: int, limit: int) -> int:
    """Prompt columns for ``length`` ids: a power of two from 64, or ``limit`` where that is less."""
    columns = SMALLEST_BUCKET
    while columns < length:
        columns *= 2
    return min(columns, limit)


def prompt_limit(model: SavedModel, options: ChatOptions) -> int:
    """The maximum number of ids of a prompt that leaves room for a reply.

    Raises:
        MindRLHFError: prompt and reply do not both fit.
    """
    length = model.sizes.model.seq_length
    context = min(options.max_context or length, length)
    if context - options.max_tokens < 1:
        raise MindRLHFError(
            f"{model.name}: prompt and reply have {context} tokens together (--max_context, or the "
            f"model's own {length}), so --max_tokens {options.max_tokens} leaves the prompt none; lower it"
        )
    return context - options.max_tokens


def mesh_for_workers(model: ModelConfig, workers: int) -> Mesh:
    """Splits a model over ``workers`` as far as its heads allow; the other workers are replicas."""
    split = [model.n_kv_heads, model.intermediate_size, model.vocab_size]
    parts = next(mp for mp in range(workers, 0, -1) if all(n % mp == 0 for n in (workers, *split)))
    return Mesh(workers // parts, parts)
