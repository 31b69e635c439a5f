"""``PPOModelInfer``: the policy as a generator of responses, with the log-probs of what it sampled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from mindspore import Tensor, nn, ops

from mindrlhf.configs.keys import ModelConfig
from mindrlhf.models.decode_schedule import decode_schedule
from mindrlhf.models.device_memory import DeviceMemory, ParameterStore, empty
from mindrlhf.models.families import family_of
from mindrlhf.models.sampling import VocabParallelSampler
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layout import Layout
from mindrlhf.utils.sizes import exact_div
from mindrlhf.utils.timers import PhaseTimer

Shards = Mapping[str, np.ndarray | Tensor] | Iterable[tuple[str, np.ndarray | Tensor]]


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How responses are drawn.

    Attributes:
        max_prompt_length: P, columns of a left-padded prompt.
        max_response_length: R, maximum tokens of a response.
        temperature: divides the logits, for sampling and for the log-probs.
        top_k: sample from the k most likely ids; 0: from all.
        top_p: sample from the most likely ids that together have this mass; 1: from all.
        do_sample: draw; otherwise take the most likely id.
        stop_token_ids: a response ends with the first of these, which belongs to it.
        pad_token_id: fills the columns after the end.
        valid_vocab_size: ids from this one on have probability 0.
    """

    max_prompt_length: int
    max_response_length: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    do_sample: bool = True
    stop_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0
    valid_vocab_size: int


class GenerationOutput(NamedTuple):
    """Responses of B prompts.

    Attributes:
        response_ids: (B, R) int32, pad after the stop token.
        logprobs: (B, R) float32, log-prob of each token under the temperature-scaled distribution over
            the valid ids, before top-k and top-p; 0 after the end.
        lengths: (B,) int32, tokens of the response, the stop token included.
        stopped: (B,) bool, whether a stop token was drawn.
    """

    response_ids: np.ndarray
    logprobs: np.ndarray
    lengths: np.ndarray
    stopped: np.ndarray


