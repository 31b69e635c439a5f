"""From the ids of samples to the arrays of the prompt data set, with an account of what was cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mindrlhf.data.chat import EncodedSample, PromptFormat
from mindrlhf.data.schema import LOSS_MASK, PRETRAIN_IDS, PROMPT_IDS, REJECTED_IDS, REJECTED_MASK
from mindrlhf.utils.errors import DataError

Overlong = Literal["drop", "truncate"]


@dataclass
class RowCounts:
    """What became of the samples.

    Attributes:
        rows: rows made.
        dropped_prompts, truncated_prompts: prompts longer than P, left out or cut.
        truncated_responses: responses cut at seq_length; they end without a stop token.
        dropped_pairs: pairs left out because one of their responses does not fit in seq_length.
        equal_pairs: pairs left out because both responses are the same, which says nothing.
        prompt_tokens, response_tokens: tokens in the rows made, stop tokens included.
        rejected_tokens: the same of the rejected responses.
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
        prompt_format: what stands around a prompt.
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
        prompt_format: PromptFormat,
        *,
        pad_id: int,
        max_prompt_length: int,
        seq_length: int,
        overlong: Overlong = "drop",
        pairs: bool = False,
    ) -> None:
        faults = []
        if max_prompt_length <= prompt_format.overhead:
            faults.append(
                f"max_prompt_length is {max_prompt_length}, but the template around a prompt alone "
                f"takes {prompt_format.overhead} tokens: raise it"
            )
        if seq_length <= max_prompt_length:
            faults.append(
                f"seq_length is {seq_length}; it must be greater than max_prompt_length {max_prompt_length} "
                "to leave room for a response"
            )
        if faults:
            raise DataError("; ".join(faults))
        self.counts = RowCounts()
        self._format = prompt_format
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
            if (prompt := self._prompt(sample.text)) and self._is_pair_kept(sample, len(prompt))
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
        if self._overlong == "drop" and longest >= self._seq_length - prompt_length:
            self.counts.dropped_pairs += 1
            return False
        return True

    def _prompt(self, text: list[int]) -> list[int] | None:
        """The whole prompt, ``None`` when it is to be dropped."""
        around = self._format
        room = self._max_prompt_length - len(around.prefix) - len(around.suffix)
        if len(text) > room:
            if self._overlong == "drop":
                self.counts.dropped_prompts += 1
                return None
            self.counts.truncated_prompts += 1
            text = [*around.lead_ids, *text[len(text) - (room - len(around.lead_ids)) :]]
        prompt = [*around.prefix, *text, *around.suffix]
        if prompt[0] == self._pad_id:
            raise DataError(
                f"a prompt starts with the pad token {self._pad_id}; its row would not show its length"
            )
        return prompt

    def _response(self, answer: list[int] | None, *, room: int) -> list[int]:
        if answer is None:
            return []
        if len(answer) < room:
            return [*answer, self._format.stop]
        self.counts.truncated_responses += 1
        return answer[:room]
