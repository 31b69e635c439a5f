"""Checks between values: within one YAML, within the PPO hyper-parameters, and across a job.

Each check runs on the values that are there; a value with a fault of its own has been reported already.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindrlhf.configs.faults import Faults
from mindrlhf.configs.fields import join, keys_of
from mindrlhf.configs.ppo_file import PPODraft
from mindrlhf.configs.run_file import RunDraft
from mindrlhf.configs.schema import CRITIC_KEYS, PPOConfig, RunnerConfig, unfinished_warm_up

MODEL = "model.model_config"

# Sizes and numerics that two models sharing weights must agree on.
_SAME_WEIGHTS = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "n_kv_heads",
    "intermediate_size",
    "rms_norm_eps",
    "theta",
    "qkv_has_bias",
    "tie_word_embeddings",
)


def at(draft: RunDraft, key_path: str) -> str:
    """``file: key.path``."""
    return join(str(draft.path), key_path)


def check_divides(
    values: Mapping[str, Any], key: str, by: int | None, by_name: str, where: str, faults: Faults
) -> None:
    """A fault when ``values[key]`` is there and ``by`` does not divide it."""
    size = values.get(key)
    if size is not None and by is not None and size % by:
        faults.add(
            where, f"{size} is not divisible by {by_name} ({by})", f"choose a {by_name} that divides it"
        )


def check_run(draft: RunDraft, faults: Faults) -> None:
    """Sizes of one YAML that must divide, token ids that must lie inside the vocabulary."""
    model = draft.model
    mp = draft.parallel.get("model_parallel")
    for key in ("num_heads", "n_kv_heads", "vocab_size", "intermediate_size"):
        check_divides(model, key, mp, "parallel_config.model_parallel", at(draft, f"{MODEL}.{key}"), faults)
    check_divides(
        model, "hidden_size", model.get("num_heads"), "num_heads", at(draft, f"{MODEL}.hidden_size"), faults
    )
    check_divides(
        model, "num_heads", model.get("n_kv_heads"), "n_kv_heads", at(draft, f"{MODEL}.num_heads"), faults
    )
    _check_head_dim(draft, faults)
    check_rate(draft, draft.lr_schedule, faults)
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        ids = model.get(key, ())
        check_inside_vocab(
            ids if isinstance(ids, tuple) else (ids,),
            model.get("vocab_size"),
            at(draft, f"{MODEL}.{key}"),
            faults,
        )


def check_rate(draft: RunDraft, schedule: Mapping[str, Any], faults: Faults) -> None:
    """A fault when the optimizer of a file states another learning rate than the schedule that it follows."""
    stated = draft.optimizer.get("learning_rate")
    followed = schedule.get("learning_rate", schedule.get("base_lr"))
    if stated is not None and followed is not None and stated != followed:
        faults.add(
            at(draft, "optimizer.learning_rate"),
            f"differs from lr_schedule ({stated:g} against {followed:g})",
            "the schedule decides: remove it here, or make them equal",
        )


def _check_head_dim(draft: RunDraft, faults: Faults) -> None:
    hidden, heads = draft.model.get("hidden_size"), draft.model.get("num_heads")
    if hidden and heads and hidden % heads == 0 and (hidden // heads) % 2:
        faults.add(
            at(draft, f"{MODEL}.hidden_size"),
            f"heads of odd size ({hidden // heads})",
            "rotary embedding turns pairs: hidden_size / num_heads must be even",
        )


def check_inside_vocab(ids: tuple[int, ...], vocab_size: int | None, where: str, faults: Faults) -> None:
    """A fault for the ids that no row of the embedding belongs to."""
    if vocab_size is None:
        return
    outside = [token for token in ids if token >= vocab_size]
    if outside:
        faults.add(
            where,
            f"outside the vocabulary ({', '.join(map(str, outside))})",
            f"ids must be below {vocab_size}",
        )


def check_trainable(
    draft: RunDraft, faults: Faults, remedy: str = "the model that is trained needs this section"
) -> None:
    """A fault for each section that a model cannot be trained without."""
    for section in ("optimizer", "lr_schedule"):
        if draft.readable and section not in draft.sections:
            faults.add(at(draft, section), "missing", remedy)


def check_ppo(ppo: PPODraft, faults: Faults) -> None:
    """Relations between the PPO hyper-parameters themselves."""
    if sizes := ppo.get("rollout_batch_size", "num_minibatches"):
        check_divides(
            ppo.values,
            "rollout_batch_size",
            sizes[1],
            "num_minibatches",
            ppo.where("rollout_batch_size"),
            faults,
        )
    if (ids := ppo.get("stop_token_ids", "valid_vocab_size")) and ids[1]:
        never = [token for token in ids[0] if token >= ids[1]]
        if never:
            faults.add(
                ppo.where("stop_token_ids"),
                f"never sampled ({', '.join(map(str, never))})",
                f"ids must be below valid_vocab_size ({ids[1]})",
            )
    _check_critic(ppo, faults)
    _check_critic_warm_up(ppo, faults)


def _check_critic(ppo: PPODraft, faults: Faults) -> None:
    """The estimator and the critic must go together; without a critic nothing may ask for one."""
    from mindrlhf.algorithms.advantages import ADVANTAGES  # numpy: only once a configuration is checked

    settings = ppo.get("advantage", "critic")
    if settings:
        advantage, critic = settings
        if ADVANTAGES[advantage].needs_critic and critic == "none":
            faults.add(
                ppo.where("critic"),
                f"advantage {advantage} needs the values of a critic (none)",
                "use critic: separate or shared, or an advantage that needs none",
            )
        if not ADVANTAGES[advantage].needs_critic and critic != "none":
            faults.add(
                ppo.where("advantage"),
                f"a critic would be trained and never used ({advantage} with critic: {critic})",
                "set critic: none",
            )
    if ppo.get("critic") != ("none",):
        return
    keys = keys_of(PPOConfig)
    for name in CRITIC_KEYS:
        if (value := ppo.get(name)) and value[0] != keys[name].default:
            faults.add(ppo.where(name), f"without effect with critic: none ({value[0]})", "remove it")


def _check_critic_warm_up(ppo: PPODraft, faults: Faults) -> None:
    settings = ppo.get("critic_warmup_iterations", "total_iterations", "critic")
    if not settings or not settings[0]:
        return
    warm_up, total, critic = settings
    where = ppo.where("critic_warmup_iterations")
    if warm_up >= total:
        faults.add(
            where,
            f"the policy never learns ({warm_up} of {total} iterations)",
            "choose fewer than total_iterations",
        )
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
        world_size: ranks there are; ``None``: the files need only agree.
        faults: collects what is wrong.
    """
    check_trainable(roles["train"], faults)
    if "critic" in roles and not roles["critic"].lr_schedule:
        check_rate(roles["critic"], roles["train"].lr_schedule, faults)
    _check_world_size(roles, world_size, faults)
    _check_models_agree(roles, faults)
    _check_lengths_and_ids(roles, ppo, faults)
    for role, draft in roles.items():
        _check_batches(role, draft, ppo, faults)
    _check_warm_up(roles, ppo, faults)


