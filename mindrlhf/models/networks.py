"""Networks over whole sequences: the trained policy, the critic, and the reward model.

They all take a batch of prompt + response rows, T = P + R, prompts left-padded, and look at response
columns only: the logits that predict response token ``t`` are in column ``P - 1 + t``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
from mindspore import Tensor, nn

from mindrlhf.configs.keys import ModelConfig
from mindrlhf.models.families import family_of
from mindrlhf.models.heads import LMHead, ScoreHead, last_token
from mindrlhf.parallel.collectives import CopyToGroup
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layout import Layout
from mindrlhf.parallel.tensor_parallel import RowsProduct, VocabParallelLogProbs


class SequenceModel(nn.Cell):
    """What the three networks share: sizes, layouts, loading and returning this rank's shards."""

    def __init__(self, config: ModelConfig, groups: Groups, *, lm_head: bool, score_head: bool) -> None:
        super().__init__()
        self.config = config
        self.groups = groups
        self.is_language_model = lm_head
        family = family_of(config)
        self.layouts: dict[str, Layout] = family.layouts.parameter_layouts(
            config, groups.mesh, lm_head=lm_head, score_head=score_head
        )
        self.model = family.decoder.Decoder(config, groups)
        if lm_head and not config.tie_word_embeddings:
            self.lm_head = LMHead(config, groups)
        if score_head:
            self.score_head = ScoreHead(config)

    def load(self, shards: Mapping[str, np.ndarray]) -> None:
        """Loads this rank's shards.

        Args:
            shards: canonical name -> array of the layout's local shape, exactly the model's names.

        Raises:
            ValueError: names or shapes differ; the message lists every one.
        """
        parameters = self.parameters_dict()
        faults = [f"{name}: not given" for name in parameters.keys() - shards.keys()]
        faults += [f"{name}: not in the model" for name in shards.keys() - parameters.keys()]
        faults += [
            f"{name}: shape {tuple(shards[name].shape)}, expected {tuple(parameters[name].shape)}"
            for name in parameters.keys() & shards.keys()
            if tuple(shards[name].shape) != tuple(parameters[name].shape)
        ]
        if faults:
            raise ValueError("these shards do not fit the model:\n  " + "\n  ".join(sorted(faults)))
        for name, parameter in parameters.items():
            parameter.set_data(Tensor(np.ascontiguousarray(shards[name])).astype(parameter.dtype))

    def described(self) -> dict[str, Any]:
        """The ``config.json`` beside its rank directories."""
        keys = family_of(self.config).hf_keys
        config: dict[str, Any] = keys.hf_config_from_model(self.config)
        name = keys.CAUSAL_LM if self.is_language_model else keys.SEQUENCE_CLASSIFICATION
        return config | {"architectures": [name]}

    def shards(self, names: Collection[str] | None = None) -> Iterator[tuple[str, np.ndarray]]:
        """This rank's shards by canonical name, in model order; all of them or those in ``names``."""
        parameters = self.parameters_dict()
        for name in self.layouts:
            if names is None or name in names:
                yield name, parameters[name].asnumpy()


class PPOModelTrain(SequenceModel):
    """The policy under training: log-probs and entropy of responses, and values if it is also the critic.

    Args:
        config: model sizes; the layout comes from ``groups.mesh``.
        groups: this rank's groups in the train mesh.
        prompt_length: P.
        temperature: the rollout's; it divides the logits of old, new and reference log-probs alike.
        valid_vocab_size: ids from this one on have probability 0.
        value_head: whether the backbone is shared with a value head.
        with_entropy: whether to compute the entropy, which costs a pass over the logits; a reference
            needs none.
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
    ) -> None:
        super().__init__(config, groups, lm_head=True, score_head=value_head)
        self.prompt_length = prompt_length
        self.valid_vocab_size = valid_vocab_size
        self.tied = config.tie_word_embeddings
        self.value_head = value_head
        if self.tied:
            self.product = RowsProduct(self.model.compute_dtype, config.matmul_dtype)
        self.copy_to_group = CopyToGroup(groups.mp_group)
        self.log_probs = VocabParallelLogProbs(
            config.vocab_size,
            groups,
            valid_vocab_size=valid_vocab_size,
            temperature=temperature,
            with_entropy=with_entropy,
        )

    def construct(self, tokens: Tensor, valid: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs, entropy and values of the response columns.

        Args:
            tokens: (B, T) int32.
            valid: (B, T) int32, 1 on real tokens.
            position_ids: (B, T) int32.

        Returns:
            three (B, R) float32: log-prob of each response token, entropy of the distribution it was
            drawn from (zeros without ``with_entropy``), value before it (zeros without a value head).
        """
        before_response = self.model(
            tokens, valid, position_ids, (self.prompt_length - 1, tokens.shape[1] - 1)
        )
        logits = self.logits(before_response)
        logprobs, entropy = self.log_probs(logits, tokens[:, self.prompt_length :])
        values = self.score_head(before_response) if self.value_head else logprobs * 0.0
        return logprobs, entropy, values

    def logits(self, hidden: Tensor) -> Tensor:
        """This rank's logits, before any temperature: (B, R, H) -> (B, R, V / mp)."""
        hidden = self.copy_to_group(hidden)
        if self.tied:
            return self.product(hidden, self.model.tok_embeddings.embedding_weight)
        return self.lm_head(hidden)


class PolicyValues(nn.Cell):
    """The values of a policy that is its own critic, without the logits that values do not need."""

    def __init__(self, policy: PPOModelTrain) -> None:
        super().__init__(auto_prefix=False)
        self.policy = policy
        self.prompt_length = policy.prompt_length

    def construct(self, tokens: Tensor, valid: Tensor, position_ids: Tensor) -> Tensor:
        """(B, T) int32 each -> values (B, R) float32; see :class:`PPOModelTrain`."""
        columns = (self.prompt_length - 1, tokens.shape[1] - 1)
        return self.policy.score_head(self.policy.model(tokens, valid, position_ids, columns))


class CriticModel(SequenceModel):
    """A separate critic: the value before each response token."""

    def __init__(self, config: ModelConfig, groups: Groups, *, prompt_length: int) -> None:
        super().__init__(config, groups, lm_head=False, score_head=True)
        self.prompt_length = prompt_length

    def construct(self, tokens: Tensor, valid: Tensor, position_ids: Tensor) -> Tensor:
        """(B, T) int32 each -> values (B, R) float32; see :class:`PPOModelTrain`."""
        columns = (self.prompt_length - 1, tokens.shape[1] - 1)
        return self.score_head(self.model(tokens, valid, position_ids, columns))


class RewardModel(SequenceModel):
    """One score per sequence, read at its last real token (InstructGPT, arXiv 2203.02155)."""

    def __init__(self, config: ModelConfig, groups: Groups, *, prompt_length: int) -> None:
        super().__init__(config, groups, lm_head=False, score_head=True)
        self.prompt_length = prompt_length

    def construct(
        self, tokens: Tensor, valid: Tensor, position_ids: Tensor, response_lengths: Tensor
    ) -> Tensor:
        """Scores of sequences cut after their first stop token.

        Args:
            tokens, valid, position_ids: (B, T) int32; ``valid`` is 0 after the cut.
            response_lengths: (B,) int32, real response tokens, at least 1.

        Returns:
            (B,) float32.
        """
        hidden = self.model(tokens, valid, position_ids, (self.prompt_length, tokens.shape[1]))
        return self.score_head(last_token(hidden, response_lengths - 1))
