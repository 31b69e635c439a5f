"""A checkpoint that answers: the generating model, compiled for as many prompt columns as are needed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mindrlhf.chat.checkpoint import Checkpoint
from mindrlhf.chat.options import ChatOptions
from mindrlhf.configs.schema import ModelConfig
from mindrlhf.data.tokenizer import chat_stop_ids
from mindrlhf.models.qwen2.generator import GenerationConfig, PPOModelInfer
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layout import Mesh
from mindrlhf.utils.errors import MindRLHFError
from mindrlhf.utils.timers import Timer

SMALLEST_BUCKET = 64
"""Prompt columns of the first model; twice as many whenever a prompt does not fit."""


class Speaker:
    """Generates replies to prompts of any length up to ``limit``. Every rank makes one, in step.

    Prompt columns are a shape that graphs are compiled for, so they come in buckets: 64, 128, 256 and so
    on; the model is built and compiled anew when a prompt outgrows its bucket.

    Args:
        checkpoint: whose weights are used.
        groups: this rank's.
        options: sampling and lengths.
        rows: prompts of one call.
        notice: told when a model is built, and how long that took.

    Attributes:
        limit: most ids of a prompt.
        stop_ids: end a reply.

    Raises:
        MindRLHFError: the model has no room for a reply of ``--max_tokens``.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        groups: Groups,
        options: ChatOptions,
        *,
        rows: int = 1,
        notice: Callable[[str], None],
    ) -> None:
        self.checkpoint, self.options, self.rows = checkpoint, options, rows
        self.stop_ids = chat_stop_ids(checkpoint.tokenizer)
        self.limit = prompt_limit(checkpoint, options)
        self._groups, self._notice = groups, notice
        self._model: PPOModelInfer | None = None
        self._columns = 0

    def stream(self, prompts: Sequence[Sequence[int]], uniforms: np.ndarray) -> Iterator[np.ndarray]:
        """Replies to ``rows`` prompts, (rows, n) int32 ids at a time, until all rows have ended.

        Args:
            prompts: ids, ``limit`` at most each.
            uniforms: (rows, max_tokens) in [0, 1).
        """
        model = self.prepare(max(map(len, prompts)))
        ids = np.full((self.rows, self._columns), self.checkpoint.tokenizer.special.pad, np.int32)
        for row, prompt in enumerate(prompts):
            ids[row, self._columns - len(prompt) :] = prompt
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        return model.stream(ids, lengths, uniforms)

    def prepare(self, length: int) -> PPOModelInfer:
        """The model for prompts of ``length`` ids, made anew when they do not fit into the present one.

        Raises:
            CheckpointError: the weights do not fit.
        """
        if self._model is not None and length <= self._columns:
            return self._model
        columns = bucket(length, self.limit)
        why = "" if self._model is None else f"the conversation has {length} tokens now; "
        with Timer() as timer:
            self._model = self._build(columns)
        self._notice(
            f"{self.checkpoint.name}: {why}ready for prompts of up to {columns} tokens in "
            f"{timer.seconds:.1f} s; the next reply begins once that is compiled"
        )
        self._columns = columns
        return self._model

    def _build(self, columns: int) -> PPOModelInfer:
        options, tokenizer = self.options, self.checkpoint.tokenizer
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
        model = PPOModelInfer(
            self.checkpoint.model,
            self._groups,
            generation,
            batch_size=self.rows,
            decode_steps_per_call=1,  # seen as they come, and compiled in a fraction of the time
        )
        if self._model is None:
            model.load(self.checkpoint.shards(self._groups.mesh, self._groups.rank))
        else:
            # From memory: a run that goes on may have removed its checkpoint meanwhile.
            model.load(self._model.shards())
        self._model = None
        gc.collect()  # a model is held in cycles, and its memory is wanted now
        return model


def bucket(length: int, limit: int) -> int:
    """Prompt columns for ``length`` ids: a power of two from 64, or ``limit`` where that is less."""
    columns = SMALLEST_BUCKET
    while columns < length:
        columns *= 2
    return min(columns, limit)


def prompt_limit(checkpoint: Checkpoint, options: ChatOptions) -> int:
    """Most ids of a prompt that leave room for a reply.

    Raises:
        MindRLHFError: there is no room for both.
    """
    length = checkpoint.model.seq_length
    context = min(options.max_context or length, length)
    if context - options.max_tokens < 1:
        raise MindRLHFError(
            f"{checkpoint.name}: prompt and reply have {context} tokens together (--max_context, or the "
            f"model's own {length}), so --max_tokens {options.max_tokens} leaves the prompt none; lower it"
        )
    return context - options.max_tokens


def speaking_mesh(model: ModelConfig, workers: int) -> Mesh:
    """How ``workers`` hold a model: split as far as its heads allow, the rest are replicas."""
    split = [model.n_kv_heads, model.intermediate_size, model.vocab_size]
    parts = next(mp for mp in range(workers, 0, -1) if all(n % mp == 0 for n in (workers, *split)))
    return Mesh(workers // parts, parts)