def _check_world_size(roles: Mapping[str, RunDraft], world_size: int | None, faults: Faults) -> None:
    first = roles["infer"]
    for draft in roles.values():
        needed = draft.world_size
        wanted = first.world_size if world_size is None else world_size
        if needed is None or wanted is None or needed == wanted:
            continue
        dp, mp = draft.parallel["data_parallel"], draft.parallel["model_parallel"]
        whose = f"{first.path} has {wanted}" if world_size is None else f"there are {wanted}"
        faults.add(
            at(draft, "parallel_config"),
            f"data_parallel {dp} x model_parallel {mp} = {needed} ranks, but {whose}",
            "start that many workers, change the split, or pass --use_parallel False for one process",
        )


def _check_models_agree(roles: Mapping[str, RunDraft], faults: Faults) -> None:
    infer = roles["infer"]
    for role, draft in roles.items():
        for key in _SAME_WEIGHTS if role == "train" else ("vocab_size",):
            ours, theirs = draft.model.get(key), infer.model.get(key)
            if ours is None or theirs is None or ours == theirs:
                continue
            faults.add(
                at(draft, f"{MODEL}.{key}"),
                f"differs from {infer.path} ({ours} against {theirs})",
                "the policies share their weights"
                if role == "train"
                else "all models of a job share one tokenizer",
            )
        ours, theirs = draft.context.get("device_target"), infer.context.get("device_target")
        if ours and theirs and ours != theirs:
            faults.add(
                at(draft, "context.device_target"),
                f"differs from {infer.path} ({ours} against {theirs})",
                "all models of a job run on one kind of device; --device_target sets it for all",
            )


