"""The case of test_ppo_update.py: sizes, settings, the torch model, experience and texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from mindrlhf.algorithms.masks import position_ids
from mindrlhf.configs.keys import ModelConfig, PPOConfig
from mindrlhf.models.qwen2.weight_names import hf_to_canonical
from mindrlhf.trainer.experience import Experience, Rollout, SequenceInputs
from mindrlhf.trainer.pretraining import PretrainBatch

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PROMPT, RESPONSE, ROWS = 6, 5, 8
PROMPT_LENGTHS = np.array([6, 3, 1, 5, 4, 6, 2, 5])
RESPONSE_LENGTHS = np.array([2, 5, 1, 3, 5, 4, 4, 2])
MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=40,
    num_layers=2,
    num_heads=4,
    n_kv_heads=2,
    seq_length=32,
)
OPTIMIZER = {"type": "AdamW", "betas": [0.9, 0.95], "eps": 1e-5, "weight_decay": 0.1}
SCHEDULE = {
    "type": "CosineWithWarmUpLR",
    "learning_rate": 2e-3,
    "lr_end": 1e-4,
    "warmup_steps": 2,
    "warmup_lr_init": 5e-4,
    "total_steps": -1,
}
PPO = PPOConfig(
    seed=7,
    total_iterations=2,
    rollout_batch_size=ROWS,
    ppo_epochs=2,
    num_minibatches=2,
    max_prompt_length=PROMPT,
    max_response_length=RESPONSE,
    temperature=0.8,
    cliprange=0.2,
    cliprange_value=0.3,
    vf_coef=0.5,
    max_grad_norm=0.5,
)
EXTRAS = {"entropy_coef": 0.3, "ptx_coef": 0.7}


def hugging_face(seed: int) -> Any:
    """A float32 ``Qwen2ForCausalLM`` with a scalar head beside it."""
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=MODEL.vocab_size,
            hidden_size=MODEL.hidden_size,
            intermediate_size=MODEL.intermediate_size,
            num_hidden_layers=MODEL.num_layers,
            num_attention_heads=MODEL.num_heads,
            num_key_value_heads=MODEL.n_kv_heads,
            tie_word_embeddings=False,
            rope_theta=MODEL.theta,
            rms_norm_eps=MODEL.rms_norm_eps,
            attn_implementation="eager",
        )
    )
    model.score = torch.nn.Linear(MODEL.hidden_size, 1)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)
    return model.float().eval()


def canonical(hf: Any, names: Any) -> dict[str, np.ndarray]:
    mapped = hf_to_canonical(MODEL.num_layers)
    arrays = {mapped[name]: p.detach().numpy() for name, p in hf.named_parameters()}
    return {name: arrays[name].astype(np.float32) for name in names}


def rollout_of(prompt_columns: int, logprobs: np.ndarray) -> Rollout:
    """The same sequences, with prompts padded to ``prompt_columns``."""
    rng = np.random.default_rng(0)
    real = rng.integers(0, MODEL.vocab_size, (ROWS, PROMPT + RESPONSE))
    padding = rng.integers(0, MODEL.vocab_size, (ROWS, prompt_columns - PROMPT))
    return Rollout.of(
        tokens=np.concatenate([padding, real], axis=1).astype(np.int32),
        prompt_lengths=PROMPT_LENGTHS,
        response_lengths=RESPONSE_LENGTHS,
        logprobs=logprobs,
        stopped=np.ones(ROWS, np.int32),
        sample_ids=np.arange(ROWS),
    )


def outputs(hf: Any, inputs: SequenceInputs) -> tuple[Any, Any, Any]:
    """Log-probs, entropy and values (B, R) of transformers' model and its scalar head."""
    tokens, valid, positions = (torch.from_numpy(array.astype(np.int64)) for array in inputs)
    hidden = hf.model(tokens, attention_mask=valid, position_ids=positions).last_hidden_state
    hidden = hidden[:, -RESPONSE - 1 : -1]
    distribution = torch.log_softmax(hf.lm_head(hidden) / PPO.temperature, -1)
    logprobs = distribution.gather(-1, tokens[:, -RESPONSE:, None])[..., 0]
    return logprobs, -(distribution.exp() * distribution).sum(-1), hf.score(hidden)[..., 0]


def experience_for(policy: Any, critic: Any) -> Experience:
    """Made up, but near what the models say, so that some tokens are clipped and some are not."""
    rng = np.random.default_rng(1)
    rollout = rollout_of(PROMPT, np.zeros((ROWS, RESPONSE), np.float32))
    mask = rollout.mask
    with torch.no_grad():
        logprobs, values = (
            outputs(model, rollout.inputs)[which].numpy() for model, which in ((policy, 0), (critic, 2))
        )

    def masked(array: np.ndarray) -> np.ndarray:
        return np.where(mask, array, 0).astype(np.float32)

    def noise(scale: float) -> np.ndarray:
        return rng.normal(0, scale, mask.shape)

    old_values = values + noise(0.3)
    return Experience(
        rollout=rollout._replace(logprobs=masked(logprobs + noise(0.2))),
        old_values=masked(old_values),
        advantages=masked(noise(1.0)),
        returns=masked(old_values + noise(0.7)),
    )


@dataclass
class Texts:
    """Stands in for the stream of pre-training texts: one batch an optimizer step, always the same ones."""

    batches: list[PretrainBatch]
    drawn: int = 0

    def next_batch(self) -> PretrainBatch:
        """The next one."""
        self.drawn += 1
        return self.batches[self.drawn - 1]


def random_texts() -> Texts:
    """Texts of 2 to 9 tokens, right-padded with junk; some of their tokens are to be learnt."""
    rng = np.random.default_rng(5)
    batches = []
    for _ in range(PPO.ppo_epochs * PPO.num_minibatches):
        ids = rng.integers(0, MODEL.vocab_size, (PPO.minibatch_size, 10)).astype(np.int32)
        valid = (np.arange(9) < rng.integers(1, 9, (PPO.minibatch_size, 1))).astype(np.int32)
        mask = valid * (rng.random(valid.shape) < 0.7)
        mask[0, 0] = valid[0, 0]
        inputs = SequenceInputs(ids[:, :-1], valid, position_ids(valid))
        batches.append(PretrainBatch(inputs, ids[:, 1:], mask.astype(np.float32)))
    return Texts(batches)
