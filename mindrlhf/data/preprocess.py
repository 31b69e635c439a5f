"""From CValues jsonl to a MindRecord prompt data set: which rows, how they are laid out, what is cut."""

from __future__ import annotations

import hashlib
import importlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from mindrlhf.data.columns import (
    LOSS_MASK,
    PRETRAIN_IDS,
    PROMPT_IDS,
    REJECTED_IDS,
    REJECTED_MASK,
    prompt_schema,
)
from mindrlhf.data.jsonl import CValuesReader, Sample, count_lines
from mindrlhf.data.mindrecord import Batch, atomic_records, record_outputs, write_rows
from mindrlhf.data.prompt_format import EncodedSample, PromptFormat
from mindrlhf.data.tokenizer import Tokenizer
from mindrlhf.utils.errors import DataError
from mindrlhf.utils.outputs import check_outputs
from mindrlhf.utils.progress import ProgressBar

Overlong = Literal["drop", "truncate"]


@dataclass
class RowCounts:
    """Counts of what was done with the samples.

    Attributes:
        rows: rows written.
        dropped_prompts, truncated_prompts: prompts longer than P, left out or cut.
        truncated_responses: responses cut at seq_length; they end without a stop token.
        dropped_pairs: pairs left out because one of their responses does not fit in seq_length.
        equal_pairs: pairs left out because both responses are the same, which teaches nothing.
        prompt_tokens, response_tokens: tokens in these rows, stop tokens included.
        rejected_tokens: the same for the rejected responses.
    """

    rows: int = 0
    dropped_prompts: int = 0
    truncated_prompts: int = 0
    truncated_responses: int = 0
    dropped_pairs: int = 0
    equal_pairs: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0
    rejected_tokens: int = 0


