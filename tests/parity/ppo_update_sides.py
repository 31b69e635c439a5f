"""The two sides of test_ppo_update.py: our update, and one by transformers and torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mindrlhf.configs.keys import ContextConfig, JobConfig, ParallelConfig, RunConfig
from mindrlhf.models.networks import CriticModel, PPOModelTrain
from mindrlhf.models.qwen2.weight_names import hf_to_canonical
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layout import Mesh
from mindrlhf.runtime.device import Runtime
from mindrlhf.runtime.host_exchange import HostExchange
from mindrlhf.trainer.builder import PPOModels
from mindrlhf.trainer.experience import Experience
from mindrlhf.trainer.loss_cells import POLICY_STATISTICS, RATIO_EDGES, VALUE_STATISTICS
from mindrlhf.trainer.pretraining import PretrainBatch
from mindrlhf.trainer.update import PPOUpdate, UpdateResult, minibatches
from tests.parity.ppo_update_case import (
    MODEL,
    OPTIMIZER,
    PPO,
    PROMPT,
    ROWS,
    SCHEDULE,
    Texts,
    canonical,
    experience_for,
    hugging_face,
    outputs,
)

torch = pytest.importorskip("torch")

GROUPS = Groups(Mesh(), 0)


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
        if isinstance(self.update.pretraining, Texts):
            self.update.pretraining.drawn = 0
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
    for key in optimizer.state:
        optimizer.state.change(key, lambda array: array.fill(0))


def our_side(
    policy: Any, critic: Any | None, prompt_columns: int = PROMPT, texts: Texts | None = None, **extras: float
) -> Side:
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
    ppo = replace(ppo, **extras)
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
        PPOUpdate(models, job, HostExchange(Runtime(0, 1)), texts),  # type: ignore[arg-type]
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
    pretrain_loss: list[float] = field(default_factory=list)


def text_loss(hf: Any, batch: PretrainBatch) -> Any:
    """Mean cross-entropy of the tokens to be learnt, at temperature 1."""
    tokens, valid, positions = (torch.from_numpy(array.astype(np.int64)) for array in batch.inputs)
    logits = hf(tokens, attention_mask=valid, position_ids=positions).logits
    learnt = torch.from_numpy(batch.mask).bool()
    targets = torch.from_numpy(batch.targets.astype(np.int64))
    return torch.nn.functional.cross_entropy(logits[learnt], targets[learnt])


def torch_update(
    policy: Any,
    critic: Any | None,
    experience: Experience,
    texts: Texts | None,
    entropy_coef: float = 0.0,
    ptx_coef: float = 0.0,
) -> Expected:
    """The same iteration with torch; changes the models given."""
    pretrain_losses: list[float] = []
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
    names = (*POLICY_STATISTICS, *VALUE_STATISTICS, "norms", "tokens")
    sums: dict[str, list[float]] = {name: [] for name in names}
    row_sets = list(minibatches(ROWS, PPO, 0))
    for rows, rate in zip(row_sets, schedule_rates(len(row_sets)), strict=True):
        inputs = experience.rollout.inputs.rows(rows)
        mask = torch.from_numpy(experience.rollout.mask[rows])
        old_logprobs, old_values, advantages, returns = (
            torch.from_numpy(array[rows])[mask]
            for array in (
                experience.rollout.logprobs,
                experience.old_values,
                experience.advantages,
                experience.returns,
            )
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
        loss = policy_loss.mean() + PPO.vf_coef * value_loss.mean() - entropy_coef * entropy.mean()
        if texts is not None:
            pretrain_loss = text_loss(policy, texts.batches[len(pretrain_losses)])
            pretrain_losses.append(float(pretrain_loss.detach()))
            loss = loss + ptx_coef * pretrain_loss
        loss.backward()
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
            **{f"ratio above {edge}": ratio > edge for edge in RATIO_EDGES},
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
    return Expected(sums, weights, pretrain_losses)


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


def both_sides(*, separate: bool, texts: Texts | None = None, **extras: float) -> Both:
    """One update on both sides, with what of :data:`EXTRAS` is given."""
    policy = hugging_face(seed=1)
    critic = hugging_face(seed=2) if separate else None
    experience = experience_for(policy, critic or policy)
    ours = our_side(policy, critic, texts=texts, **extras)
    result, weights = ours.run(experience)
    expected = torch_update(policy, critic, experience, texts, **extras)
    return Both(ours, experience, result, weights, expected)