def _check_lengths_and_ids(roles: Mapping[str, RunDraft], ppo: PPODraft, faults: Faults) -> None:
    lengths = ppo.get("max_prompt_length", "max_response_length")
    for draft in roles.values():
        seq_length, vocab_size = draft.model.get("seq_length"), draft.model.get("vocab_size")
        if lengths and seq_length is not None and sum(lengths) > seq_length:
            faults.add(
                at(draft, f"{MODEL}.seq_length"),
                f"{seq_length} is below max_prompt_length {lengths[0]} + max_response_length {lengths[1]}"
                f" = {sum(lengths)}",
                "raise seq_length or shorten them",
            )
        for key in ("stop_token_ids", "pad_token_id"):
            if found := ppo.get(key):
                ids = found[0] if isinstance(found[0], tuple) else found
                check_inside_vocab(ids, vocab_size, ppo.where(key), faults)
        for key in ("valid_vocab_size", "top_k"):
            if (size := ppo.get(key)) and vocab_size is not None and size[0] > vocab_size:
                faults.add(
                    ppo.where(key), f"above the vocabulary ({size[0]})", f"must be at most {vocab_size}"
                )


def _check_batches(role: str, draft: RunDraft, ppo: PPODraft, faults: Faults) -> None:
    dp = draft.parallel.get("data_parallel")
    rollout = ppo.get("rollout_batch_size")
    critic = ppo.get("critic")
    if dp is None or rollout is None:
        return
    if role == "critic" and critic == ("shared",):
        return  # the value head then sits on the policy, and this file's split is not used
    name = f"data_parallel of {draft.path}"
    check_divides(ppo.values, "rollout_batch_size", dp, name, ppo.where("rollout_batch_size"), faults)
    if rollout[0] % dp == 0:
        rows = rollout[0] // dp
        if role == "infer":
            _check_part(ppo, "generation_batch_size", rows, f"rollout rows per rank of {draft.path}", faults)
        if role != "train":
            _check_part(ppo, "score_batch_size", rows, f"rollout rows per rank of {draft.path}", faults)
    minibatches = ppo.get("num_minibatches")
    if role in ("train", "critic") and minibatches and rollout[0] % minibatches[0] == 0:
        minibatch = rollout[0] // minibatches[0]
        if minibatch % dp:
            faults.add(
                ppo.where("num_minibatches"),
                f"a minibatch of {minibatch} rows is not divisible by {name} ({dp})",
                "change rollout_batch_size or num_minibatches",
            )
        else:
            _check_part(
                ppo, "micro_batch_size", minibatch // dp, f"minibatch rows per rank of {draft.path}", faults
            )


def _check_part(ppo: PPODraft, key: str, rows: int, what: str, faults: Faults) -> None:
    part = ppo.get(key)
    if part and part[0] and rows % part[0]:
        faults.add(
            ppo.where(key), f"{part[0]} does not divide the {what} ({rows})", "choose a divisor, or 0 for all"
        )


def _check_warm_up(roles: Mapping[str, RunDraft], ppo: PPODraft, faults: Faults) -> None:
    counts = ppo.get("total_iterations", "ppo_epochs", "num_minibatches", "critic_warmup_iterations")
    if not counts or counts[3] >= counts[0]:
        return
    for role, iterations in (("train", counts[0] - counts[3]), ("critic", counts[0])):
        steps = iterations * counts[1] * counts[2]
        if role in roles and (fault := unfinished_warm_up(roles[role].lr_schedule, steps)):
            faults.add(at(roles[role], "lr_schedule.warmup_steps"), *fault)


def check_stage(draft: RunDraft, options: Mapping[str, Any], world_size: int, faults: Faults) -> None:
    """Relations between the YAML and the valid flags of ``sft.py`` or ``reward_model.py``."""
    check_trainable(draft, faults, "give a finetune_*.yaml, which has this section")
    _check_world_size({"infer": draft}, world_size, faults)
    vocab_size, valid = draft.model.get("vocab_size"), options.get("valid_vocab_size", 0)
    if vocab_size is not None and valid > vocab_size:
        faults.add("--valid_vocab_size", f"{valid} is above the vocabulary", f"must be at most {vocab_size}")
    dp = draft.parallel.get("data_parallel")
    if dp is None or "batch_size" not in options:
        return
    batch_size = options["batch_size"] or draft.runner.get("batch_size", RunnerConfig.batch_size) * dp
    micro = options.get("micro_batch_size", 0)
    if batch_size % dp:
        faults.add(
            "--batch_size",
            f"{batch_size} is not divisible by data_parallel ({dp}) of {draft.path}",
            "choose a multiple",
        )
    elif micro and (batch_size // dp) % micro:
        faults.add(
            "--micro_batch_size",
            f"{micro} does not divide the {batch_size // dp} rows of a step on one rank",
            "choose a divisor, or 0 for all",
        )