class RowBuilder:
    """Lays samples out as rows and counts what does not fit.

    An over-long prompt is dropped, or the front of its text is cut: the template around it stays whole,
    and so do the words next to the response. An over-long response is cut at its end; of a pair, it is
    dropped or cut as an over-long prompt is, since a reward model reads its score at the end.

    Args:
        prefix, suffix: ids around the text of a prompt.
        pad_id: fills rows; never the first token of a prompt.
        max_prompt_length: P, columns of ``prompt_ids``.
        seq_length: columns of ``pretrain_ids`` and ``loss_mask``.
        overlong: what to do with a prompt longer than P, and with pairs that do not fit.
        pairs: lay out the rejected responses too.

    Raises:
        DataError: the lengths leave no room for a prompt or a response.
    """

    def __init__(
        self,
        prefix: Sequence[int],
        suffix: Sequence[int],
        *,
        pad_id: int,
        max_prompt_length: int,
        seq_length: int,
        overlong: Overlong = "drop",
        pairs: bool = False,
    ) -> None:
        faults = []
        if max_prompt_length <= len(prefix) + len(suffix):
            faults.append(
                f"max_prompt_length is {max_prompt_length}, but the template around a prompt alone "
                f"takes {len(prefix) + len(suffix)} tokens: raise it"
            )
        if seq_length <= max_prompt_length:
            faults.append(
                f"seq_length is {seq_length}; it must be greater than max_prompt_length {max_prompt_length} "
                "to leave room for a response"
            )
        if faults:
            raise DataError("; ".join(faults))
        self.counts = RowCounts()
        self._prefix = prefix
        self._pad_id = pad_id
        self._max_prompt_length = max_prompt_length
        self._seq_length = seq_length
        self._overlong = overlong
        self._pairs = pairs

    def build(self, samples: Sequence[EncodedSample]) -> dict[str, np.ndarray]:
        """Arrays of a batch.

        Args:
            samples: B samples.

        Returns:
            ``prompt_ids`` (b, P), ``pretrain_ids`` and ``loss_mask`` (b, seq_length), with pairs
            ``rejected_ids`` and ``rejected_mask`` like these, int32; b = B less the dropped ones.

        Raises:
            DataError: a prompt starts with the pad token, so its length could not be told from its row.
        """
        kept = [
            (prompt, sample)
            for sample in samples
            if (prompt := self._prompt(sample.prompt)) and self._is_pair_kept(sample, len(prompt))
        ]
        prompt_ids = np.full((len(kept), self._max_prompt_length), self._pad_id, np.int32)
        for row, (prompt, _) in enumerate(kept):
            prompt_ids[row, self._max_prompt_length - len(prompt) :] = prompt
            self.counts.prompt_tokens += len(prompt)
        self.counts.rows += len(kept)
        whole, mask = self._sequences([(prompt, sample.response) for prompt, sample in kept])
        self.counts.response_tokens += int(mask.sum())
        columns = {PROMPT_IDS: prompt_ids, PRETRAIN_IDS: whole, LOSS_MASK: mask}
        if self._pairs:
            whole, mask = self._sequences([(prompt, sample.rejected) for prompt, sample in kept])
            self.counts.rejected_tokens += int(mask.sum())
            columns |= {REJECTED_IDS: whole, REJECTED_MASK: mask}
        return columns

    def _sequences(
        self, texts: Sequence[tuple[list[int], list[int] | None]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Prompts with one of their responses, right-padded, and 1 on the response tokens."""
        whole = np.full((len(texts), self._seq_length), self._pad_id, np.int32)
        mask = np.zeros((len(texts), self._seq_length), np.int32)
        for row, (prompt, answer) in enumerate(texts):
            n = len(prompt)
            whole[row, :n] = prompt
            response = self._response(answer, room=self._seq_length - n)
            whole[row, n : n + len(response)] = response
            mask[row, n : n + len(response)] = 1
        return whole, mask

    def _is_pair_kept(self, sample: EncodedSample, prompt_length: int) -> bool:
        if not self._pairs:
            return True
        if sample.response == sample.rejected:
            self.counts.equal_pairs += 1
            return False
        longest = max(len(answer or ()) for answer in (sample.response, sample.rejected))
        if self._overlong == "drop" and longest > self._seq_length - prompt_length:
            self.counts.dropped_pairs += 1
            return False
        return True

    def _prompt(self, prompt: list[int]) -> list[int] | None:
        """The whole prompt, ``None`` when it is to be dropped."""
        room = self._max_prompt_length - len(self._prefix)
        if len(prompt) > self._max_prompt_length:
            if self._overlong == "drop":
                self.counts.dropped_prompts += 1
                return None
            self.counts.truncated_prompts += 1
            prompt = [*self._prefix, *prompt[-room:]]
        if prompt[0] == self._pad_id:
            raise DataError(
                f"a prompt starts with the pad token {self._pad_id}; its row would not show its length"
            )
        return prompt

    def _response(self, answer: list[int] | None, *, room: int) -> list[int]:
        if answer is not None and len(answer) > room:
            self.counts.truncated_responses += 1
        return (answer or [])[:room]


@dataclass(frozen=True)
class PreprocessOptions:
    """What to make of which file.

    Attributes:
        file_path: CValues jsonl.
        output_path: the MindRecord file to write.
        max_prompt_length: P, columns of ``prompt_ids``.
        seq_length: columns of ``pretrain_ids`` and ``loss_mask``.
        chat_template: put prompts into the tokenizer's chat template; otherwise they are taken as they are.
        system_prompt: text of the system turn; ``None`` is the template's default, ``""`` leaves it out.
        overlong: what to do with a prompt longer than P, and with a pair longer than ``seq_length``.
        skip_bad_lines: count bad lines and continue.
        prompt_only: the file has prompts alone.
        pairs: write the rejected responses too, for a reward model.
        overwrite: replace an existing output.
        eval_output_path: a second MindRecord file, for held-out prompts, which ``output_path`` then lacks.
        eval_fraction: of all different prompts, how many are held out; a hash of the text chooses them.
        batch: lines per encoding and rows per write.
    """

    file_path: Path
    output_path: Path
    max_prompt_length: int = 4096
    seq_length: int = 8193
    chat_template: bool = True
    system_prompt: str | None = None
    overlong: Overlong = "drop"
    skip_bad_lines: bool = False
    prompt_only: bool = False
    pairs: bool = False
    overwrite: bool = False
    eval_output_path: Path | None = None
    eval_fraction: float = 0.05
    batch: int = 256


@dataclass(frozen=True)
class PreprocessSummary:
    """Result of :func:`preprocess`.

    Attributes:
        counts: rows, drops, cuts and tokens.
        bad_lines: lines skipped.
        seconds: time for reading, encoding and writing.
        prompt_format: what is around the text of each prompt.
        eval_counts: ``counts`` of the held-out file, ``None`` without one.
    """

    counts: RowCounts
    bad_lines: int
    seconds: float
    prompt_format: PromptFormat
    eval_counts: RowCounts | None = None

    @property
    def rows_per_second(self) -> float:
        """Rows written per second."""
        rows = self.counts.rows + (self.eval_counts.rows if self.eval_counts else 0)
        return rows / max(self.seconds, 1e-9)


def preprocess(
    tokenizer: Tokenizer, options: PreprocessOptions, inputs: Iterable[tuple[str, Path | None]] = ()
) -> PreprocessSummary:
    """Reads, encodes and writes batch by batch; memory does not grow with the file.

    Args:
        tokenizer: see :func:`mindrlhf.data.tokenizer_loading.load_tokenizer`.
        options: see :class:`PreprocessOptions`.
        inputs: further files that must stay as they are, those of the tokenizer above all, with their flags.

    Raises:
        DataError: a bad line (unless skipped), lengths without room, a chat template that cannot be used,
            or nothing left to write. No output file is left then, and older ones are as they were.
        MindRLHFError: an output exists, or would take the place of an input.
    """
    if options.batch < 1:
        raise DataError(f"batch is {options.batch}; it must be at least 1")
    if options.pairs and options.prompt_only:
        raise DataError("--pairs asks for two responses and --prompt_only for none; leave one of them out")
    prompt_format = PromptFormat(
        tokenizer, chat_template=options.chat_template, system_prompt=options.system_prompt
    )
    builders = [
        RowBuilder(
            prompt_format.prefix,
            prompt_format.suffix,
            pad_id=tokenizer.special.pad,
            max_prompt_length=options.max_prompt_length,
            seq_length=options.seq_length,
            overlong=options.overlong,
            pairs=options.pairs,
        )
        for _ in _outputs(options)
    ]
    _check_outputs(options, inputs)
    reader = CValuesReader(
        options.file_path,
        prompt_only=options.prompt_only,
        pairs=options.pairs,
        skip_bad_lines=options.skip_bad_lines,
    )
    lines = count_lines(options.file_path)
    # The two seconds of importing MindSpore are not part of the speed.
    importlib.import_module("mindspore.mindrecord")
    started = time.perf_counter()
    outputs = _outputs(options)
    with (
        ProgressBar("tokenising", lines * len(builders)) as bar,
        atomic_records([path for _, path, _ in outputs]) as temporaries,
    ):
        for path, (_, _, held_out), builder in zip(temporaries, outputs, builders, strict=True):
            samples = _samples(reader, held_out, options.eval_fraction)
            write_rows(
                path,
                prompt_schema(options.max_prompt_length, options.seq_length, pairs=options.pairs),
                _batches(prompt_format, reader, samples, builder, options.batch, bar),
            )
    return PreprocessSummary(
        builders[-1].counts,
        reader.bad_lines,
        time.perf_counter() - started,
        prompt_format,
        builders[0].counts if len(builders) > 1 else None,
    )


def _outputs(options: PreprocessOptions) -> list[tuple[str, Path, bool | None]]:
    """Flags and files; each with whether it takes the held-out prompts, the others, or (``None``) all.

    Each is a separate pass over the jsonl, so that memory does not grow with what is held out.
    """
    flag, path = "--output_path", options.output_path
    if options.eval_output_path is None:
        return [(flag, path, None)]
    return [("--eval_output_path", options.eval_output_path, True), (flag, path, False)]


def _check_outputs(options: PreprocessOptions, inputs: Iterable[tuple[str, Path | None]]) -> None:
    if not 0 < options.eval_fraction < 1:
        raise DataError(f"eval_fraction is {options.eval_fraction}; it must be above 0 and below 1")
    check_outputs(
        [
            output
            for flag, path, _ in _outputs(options)
            for output in record_outputs(flag, path, overwrite=options.overwrite)
        ],
        [("--file_path", options.file_path), *inputs],
    )


def _samples(reader: CValuesReader, held_out: bool | None, fraction: float) -> Iterator[Sample]:
    """The samples of one output."""
    if held_out is None:
        yield from reader
        return
    is_empty = True
    for sample in reader:
        if is_held_out(sample.prompt, fraction) == held_out:
            is_empty = False
            yield sample
    if is_empty:
        raise DataError(
            f"{reader.path}: {'no prompt is held out' if held_out else 'all prompts are held out'} at "
            f"--eval_fraction {fraction:g}; choose another one, or give more prompts"
        )


def _batches(
    prompt_format: PromptFormat,
    reader: CValuesReader,
    samples: Iterator[Sample],
    builder: RowBuilder,
    size: int,
    bar: ProgressBar,
) -> Iterator[Batch]:
    line = 0
    while batch := list(islice(samples, size)):
        yield builder.build(prompt_format.encode_samples(batch))
        bar.update(batch[-1].line - line)
        line = batch[-1].line
    if builder.counts.rows == 0:
        counts = builder.counts
        pairs = (
            f"{counts.dropped_pairs} pairs longer than seq_length and "
            f"{counts.equal_pairs} with equal responses dropped, "
        )
        raise DataError(
            f"{reader.path}: no row is left to write ({counts.dropped_prompts} prompts longer than "
            f"max_prompt_length dropped, {pairs if counts.dropped_pairs or counts.equal_pairs else ''}"
            f"{reader.bad_lines} bad lines); give other data, or raise --max_prompt_length and --seq_length"
        )


def is_held_out(prompt: str, fraction: float) -> bool:
    """Whether a prompt belongs to the held-out part, by a hash of its text.

    The choice depends on nothing else, so it is the same in every run, growing data moves no prompt from
    one part to the other, and a prompt that occurs twice is in the same part both times.

    Args:
        prompt: the user's text.
        fraction: 0 .. 1, of all different prompts.
    """
    digest = hashlib.sha256(prompt.encode()).digest()
    return int.from_bytes(digest[:8], "little") < fraction * 2**64