class PPOModelInfer:
    """Generates responses in graph mode: a prefill graph and a decode graph, each compiled once.

    All shapes are fixed by the constructor, loading weights writes in place, and the column is an input
    of the decode graph, so nothing is compiled again in later calls or iterations. The parameters are
    zeros until :meth:`load`. Ranks of one model-parallel group must call :meth:`generate` with the same
    rows; data-parallel replicas do not communicate.

    Args:
        config: model sizes and types (on CPU everything is float32).
        groups: the rank's groups in the mesh of this model.
        generation: lengths and sampling.
        batch_size: rows of one pass on this rank; :meth:`generate` takes any multiple.
        decode_steps_per_call: tokens per row and call of the decode graph. More means less
            overhead per token, a longer compilation, and up to that many steps after the last row ended.

    Attributes:
        layouts: canonical name -> layout of every parameter.
        store: the parameters as graphs take them, wherever they are.
        device_memory: in which it takes turns; ``None``: it is always on the device.
        timer: seconds spent in the phases ``"prefill"`` and ``"decode"``, until reset.

    Raises:
        ValueError: sizes do not divide by mp, or a number of ``generation`` is out of its range.
    """

    def __init__(
        self,
        config: ModelConfig,
        groups: Groups,
        generation: GenerationConfig,
        *,
        batch_size: int,
        decode_steps_per_call: int = 8,
    ) -> None:
        _check(config, generation, batch_size, decode_steps_per_call)
        self.config, self.groups, self.generation = config, groups, generation
        family = family_of(config)
        self.layouts: dict[str, Layout] = family.layouts.parameter_layouts(config, groups.mesh)
        self.batch_size = batch_size
        self.timer = PhaseTimer()
        # The first token comes from the prefill; the decode graph draws the others, a few at a time.
        self._steps, self._calls, columns = decode_schedule(
            generation.max_prompt_length, generation.max_response_length, decode_steps_per_call
        )
        decoder = family.generator_network.FusedDecoder(
            config, groups, batch_size=batch_size, prompt_length=generation.max_prompt_length, columns=columns
        )
        sampler = VocabParallelSampler(
            config.vocab_size,
            groups,
            batch_size=batch_size,
            valid_vocab_size=generation.valid_vocab_size,
            do_sample=generation.do_sample,
            temperature=generation.temperature,
            top_k=generation.top_k,
            top_p=generation.top_p,
        )
        picker = _TokenPicker(sampler, generation, batch_size)
        self._weights = family.generator_weights.FusedWeights(decoder, config, self.layouts)
        self._cache = decoder.cache_parameters()
        self._cache_shape = self._cache[0].shape
        self._free_cache()
        self._prefill = _Prefill(decoder, picker, batch_size)
        self._decode = _Decode(decoder, picker, self._steps)
        self._prefill.set_train(False)
        self._decode.set_train(False)
        self.store: ParameterStore = self._weights.store
        self.device_memory: DeviceMemory | None = None

    def load(self, shards: Shards) -> None:
        """Overwrites all parameters in place with this rank's canonical shards.

        Args:
            shards: canonical name -> array or tensor of the local shape, or an iterable of such pairs,
                which holds less in memory at a time. Arrays are cast to the stored type.

        Raises:
            CheckpointError: names are missing, unknown or have the wrong shape; lists them all.
        """
        self._weights.load(shards)

    def shards(self) -> Iterator[tuple[str, np.ndarray]]:
        """This rank's canonical shards, bit-identical to what was loaded (in the stored type)."""
        shards: Iterator[tuple[str, np.ndarray]] = self._weights.shards()
        return shards

    @property
    def cache_bytes(self) -> int:
        """What keys and values take on the device; 0 but while :meth:`generate` runs and after a stream."""
        return sum(parameter.nbytes for parameter in self._cache)

    def generate(
        self,
        prompt_ids: np.ndarray,
        prompt_lengths: np.ndarray,
        uniforms: np.ndarray,
        on_tokens: Callable[[int], None] = lambda count: None,
    ) -> GenerationOutput:
        """One response for each prompt.

        Args:
            prompt_ids: (B, P) integers, left-padded; B any multiple of ``batch_size``.
            prompt_lengths: (B,) real tokens of each prompt, 1 .. P. What stands before them is never seen.
            uniforms: (B, R) in [0, 1), one for each token that may be drawn; not used when greedy.
            on_tokens: called with how many more of the B x R are done; rows that have ended count as well.

        Raises:
            ValueError: shapes or numbers are not as above.
        """
        self._check_inputs(prompt_ids, prompt_lengths, uniforms)
        parts = []
        try:
            for first in range(0, len(prompt_ids), self.batch_size):
                rows = slice(first, first + self.batch_size)
                inputs = prompt_ids[rows], prompt_lengths[rows], uniforms[rows]
                parts.append(self._generate(inputs, on_tokens))
        finally:
            self._free_cache()
        tokens = np.concatenate([part[0] for part in parts])
        logprobs = np.concatenate([part[1] for part in parts])
        return self._output(tokens, logprobs)

    def stream(
        self, prompt_ids: np.ndarray, prompt_lengths: np.ndarray, uniforms: np.ndarray
    ) -> Iterator[np.ndarray]:
        """The tokens of :meth:`generate` as soon as they are drawn.

        Args:
            prompt_ids, prompt_lengths, uniforms: as for :meth:`generate`, of exactly ``batch_size`` prompts.

        Yields:
            (B, n) int32, the next n columns of ``response_ids``: the first token, then
            ``decode_steps_per_call`` at a time; nothing more once all rows have ended.

        Raises:
            ValueError: shapes or numbers are not as above.
        """
        self._check_inputs(prompt_ids, prompt_lengths, uniforms)
        if len(prompt_ids) != self.batch_size:
            raise ValueError(f"{len(prompt_ids)} prompts, expected batch_size {self.batch_size}")
        left = self.generation.max_response_length
        for tokens, _ in self._chunks(prompt_ids, prompt_lengths, uniforms):
            yield tokens[:, :left]
            left -= tokens.shape[1]

    def _generate(
        self, inputs: tuple[np.ndarray, ...], on_tokens: Callable[[int], None]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and log-probs (b, R) of ``batch_size`` prompts."""
        response = self.generation.max_response_length
        made = 1 + self._calls * self._steps
        tokens = np.full((self.batch_size, made), self.generation.pad_token_id, np.int32)
        logprobs = np.zeros((self.batch_size, made), np.float32)
        first = 0
        for new_tokens, new_logprobs in self._chunks(*inputs):
            new = slice(first, first + new_tokens.shape[1])
            tokens[:, new], logprobs[:, new] = new_tokens, new_logprobs
            on_tokens(self.batch_size * (min(new.stop, response) - first))
            first = new.stop
        on_tokens(self.batch_size * max(response - first, 0))
        return tokens[:, :response], logprobs[:, :response]

    def _chunks(
        self, prompt_ids: np.ndarray, prompt_lengths: np.ndarray, uniforms: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Tokens and log-probs (b, n) of one column, then of ``_steps`` each, until all rows have ended."""
        prompt, response = self.generation.max_prompt_length, self.generation.max_response_length
        draws = np.zeros((self.batch_size, 1 + self._calls * self._steps), np.float32)
        draws[:, :response] = uniforms
        starts = Tensor((prompt - prompt_lengths).astype(np.int32))
        self._prepare_device()
        with self.timer.phase("prefill"):
            token, logprob, done = self._prefill(
                Tensor(prompt_ids.astype(np.int32)), starts, Tensor(draws[:, 0].copy())
            )
            chunk = token.asnumpy()[:, None], logprob.asnumpy()[:, None]
        yield chunk
        for call in range(self._calls):
            if done.asnumpy().all():
                break
            first = call * self._steps
            new = slice(1 + first, 1 + first + self._steps)
            column = Tensor(np.array(prompt + first, np.int32))
            with self.timer.phase("decode"):
                token, new_tokens, new_logprobs, done = self._decode(
                    token, done, column, starts, Tensor(draws[:, new].copy())
                )
                chunk = new_tokens.asnumpy(), new_logprobs.asnumpy()
            yield chunk

    def _prepare_device(self) -> None:
        """Brings the weights to the device if they are not there, and makes room for keys and values."""
        if self.device_memory is not None:
            self.device_memory.use(self.store)
        for parameter in self._cache:
            if parameter.shape != self._cache_shape:
                parameter.set_data(ops.zeros(self._cache_shape, parameter.dtype), slice_shape=True)
        if self.device_memory is not None:
            self.device_memory.measure()

    def _free_cache(self) -> None:
        for parameter in self._cache:
            empty(parameter)

    def _output(self, tokens: np.ndarray, logprobs: np.ndarray) -> GenerationOutput:
        is_stop = np.isin(tokens, self.generation.stop_token_ids)
        stopped = is_stop.any(axis=1)
        # The first stop token ends a row: pads come only after it, even where pad is a stop token itself.
        lengths = np.where(stopped, is_stop.argmax(axis=1) + 1, tokens.shape[1]).astype(np.int32)
        return GenerationOutput(tokens, logprobs, lengths, stopped)

    def _check_inputs(self, prompt_ids: np.ndarray, prompt_lengths: np.ndarray, uniforms: np.ndarray) -> None:
        rows = len(prompt_ids)
        exact_div(rows, self.batch_size, "prompts by batch_size")
        expected = {
            "prompt_ids": (prompt_ids.shape, (rows, self.generation.max_prompt_length)),
            "prompt_lengths": (prompt_lengths.shape, (rows,)),
            "uniforms": (uniforms.shape, (rows, self.generation.max_response_length)),
        }
        for name, (shape, wanted) in expected.items():
            if shape != wanted:
                raise ValueError(f"{name} has shape {shape}, expected {wanted}")
        if rows == 0:
            raise ValueError("no prompts")
        if prompt_lengths.min() < 1 or prompt_lengths.max() > self.generation.max_prompt_length:
            raise ValueError(
                f"prompt lengths must lie in 1 .. {self.generation.max_prompt_length}, "
                f"got {prompt_lengths.min()} .. {prompt_lengths.max()}"
            )
        if uniforms.min() < 0.0 or uniforms.max() >= 1.0:
            raise ValueError(f"uniforms must lie in [0, 1), got {uniforms.min()} .. {uniforms.max()}")


class _TokenPicker(nn.Cell):
    """Samples the next token of unfinished rows; rows that have ended get the pad and log-prob 0."""

    def __init__(self, sampler: VocabParallelSampler, generation: GenerationConfig, batch_size: int) -> None:
        super().__init__()
        self.sampler = sampler
        self.stop_ids = generation.stop_token_ids
        self.pads = Tensor(np.full(batch_size, generation.pad_token_id, np.int32))
        self.zeros = Tensor(np.zeros(batch_size, np.float32))

    def construct(self, logits: Tensor, uniforms: Tensor, done: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``logits`` (B, V / mp), ``uniforms`` and ``done`` (B,) -> tokens, log-probs, done, (B,) each."""
        tokens, logprobs = self.sampler(logits, uniforms)
        tokens = ops.select(done, self.pads, tokens)
        logprobs = ops.select(done, self.zeros, logprobs)
        for stop_id in self.stop_ids:
            done = ops.logical_or(done, tokens == stop_id)
        return tokens, logprobs, done


class _Prefill(nn.Cell):
    """The graph that reads the prompts, fills the cache and draws the first tokens."""

    def __init__(self, decoder: nn.Cell, picker: _TokenPicker, batch_size: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.picker = picker
        self.none_done = Tensor(np.zeros(batch_size, np.bool_))

    def construct(
        self, prompt_ids: Tensor, starts: Tensor, uniforms: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``prompt_ids`` (B, P), ``starts`` (B,), ``uniforms`` (B,) -> tokens, log-probs, done, (B,) each."""
        logits = self.decoder.prefill(prompt_ids, starts)
        return self.picker(logits, uniforms, self.none_done)


class _Decode(nn.Cell):
    """The graph that draws the next ``steps`` tokens."""

    def __init__(self, decoder: nn.Cell, picker: _TokenPicker, steps: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.picker = picker
        self.steps = steps
        self.unstack = ops.Unstack(axis=1)

    def construct(
        self, token: Tensor, done: Tensor, column: Tensor, starts: Tensor, uniforms: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Continues from ``token`` (B,) at ``column`` (scalar int32).

        Args:
            done: (B,) bool, rows that have ended.
            starts: (B,) first real column of each row.
            uniforms: (B, steps).

        Returns:
            Last tokens (B,), tokens (B, steps), log-probs (B, steps), done (B,).
        """
        tokens, logprobs = [], []
        uniforms = self.unstack(uniforms)
        for step in range(self.steps):
            logits = self.decoder.decode(token, done, column + step, starts)
            token, logprob, done = self.picker(logits, uniforms[step], done)
            tokens.append(token)
            logprobs.append(logprob)
        return token, ops.stack(tokens, 1), ops.stack(logprobs, 1), done


def _check(config: ModelConfig, generation: GenerationConfig, batch_size: int, steps: int) -> None:
    """Refuses numbers that would give wrong responses rather than an error."""
    rules = {
        "batch_size must be positive": batch_size >= 1,
        "decode_steps_per_call must be positive": steps >= 1,
        "max_prompt_length must be positive": generation.max_prompt_length >= 1,
        "max_response_length must be positive": generation.max_response_length >= 1,
        "temperature must be positive": generation.temperature > 0,
        "top_k must not be negative": generation.top_k >= 0,
        "top_p must lie in (0, 1]": 0 < generation.top_p <= 1,
        "valid_vocab_size must lie in 1 .. vocab_size": 1 <= generation.valid_vocab_size <= config.vocab_size,
        # Ids travel as float32 when the vocabulary is split.
        "vocab_size must not exceed 2**24": config.vocab_size <= 2**24,
    }
    faults = [rule for rule, holds in rules.items() if not holds]
    if faults:
        raise ValueError(f"{'; '.join(faults)}: got {generation}, batch_size {batch_size}, steps {steps}")
