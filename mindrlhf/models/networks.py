"""Networks over whole sequences: the trained policy, the critic, and the reward model.

They all take a batch of prompt + response rows, T = P + R, prompts left-padded, and look at response
columns only: the logits that predict response token ``t`` are in column ``P - 1 + t``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor

from mindrlhf.configs.keys import ModelConfig
from mindrlhf.models.device_memory import DeviceMemory, ParameterStore
from mindrlhf.models.dtypes import ms_dtype
from mindrlhf.models.families import family_of
from mindrlhf.models.heads import Head, HeadTape, LanguageHead, Rows, ScalarHead, last_rows, response_rows
from mindrlhf.models.passes import Decoder, DecoderTape
from mindrlhf.models.pieces import Gradients
from mindrlhf.models.score_head import SCORE_HEAD
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layout import Layout
from mindrlhf.parallel.tensor_parallel import empty_parameter


class Tape(NamedTuple):
    """What a forward pass keeps for its backward pass."""

    decoder: DecoderTape
    head: HeadTape


class Network(ABC):
    """A decoder under a head: arrays of a batch -> outputs, and gradients of outputs -> of the weights.

    Args:
        decoder, head: over the same parameters.
    """

    def __init__(self, decoder: Decoder, head: Head) -> None:
        self.decoder, self.head = decoder, head

    @abstractmethod
    def rows(self, tokens: np.ndarray, *extra: np.ndarray) -> Rows:
        """What the head looks at; ``tokens`` (B, T), and what the network takes besides sequences."""

    @abstractmethod
    def to_device(self) -> None:
        """Makes sure that the weights are on the device."""

    def __call__(
        self, tokens: np.ndarray, valid: np.ndarray, position_ids: np.ndarray, *extra: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """The outputs for a batch, without a gradient.

        Args:
            tokens: (B, T) int32.
            valid: (B, T) int32, 1 on real tokens.
            position_ids: (B, T) int32.
            extra: what else :meth:`rows` takes.
        """
        self.to_device()
        inputs, rows = self._arguments(tokens, valid, position_ids, *extra)
        x, _ = self.decoder.forward(*inputs)
        outputs, _ = self.head.forward(x, rows)
        return tuple(output.asnumpy() for output in outputs)

    def forward(
        self, tokens: np.ndarray, valid: np.ndarray, position_ids: np.ndarray, *extra: np.ndarray
    ) -> tuple[tuple[Tensor, ...], Tape]:
        """As a call, and what :meth:`backward` needs."""
        self.to_device()
        inputs, rows = self._arguments(tokens, valid, position_ids, *extra)
        x, decoder_tape = self.decoder.forward(*inputs, keep=True)
        assert decoder_tape is not None
        outputs, head_tape = self.head.forward(x, rows)
        return outputs, Tape(decoder_tape, head_tape)

    def backward(self, tape: Tape, d_outputs: Sequence[Tensor], gradients: Gradients) -> None:
        """Adds the gradients of all weights to their sums; uses the tape up.

        Args:
            tape: of :meth:`forward`.
            d_outputs: gradients of its outputs.
            gradients: the sums.
        """
        dx = self.head.backward(tape.head, d_outputs, gradients)
        self.decoder.backward(tape.decoder, dx, gradients)

    def _arguments(
        self, tokens: np.ndarray, valid: np.ndarray, position_ids: np.ndarray, *extra: np.ndarray
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Rows]:
        """Of the decoder and of the head; columns of pads are added if the ranks could not split the rows."""
        rows, columns = self.rows(tokens, *extra), tokens.shape[1]
        arrays, parts = [tokens, valid, position_ids], self.decoder.row_parts
        if tokens.size % parts:
            added = -columns % parts
            arrays = [np.pad(array, ((0, 0), (0, added))) for array in arrays]
            row, column = np.divmod(rows.numbers, columns)
            rows = rows._replace(numbers=(row * (columns + added) + column).astype(np.int32))
        inputs = Tensor(arrays[0]), Tensor(arrays[1]), Tensor(arrays[2])
        return inputs, rows


class SequenceModel(Network):
    """A network with its parameters: this rank's shards.

    Args:
        config: model sizes; the layout comes from ``groups.mesh``.
        groups: this rank's groups.
        lm_head, score_head: which heads it has.
        recompute: see :class:`Decoder`.

    Attributes:
        layouts: canonical name -> layout of every parameter, in model order.
        parameters: canonical name -> this rank's shard; zeros until they are loaded, empty while they are in
            host memory.
        store: the same, wherever they are.
        device_memory: in which it takes turns; ``None``: it is always on the device.
    """

    def __init__(
        self, config: ModelConfig, groups: Groups, *, lm_head: bool, score_head: bool, recompute: int = 0
    ) -> None:
        self.config = config
        self.groups = groups
        self.is_language_model = lm_head
        self.layouts: dict[str, Layout] = family_of(config).layouts.parameter_layouts(
            config, groups.mesh, lm_head=lm_head, score_head=score_head
        )
        self.parameters: dict[str, Parameter] = {
            name: empty_parameter(
                layout.local_shape,
                ms.float32 if name in SCORE_HEAD else ms_dtype(config.param_init_type),
                name,
            )
            for name, layout in self.layouts.items()
        }
        self.store = ParameterStore(self.parameters)
        self.device_memory: DeviceMemory | None = None
        decoder = Decoder(config, groups, self.layouts, self.parameters, recompute)
        super().__init__(decoder, self._make_head())

    @abstractmethod
    def _make_head(self) -> Head:
        """The head over the parameters."""

    def to_device(self) -> None:
        """See :class:`Network`."""
        if self.device_memory is not None:
            self.device_memory.use(self.store)

    def load(self, shards: Mapping[str, np.ndarray]) -> None:
        """Loads this rank's shards.

        Args:
            shards: canonical name -> array of the layout's local shape, exactly the model's names.

        Raises:
            ValueError: names or shapes differ; the message lists every one.
        """
        layouts = self.layouts
        faults = [f"{name}: not given" for name in layouts.keys() - shards.keys()]
        faults += [f"{name}: not in the model" for name in shards.keys() - layouts.keys()]
        faults += [
            f"{name}: shape {tuple(shards[name].shape)}, expected {layouts[name].local_shape}"
            for name in layouts.keys() & shards.keys()
            if tuple(shards[name].shape) != layouts[name].local_shape
        ]
        if faults:
            raise ValueError("these shards do not fit the model:\n  " + "\n  ".join(sorted(faults)))
        for name, parameter in self.parameters.items():
            self.store.set(name, Tensor(np.ascontiguousarray(shards[name])).astype(parameter.dtype))

    def described(self) -> dict[str, Any]:
        """The ``config.json`` beside its rank directories."""
        keys = family_of(self.config).hf_keys
        config: dict[str, Any] = keys.hf_config_from_model(self.config)
        name = keys.CAUSAL_LM if self.is_language_model else keys.SEQUENCE_CLASSIFICATION
        return config | {"architectures": [name]}

    def shards(self, names: Collection[str] | None = None) -> Iterator[tuple[str, np.ndarray]]:
        """This rank's shards by canonical name, in model order; all of them or those in ``names``."""
        for name in self.layouts:
            if names is None or name in names:
                yield name, self.store.array(name)


