"""Whole PPO updates against an independent one: transformers' model, losses as published, torch's AdamW."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mindrlhf.algorithms.masks import attention_mask, policy_mask, position_ids
from mindrlhf.checkpoint.names import hf_to_canonical
from mindrlhf.configs.schema import (
    ContextConfig,
    JobConfig,
    ModelConfig,
    ParallelConfig,
    PPOConfig,
    RunConfig,
)
from mindrlhf.models.train import CriticModel, PPOModelTrain
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layout import Mesh
from mindrlhf.trainer.builder import PPOModels
from mindrlhf.trainer.experience import Experience, SequenceInputs
from mindrlhf.trainer.runtime import HostExchange, Runtime
from mindrlhf.trainer.update import PPOUpdate, UpdateResult, minibatches

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

GROUPS = Groups(Mesh(), 0)
PROMPT, RESPONSE, ROWS = 6, 5, 8
PROMPT_LENGTHS = np.array([6, 3, 1, 5, 4, 6, 2, 5])
RESPONSE_LENGTHS = np.array([2, 5, 1, 3, 5, 4, 4, 2])
MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=40,
    num_layers=1,
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


@pytest.fixture(scope="module", autouse=True)
def _graph_mode() -> None:
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")


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


def inputs_of(prompt_columns: int) -> SequenceInputs:
    """The same sequences, with prompts padded to ``prompt_columns``."""
    rng = np.random.default_rng(0)
    real = rng.integers(0, MODEL.vocab_size, (ROWS, PROMPT + RESPONSE))
    padding = rng.integers(0, MODEL.vocab_size, (ROWS, prompt_columns - PROMPT))
    valid = attention_mask(PROMPT_LENGTHS, RESPONSE_LENGTHS, prompt_columns, RESPONSE)
    tokens = np.concatenate([padding, real], axis=1)
    return SequenceInputs(tokens.astype(np.int32), valid.astype(np.int32), position_ids(valid))


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
    inputs = inputs_of(PROMPT)
    mask = policy_mask(RESPONSE_LENGTHS, RESPONSE)
    with torch.no_grad():
        logprobs, values = outputs(policy, inputs)[0].numpy(), outputs(critic, inputs)[2].numpy()

    def noise(scale: float) -> np.ndarray:
        return rng.normal(0, scale, mask.shape)

    old_values = values + noise(0.3)
    fields = {
        "old_logprobs": logprobs + noise(0.2),
        "old_values": old_values,
        "advantages": noise(1.0),
        "returns": old_values + noise(0.7),
        "kl": noise(0.1),
        "rewards": noise(0.1),
    }
    return Experience(
        inputs=inputs,
        mask=mask.astype(np.float32),
        **{name: np.where(mask, value, 0).astype(np.float32) for name, value in fields.items()},
    )


@dataclass
class Side:
    """Our update and the weights it starts from; :meth:`run` starts from them every time."""

    update: PPOUpdate
    models: PPOModels
    policy: dict[str, np.ndarray]
    critic: dict[str, np.ndarray]

    def run(self, experience: Experience, **changes: Any) -> tuple[UpdateResult, dict[str, np.ndarray]]:
        """One iteration; the result, and all weights by role and name."""
        self.update.config = replace(PPO, **changes)
        self.models.train.load(self.policy)
        reset(self.update.policy_step.optimizer)
        if self.models.critic is not None:
            self.models.critic.load(self.critic)
            reset(self.update.critic_step.optimizer)
        result = self.update.run(experience, 0, lambda: None)
        weights = {f"policy/{name}": array for name, array in self.models.train.shards()}
        if self.models.critic is not None:
            weights |= {f"critic/{name}": array for name, array in self.models.critic.shards()}
        return result, weights


def reset(optimizer: Any) -> None:
    for state in (*optimizer.exp_avg, *optimizer.exp_avg_sq, optimizer.global_step):
        state.set_data(Tensor(np.zeros(state.shape), state.dtype))


def our_side(policy: Any, critic: Any | None, prompt_columns: int = PROMPT) -> Side:
    shared = critic is None
    run = RunConfig(
        path=Path("train.yaml"),
        context=ContextConfig(),
        parallel=ParallelConfig(),
        model=MODEL,
        optimizer=OPTIMIZER,
        lr_schedule=SCHEDULE,
    )
    ppo = replace(PPO, critic="shared" if shared else "separate", max_prompt_length=prompt_columns)
    train = PPOModelTrain(
        MODEL,
        GROUPS,
        prompt_length=prompt_columns,
        temperature=PPO.temperature,
        valid_vocab_size=MODEL.vocab_size,
        value_head=shared,
    )
    value_model = None if shared else CriticModel(MODEL, GROUPS, prompt_length=prompt_columns)
    models = PPOModels(infer=None, train=train, ref=None, reward=None, critic=value_model)  # type: ignore[arg-type]
    job = JobConfig(infer=run, train=run, reward=run, critic=run, ppo=ppo)
    return Side(
        PPOUpdate(models, job, HostExchange(Runtime(0, 1))),
        models,
        canonical(policy, train.layouts),
        {} if value_model is None else canonical(critic, value_model.layouts),
    )


def schedule_rates(steps: int) -> list[float]:
    from mindformers.core.lr import build_lr

    schedule = build_lr({**SCHEDULE, "total_steps": PPO.optimizer_steps})
    return [float(schedule(Tensor(step, ms.int32)).asnumpy()) for step in range(steps)]


@dataclass
class Expected:
    """What the torch side reports: one entry an optimizer step, and the weights after the last."""

    sums: dict[str, list[float]]
    weights: dict[str, np.ndarray]


def torch_update(policy: Any, critic: Any | None, experience: Experience) -> Expected:
    """The same iteration with torch; changes the models given."""
    value_model = policy if critic is None else critic
    unused = [] if critic is None else [policy.score, critic.lm_head]
    for module in unused:
        module.requires_grad_(False)
    modules = [policy] if critic is None else [policy, critic]
    optimizers = []
    for module in modules:
        trained = [p for p in module.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": OPTIMIZER["weight_decay"]},
            {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
        ]
        optimizers.append(torch.optim.AdamW(groups, betas=tuple(OPTIMIZER["betas"]), eps=OPTIMIZER["eps"]))
    names = ("policy_loss", "approxkl", "clipfrac", "ratio", "ratio_squared", "entropy")
    sums: dict[str, list[float]] = {
        name: []
        for name in (*names, "value_loss", "value_clipfrac", "value_error", "value", "norms", "tokens")
    }
    row_sets = list(minibatches(ROWS, PPO, 0))
    for rows, rate in zip(row_sets, schedule_rates(len(row_sets)), strict=True):
        inputs = experience.inputs.rows(rows)
        mask = torch.from_numpy(experience.mask[rows]).bool()
        old_logprobs, old_values, advantages, returns = (
            torch.from_numpy(getattr(experience, field)[rows])[mask]
            for field in ("old_logprobs", "old_values", "advantages", "returns")
        )
        logprobs, entropy, values = outputs(policy, inputs)
        if critic is not None:
            values = outputs(critic, inputs)[2]
        logprobs, entropy, values = logprobs[mask], entropy[mask], values[mask]
        ratio = torch.exp(logprobs - old_logprobs)
        clipped_ratio = torch.clamp(ratio, 1 - PPO.cliprange, 1 + PPO.cliprange)
        policy_loss = torch.maximum(-advantages * ratio, -advantages * clipped_ratio)
        clipped_values = torch.clamp(
            values, old_values - PPO.cliprange_value, old_values + PPO.cliprange_value
        )
        errors, clipped_errors = (values - returns) ** 2, (clipped_values - returns) ** 2
        value_loss = 0.5 * torch.maximum(errors, clipped_errors)
        for optimizer in optimizers:
            optimizer.zero_grad()
        (policy_loss.mean() + PPO.vf_coef * value_loss.mean()).backward()
        norms = [
            float(
                torch.nn.utils.clip_grad_norm_(
                    [p for p in m.parameters() if p.requires_grad], PPO.max_grad_norm
                )
            )
            for m in modules
        ]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        terms = {
            "policy_loss": policy_loss,
            "approxkl": 0.5 * (logprobs - old_logprobs) ** 2,
            "clipfrac": -advantages * clipped_ratio > -advantages * ratio,
            "ratio": ratio,
            "ratio_squared": ratio**2,
            "entropy": entropy,
            "value_loss": value_loss,
            "value_clipfrac": clipped_errors > errors,
            "value_error": errors,
            "value": values,
        }
        for name, term in terms.items():
            sums[name].append(float(term.detach().double().sum()))
        sums["tokens"].append(float(mask.sum()))
        sums["norms"].append(norms)  # type: ignore[arg-type]
    ours = our_names(policy, critic)
    weights = {f"policy/{name}": array for name, array in canonical(policy, ours["policy"]).items()}
    if critic is not None:
        weights |= {f"critic/{name}": array for name, array in canonical(value_model, ours["critic"]).items()}
    return Expected(sums, weights)


def our_names(policy: Any, critic: Any | None) -> dict[str, list[str]]:
    everything = list(hf_to_canonical(MODEL.num_layers).values())
    with_bias = {"policy": everything, "critic": [name for name in everything if "lm_head" not in name]}
    if critic is not None:
        with_bias["policy"] = [name for name in everything if "score" not in name]
    return with_bias


@dataclass
class Both:
    """The same update by us and by torch."""

    ours: Side
    experience: Experience
    result: UpdateResult
    weights: dict[str, np.ndarray]
    expected: Expected


def both_sides(*, separate: bool) -> Both:
    policy = hugging_face(seed=1)
    critic = hugging_face(seed=2) if separate else None
    experience = experience_for(policy, critic or policy)
    ours = our_side(policy, critic)
    result, weights = ours.run(experience)
    return Both(ours, experience, result, weights, torch_update(policy, critic, experience))


@pytest.fixture(scope="module")
def separate() -> Both:
    return both_sides(separate=True)


@pytest.fixture(scope="module")
def shared() -> Both:
    return both_sides(separate=False)


@pytest.fixture(params=["separate", "shared"])
def both(request: pytest.FixtureRequest) -> Both:
    return request.getfixturevalue(request.param)


def test_losses_and_statistics_of_every_step_equal_torch(both: Both) -> None:
    result, expected = both.result, both.expected
    names = list(expected.sums)
    policy = np.array([expected.sums[name] for name in names[:6]]).T
    value = np.array([expected.sums[name] for name in names[6:10]]).T
    assert result.policy.shape == policy.shape == (4, 6)
    # The case must be one in which clipping matters, for policy and value alike.
    assert 0 < policy[:, 2].sum() < result.tokens.sum()
    assert 0 < value[:, 1].sum() < result.tokens.sum()
    np.testing.assert_array_equal(result.tokens, expected.sums["tokens"])
    np.testing.assert_allclose(result.policy, policy, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(result.value, value, rtol=1e-5, atol=2e-5)


def test_gradient_norms_and_learning_rate_equal_torch(both: Both) -> None:
    ours, result, expected = both.ours, both.result, both.expected
    norms = np.array(expected.sums["norms"])
    assert norms.max() > PPO.max_grad_norm, "clipping must bite"
    np.testing.assert_allclose(result.grad_norm, norms[:, 0], rtol=1e-5)
    if ours.models.critic is not None:
        np.testing.assert_allclose(result.critic_grad_norm, norms[:, 1], rtol=1e-5)
    assert result.learning_rate == pytest.approx(schedule_rates(4)[-1], rel=1e-6)
    # By hand: step 3 of 8, warm-up of 2 steps, half a cosine over the other 6.
    assert result.learning_rate == pytest.approx(1e-4 + 1.9e-3 * 0.5 * (1 + np.cos(np.pi / 6)), rel=1e-5)


def test_updated_weights_equal_torch(both: Both) -> None:
    ours, weights, expected = both.ours, both.weights, both.expected
    before = {f"policy/{name}": array for name, array in ours.policy.items()}
    before |= {f"critic/{name}": array for name, array in ours.critic.items()}
    assert weights.keys() == expected.weights.keys()
    for name, wanted in expected.weights.items():
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(weights[name], wanted, atol=1e-5 * scale, rtol=0, err_msg=name)
        moved = np.abs(wanted - before[name]).max()
        assert moved > 1e-3, f"{name} must have moved"
        assert np.abs(weights[name] - wanted).max() < 1e-3 * moved, name


def same_update(
    found: tuple[UpdateResult, dict[str, np.ndarray]], wanted: tuple[Any, dict[str, np.ndarray]]
) -> None:
    np.testing.assert_allclose(found[0].policy, wanted[0].policy, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(found[0].value, wanted[0].value, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(found[0].grad_norm, wanted[0].grad_norm, rtol=1e-5)
    for name, array in wanted[1].items():
        np.testing.assert_allclose(
            found[1][name], array, atol=1e-5 * np.abs(array).max(), rtol=0, err_msg=name
        )


def test_micro_batches_do_not_change_the_update(shared: Both) -> None:
    for size in (1, 2):
        same_update(
            shared.ours.run(shared.experience, micro_batch_size=size), (shared.result, shared.weights)
        )


def test_padding_columns_do_not_change_the_update(shared: Both) -> None:
    wide = our_side(hugging_face(seed=1), None, prompt_columns=PROMPT + 3)
    experience = shared.experience._replace(inputs=inputs_of(PROMPT + 3))
    same_update(wide.run(experience, max_prompt_length=PROMPT + 3), (shared.result, shared.weights))
