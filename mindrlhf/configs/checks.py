"""Checks between values: within one YAML, within the PPO hyper-parameters, and across a job.

Each check runs on the valid values; a value with a fault has already been reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mindrlhf.configs.faults import Faults
from mindrlhf.configs.fields import keys_of
from mindrlhf.configs.keys import (
    UNUSED_WITH,
    WEIGHTS_KEYS,
    ContextConfig,
    PPOConfig,
    RunnerConfig,
    unfinished_warm_up,
)
from mindrlhf.configs.read_ppo import PPODraft
from mindrlhf.configs.read_run import RunDraft

MODEL = "model.model_config"
ACCUMULATION = "runner_config.gradient_accumulation_steps"


def check_run(draft: RunDraft, faults: Faults) -> None:
    """Values of one YAML: sizes that must divide, token ids inside the vocabulary, one learning rate."""
    model, split = draft.model, draft.parallel.get("model_parallel")
    divisors = [
        (key, split, "parallel_config.model_parallel")
        for key in ("num_heads", "n_kv_heads", "vocab_size", "intermediate_size")
    ]
    divisors += [("hidden_size", model.get("num_heads"), "num_heads")]
    divisors += [("num_heads", model.get("n_kv_heads"), "n_kv_heads")]
    for key, by, by_name in divisors:
        _check_divides(model.get(key), by, by_name, draft.where(f"{MODEL}.{key}"), faults)
    hidden, heads = model.get("hidden_size"), model.get("num_heads")
    if hidden and heads and hidden % heads == 0 and (hidden // heads) % 2:
        faults.add(
            draft.where(f"{MODEL}.hidden_size"),
            f"heads of odd size ({hidden // heads})",
            "rotary embedding turns pairs: hidden_size / num_heads must be even",
        )
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        _check_below(model.get(key, ()), model.get("vocab_size"), draft.where(f"{MODEL}.{key}"), faults)
    _check_rate(draft, draft.lr_schedule, faults)


def _check_divides(size: int | None, by: int | None, by_name: str, where: str, faults: Faults) -> None:
    """A fault when both sizes are given and ``by`` does not divide the first."""
    if size is not None and by is not None and size % by:
        faults.add(
            where, f"{size} is not divisible by {by_name} ({by})", f"choose a {by_name} that divides it"
        )


def _check_below(
    ids: int | Iterable[int],
    size: int | None,
    where: str,
    faults: Faults,
    *,
    fault: str = "outside the vocabulary",
    bound: str = "",
) -> None:
    """A fault for the token ids that are not below ``size``; ``bound`` names it, by default by its value."""
    listed = [ids] if isinstance(ids, int) else ids
    if size is not None and (outside := [str(one) for one in listed if one >= size]):
        faults.add(where, f"{fault} ({', '.join(outside)})", f"ids must be below {bound or size}")


def _check_rate(draft: RunDraft, schedule: Mapping[str, Any], faults: Faults) -> None:
    """A fault when the optimizer of a file states another learning rate than the schedule that it follows."""
    stated = draft.optimizer.get("learning_rate")
    followed = schedule.get("learning_rate", schedule.get("base_lr"))
    if stated is not None and followed is not None and stated != followed:
        faults.add(
            draft.where("optimizer.learning_rate"),
            f"differs from lr_schedule ({stated:g} against {followed:g})",
            "the schedule decides: remove it here, or make them equal",
        )


def _check_trainable(draft: RunDraft, faults: Faults, remedy: str) -> None:
    """A fault for each section that a model cannot be trained without."""
    for section in ("optimizer", "lr_schedule"):
        if draft.readable and section not in draft.sections:
            faults.add(draft.where(section), "missing", remedy)


def check_ppo(ppo: PPODraft, faults: Faults) -> None:
    """Relations between the PPO hyper-parameters themselves."""
    if sizes := ppo.get("rollout_batch_size", "num_minibatches"):
        where = ppo.where("rollout_batch_size")
        _check_divides(sizes[0], sizes[1], "num_minibatches", where, faults)
    if (ids := ppo.get("stop_token_ids", "valid_vocab_size")) and ids[1]:
        where, bound = ppo.where("stop_token_ids"), f"valid_vocab_size ({ids[1]})"
        _check_below(ids[0], ids[1], where, faults, fault="never sampled", bound=bound)
    _check_critic(ppo, faults)
    _check_unused(ppo, faults)
    _check_critic_warm_up(ppo, faults)


def _check_critic(ppo: PPODraft, faults: Faults) -> None:
    """The estimator and the critic must go together, and without a critic there must be a baseline."""
    from mindrlhf.algorithms.advantages import ADVANTAGES  # numpy: only once a configuration is checked

    if settings := ppo.get("advantage", "critic"):
        advantage, critic = settings
        needs_critic = ADVANTAGES[advantage].needs_critic
        if needs_critic and critic == "none":
            faults.add(
                ppo.where("critic"),
                f"advantage {advantage} needs the values of a critic (none)",
                "use critic: separate or shared, or an advantage that needs none",
            )
        if not needs_critic and critic != "none":
            faults.add(
                ppo.where("advantage"),
                f"a critic would be trained and never used ({advantage} with critic: {critic})",
                "set critic: none",
            )
        if not needs_critic and ppo.get("rollout_batch_size") == (1,):
            faults.add(
                ppo.where("rollout_batch_size"),
                f"one response is its own baseline, so its score teaches nothing (1 with {advantage})",
                "use at least 2",
            )


def _check_unused(ppo: PPODraft, faults: Faults) -> None:
    """Keys that no part of the job would read must keep their defaults."""
    for (key, chosen), unused in UNUSED_WITH.items():
        if ppo.get(key) != (chosen,):
            continue
        for name in unused:
            if (value := ppo.get(name)) and value[0] != keys_of(PPOConfig)[name].default:
                faults.add(ppo.where(name), f"without effect with {key}: {chosen} ({value[0]})", "remove it")


def _check_critic_warm_up(ppo: PPODraft, faults: Faults) -> None:
    settings = ppo.get("critic_warmup_iterations", "total_iterations", "critic")
    if not settings or not settings[0]:
        return
    warm_up, total, critic = settings
    where = ppo.where("critic_warmup_iterations")
    if warm_up >= total:
        fault = f"the policy never learns ({warm_up} of {total} iterations)"
        faults.add(where, fault, "choose fewer than total_iterations")
    if critic == "shared":
        faults.add(
            where,
            f"not possible with critic: shared ({warm_up})",
            "a shared backbone cannot learn values without changing the policy: use critic: separate, or 0",
        )


def check_job(roles: Mapping[str, RunDraft], ppo: PPODraft, world_size: int | None, faults: Faults) -> None:
    """Relations across the files of a job.

    Args:
        roles: draft of "infer", "train", "reward" and, when there is one, "critic".
        ppo: hyper-parameters.
        world_size: number of ranks; ``None``: the files need only agree.
        faults: collects what is wrong.
    """
    _check_trainable(roles["train"], faults, "the model that is trained needs this section")
    if "critic" in roles and not roles["critic"].lr_schedule:
        _check_rate(roles["critic"], roles["train"].lr_schedule, faults)
    _check_world_size(roles, world_size, faults)
    _check_models_agree(roles, faults)
    _check_lengths_and_ids(roles, ppo, faults)
    for role, draft in roles.items():
        if role != "critic" or ppo.get("critic") != ("shared",):  # a shared critic is a head on the policy
            _check_batches(role, draft, ppo, faults)
    trained = {roles[role].path for role in ("train", "critic") if role in roles}
    for draft in {draft.path: draft for draft in roles.values() if draft.path not in trained}.values():
        if draft.micro_batches > 1:
            fault = f"not used ({draft.micro_batches}): no model of this file is trained"
            faults.add(draft.where(ACCUMULATION), fault, "set it, and micro_batch_num, to 1")
    _check_warm_up(roles, ppo, faults)


def _check_world_size(roles: Mapping[str, RunDraft], world_size: int | None, faults: Faults) -> None:
    first = roles["infer"]
    wanted = first.world_size if world_size is None else world_size
    whose = f"{first.path} has {wanted}" if world_size is None else f"there are {wanted}"
    for draft in roles.values():
        needed = draft.world_size
        if needed is None or wanted is None or needed == wanted:
            continue
        dp, mp = draft.parallel["data_parallel"], draft.parallel["model_parallel"]
        faults.add(
            draft.where("parallel_config"),
            f"data_parallel {dp} x model_parallel {mp} = {needed} ranks, but {whose}",
            "start that many workers, change the split, or pass --use_parallel False for one process",
        )


def _check_models_agree(roles: Mapping[str, RunDraft], faults: Faults) -> None:
    infer, train = roles["infer"], roles["train"]

    def differs(draft: RunDraft, place: str, other: RunDraft, values: tuple[Any, Any], remedy: str) -> None:
        fault = f"differs from {other.path} ({values[0]} against {values[1]})"
        faults.add(draft.where(place), fault, remedy)

    for role, draft in roles.items():
        remedy = "all models of a job share one tokenizer"
        if role == "train":
            remedy = "the policies share their weights"
        for key in WEIGHTS_KEYS if role == "train" else ("vocab_size",):
            values = draft.model.get(key), infer.model.get(key)
            if None not in values and values[0] != values[1]:
                differs(draft, f"{MODEL}.{key}", infer, values, remedy)
        values = draft.context.get("device_target"), infer.context.get("device_target")
        if None not in values and values[0] != values[1]:
            remedy = "all models of a job run on one kind of device; --device_target sets it for all"
            differs(draft, "context.device_target", infer, values, remedy)
        # All models of a rank live in one process, which has the settings of the trained policy.
        same_device = values[0] == train.context.get("device_target") != "CPU"
        for key in ("max_device_memory", "max_call_depth") if same_device else ():
            values = draft.context.get(key), train.context.get(key, getattr(ContextConfig, key))
            if values[0] not in (None, values[1]):
                differs(draft, f"context.{key}", train, values, "one process has all models: make them equal")


def _check_lengths_and_ids(roles: Mapping[str, RunDraft], ppo: PPODraft, faults: Faults) -> None:
    lengths = ppo.get("max_prompt_length", "max_response_length")
    for draft in roles.values():
        seq_length, vocab_size = draft.model.get("seq_length"), draft.model.get("vocab_size")
        if lengths and seq_length is not None and sum(lengths) > seq_length:
            total = f"max_prompt_length {lengths[0]} + max_response_length {lengths[1]} = {sum(lengths)}"
            fault = f"{seq_length} is below {total}"
            faults.add(draft.where(f"{MODEL}.seq_length"), fault, "raise seq_length or shorten them")
        for key in ("stop_token_ids", "pad_token_id"):
            if ids := ppo.get(key):
                _check_below(ids[0], vocab_size, ppo.where(key), faults)
        for key in ("valid_vocab_size", "top_k"):
            if (size := ppo.get(key)) and vocab_size is not None and size[0] > vocab_size:
                remedy = f"must be at most {vocab_size}"
                faults.add(ppo.where(key), f"above the vocabulary ({size[0]})", remedy)


def _check_batches(role: str, draft: RunDraft, ppo: PPODraft, faults: Faults) -> None:
    dp, rollout = draft.parallel.get("data_parallel"), ppo.values.get("rollout_batch_size")
    if dp is None or rollout is None:
        return
    name = f"data_parallel of {draft.path}"
    _check_divides(rollout, dp, name, ppo.where("rollout_batch_size"), faults)
    if rollout % dp == 0:
        keys = {"infer": ("generation_batch_size", "score_batch_size"), "train": ()}
        for key in keys.get(role, ("score_batch_size",)):
            _check_part(ppo, key, rollout // dp, f"rollout rows per rank of {draft.path}", faults)
    minibatches = ppo.values.get("num_minibatches")
    if role in ("train", "critic") and minibatches and rollout % minibatches == 0:
        rows = rollout // minibatches
        if rows % dp:
            fault = f"a minibatch of {rows} rows is not divisible by {name} ({dp})"
            faults.add(ppo.where("num_minibatches"), fault, "change rollout_batch_size or num_minibatches")
        else:
            whose = f"minibatch rows per rank of {draft.path}"
            if draft.micro_batches == 1:
                _check_part(ppo, "micro_batch_size", rows // dp, whose, faults)
            elif size := ppo.values.get("micro_batch_size"):
                fault = f"{size}, but {draft.path} has {draft.micro_batches} gradient_accumulation_steps"
                faults.add(ppo.where("micro_batch_size"), fault, "both cut a minibatch: set one to 0 or 1")
            elif (rows // dp) % draft.micro_batches:
                fault = f"{draft.micro_batches} does not divide the {whose} ({rows // dp})"
                faults.add(draft.where(ACCUMULATION), fault, "choose a divisor")


def _check_part(ppo: PPODraft, key: str, rows: int, whose: str, faults: Faults) -> None:
    part = ppo.values.get(key)
    if part and rows % part:
        fault = f"{part} does not divide the {whose} ({rows})"
        faults.add(ppo.where(key), fault, "choose a divisor, or 0 for all")


def _check_warm_up(roles: Mapping[str, RunDraft], ppo: PPODraft, faults: Faults) -> None:
    counts = ppo.get("total_iterations", "ppo_epochs", "num_minibatches", "critic_warmup_iterations")
    if not counts or counts[3] >= counts[0]:
        return
    for role, iterations in (("train", counts[0] - counts[3]), ("critic", counts[0])):
        steps = iterations * counts[1] * counts[2]
        if role in roles and (fault := unfinished_warm_up(roles[role].lr_schedule, steps)):
            faults.add(roles[role].where("lr_schedule.warmup_steps"), *fault)


def check_stage(draft: RunDraft, options: Mapping[str, Any], world_size: int, faults: Faults) -> None:
    """Relations between the YAML and the valid flags of ``sft.py`` or ``reward_model.py``."""
    _check_trainable(draft, faults, "give a finetune_*.yaml, which has this section")
    _check_world_size({"infer": draft}, world_size, faults)
    vocab_size, valid = draft.model.get("vocab_size"), options.get("valid_vocab_size", 0)
    if vocab_size is not None and valid > vocab_size:
        faults.add("--valid_vocab_size", f"{valid} is above the vocabulary", f"must be at most {vocab_size}")
    dp = draft.parallel.get("data_parallel")
    if dp is None or "batch_size" not in options:
        return
    of_yaml = draft.runner.get("batch_size", RunnerConfig.batch_size) * draft.micro_batches * dp
    batch_size = options["batch_size"] or of_yaml
    micro = options.get("micro_batch_size", 0)
    if batch_size % dp:
        fault = f"{batch_size} is not divisible by data_parallel ({dp}) of {draft.path}"
        faults.add("--batch_size", fault, "choose a multiple")
    elif not micro and (batch_size // dp) % draft.micro_batches:
        fault = f"{draft.micro_batches} does not divide the {batch_size // dp} rows of a step on one rank"
        faults.add(draft.where(ACCUMULATION), fault, "choose a divisor, or give --micro_batch_size")
    elif micro and (batch_size // dp) % micro:
        fault = f"{micro} does not divide the {batch_size // dp} rows of a step on one rank"
        faults.add("--micro_batch_size", fault, "choose a divisor, or 0 for all")