class PPOModelTrain(SequenceModel):
    """The policy under training: log-probs and entropy of responses, and values if it is also the critic.

    Its outputs, (B, R) float32 each: log-prob of each response token; entropy of the distribution that it was
    drawn from, zeros without ``with_entropy``; with a value head, the value before it.

    Args:
        config: model sizes; the layout comes from ``groups.mesh``.
        groups: this rank's groups in the train mesh.
        prompt_length: P.
        temperature: the rollout's; it divides the logits of old, new and reference log-probs alike.
        valid_vocab_size: ids from this one on have probability 0.
        value_head: whether the backbone is shared with a value head.
        with_entropy: whether to compute the entropy, which costs a pass over the logits; a reference
            needs none.
        recompute: see :class:`Decoder`.
    """

    def __init__(
        self,
        config: ModelConfig,
        groups: Groups,
        *,
        prompt_length: int,
        temperature: float,
        valid_vocab_size: int,
        value_head: bool = False,
        with_entropy: bool = True,
        recompute: int = 0,
    ) -> None:
        self.prompt_length = prompt_length
        self.valid_vocab_size = valid_vocab_size
        self.value_head = value_head
        self._settings = {
            "valid_vocab_size": valid_vocab_size,
            "temperature": temperature,
            "with_entropy": with_entropy,
        }
        super().__init__(config, groups, lm_head=True, score_head=value_head, recompute=recompute)

    def rows(self, tokens: np.ndarray, *extra: np.ndarray) -> Rows:
        """The response columns."""
        return response_rows(tokens, self.prompt_length)

    def _make_head(self) -> Head:
        return LanguageHead(self.config, self.groups, self.parameters, **self._settings)


class CriticModel(SequenceModel):
    """A separate critic; its output is the value before each response token, (B, R) float32."""

    def __init__(
        self, config: ModelConfig, groups: Groups, *, prompt_length: int, recompute: int = 0
    ) -> None:
        self.prompt_length = prompt_length
        super().__init__(config, groups, lm_head=False, score_head=True, recompute=recompute)

    def rows(self, tokens: np.ndarray, *extra: np.ndarray) -> Rows:
        """The response columns."""
        return response_rows(tokens, self.prompt_length)

    def _make_head(self) -> Head:
        return ScalarHead(self.config, self.groups, self.parameters)


class PolicyValues(Network):
    """The values of a policy that is its own critic, without the logits that values do not need."""

    def __init__(self, policy: PPOModelTrain) -> None:
        super().__init__(policy.decoder, ScalarHead(policy.config, policy.groups, policy.parameters))
        self._policy = policy

    def to_device(self) -> None:
        """The policy's weights."""
        self._policy.to_device()

    def rows(self, tokens: np.ndarray, *extra: np.ndarray) -> Rows:
        """The response columns."""
        return self._policy.rows(tokens)


class RewardModel(SequenceModel):
    """One score per sequence, (B,) float32, read at its last real token (InstructGPT, arXiv 2203.02155).

    It takes (B,) int32 response lengths besides sequences, at least 1 each.
    """

    def __init__(
        self, config: ModelConfig, groups: Groups, *, prompt_length: int, recompute: int = 0
    ) -> None:
        self.prompt_length = prompt_length
        super().__init__(config, groups, lm_head=False, score_head=True, recompute=recompute)

    def rows(self, tokens: np.ndarray, *extra: np.ndarray) -> Rows:
        """The last real token of each row."""
        return last_rows(tokens, self.prompt_length, *extra)

    def _make_head(self) -> Head:
        return ScalarHead(self.config, self.groups, self.parameters)
