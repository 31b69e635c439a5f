"""Bad inputs of the stages before PPO, sft.py and reward_model.py."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

from tests.bad_input.harness import REWARD, SFT, Bad, Case
from tests.bad_input.spoiling import MODEL, REAL, checkpoint, other_pad, records


def stage_checkpoint(case: Case, **fixed: Any) -> str:
    """The same of a stage."""
    return checkpoint(case, "runs/old/step_000004", **fixed)


def checkpoint_of_an_earlier_version(case: Case) -> None:
    """Its state has no format, and its manifest fits."""
    directory = stage_checkpoint(case)
    manifest = json.loads((case / f"{directory}/manifest.json").read_text(encoding="utf-8"))
    content = b'{"iteration": 1}'
    case.write(f"{directory}/state.json", content)
    manifest["files"]["state.json"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    case.write(f"{directory}/manifest.json", json.dumps(manifest))


def nothing_but_damaged_ones(case: Case) -> None:
    directory = checkpoint(case, "runs/new/step_000004")
    case.flip(f"{directory}/policy/rank_0/checkpoint_0.ckpt", 50)
    case.give(resume_from=None, resume_training="True")


ROWS = [
    Bad("a YAML for generation", SFT,
        lambda c: c.yaml("finetune_x.yaml", "optimizer", None),
        r"finetune_x\.yaml: optimizer", "missing", "give a finetune_"),
    Bad("no weights", SFT, lambda c: c.give(load_sft_checkpoint="no.ckpt"),
        r"--load_sft_checkpoint no\.ckpt", "does not exist", "name existing weights"),
    Bad("weights cut short", SFT, lambda c: c.cut("policy.ckpt", 0.7),
        r"policy\.ckpt", "damaged", "copy or save it again"),
    Bad("more rows a batch than there are", SFT, lambda c: c.give(batch_size=64),
        "--batch_size", r"64 rows, but there are only 11", "make it smaller"),
    Bad("micro-batches that do not divide", SFT, lambda c: c.give(micro_batch_size=3),
        "--micro_batch_size", "3 does not divide the 4 rows", "choose a divisor, or 0"),
    Bad("learning rate below zero", SFT, lambda c: c.give(learning_rate=-1),
        "--learning_rate", r"-1\.0", "must be a number > 0"),
    Bad("a model shorter than the data", SFT, lambda c: c.yaml("finetune_x.yaml", f"{MODEL}.seq_length", 20),
        r"data\.mindrecord: row 0", "more than the model's seq_length 20", "make the data again"),
    Bad("data of another tokenizer", SFT, lambda c: c.give(valid_vocab_size=100),
        r"data\.mindrecord: row 0", "is not below the model's vocab_size 100", "another tokenizer"),
    Bad("data padded with another token", SFT,
        lambda c: records(c, prompt_ids=other_pad, pretrain_ids=other_pad),
        r"data\.mindrecord: row 0", "padded with token 257, .* pad_token_id is 256", "another tokenizer"),
    Bad("prompts without responses", SFT,
        lambda c: records(c, loss_mask=np.zeros_like),
        r"data\.mindrecord: row 0", "there is no response", "can only be used for PPO"),
    Bad("one prompt to hold out and none to train on", SFT, lambda c: c.give(eval_fraction=0.99),
        r"data\.mindrecord", "12 different prompt", "give more data or another --eval_fraction"),
    Bad("weights in one file that exists", SFT, lambda c: c.give(save_full_ckpt="reward.ckpt"),
        r"--save_full_ckpt reward\.ckpt", "exists", "give another path, or --overwrite"),
    Bad("weights in place of the base model", SFT,
        lambda c: c.give(save_full_ckpt="./policy.ckpt", overwrite=True),
        r"--save_full_ckpt policy\.ckpt", r"is --load_sft_checkpoint policy\.ckpt", "give another path"),
    Bad("export in place of another model", SFT, lambda c: c.give(export_hf_dir="hf"),
        "--export_hf_dir hf", "exists", "give another path, or --overwrite"),
    Bad("weights in one file of an unknown kind", SFT, lambda c: c.give(save_full_ckpt="w.bin"),
        r"--save_full_ckpt w\.bin", "output", r"must end with \.ckpt or \.safetensors"),
    Bad("weights in one file where nothing can be made", SFT,
        lambda c: c.give(save_full_ckpt="/proc/none/w.ckpt"),
        r"/proc/none/w\.ckpt", "cannot be written", "give another path"),
    Bad("results in a file", SFT, lambda c: c.give(save_ckpt_dir="data.jsonl"),
        r"--save_ckpt_dir data\.jsonl", "Not a directory", "give a directory that can"),
    Bad("results of another run", SFT, lambda c: c.write("runs/new/metrics.jsonl", ""),
        "--save_ckpt_dir runs/new", r"earlier run \(metrics\.jsonl\)", "continue with --resume_training"),
    Bad("resume from nothing", SFT, lambda c: c.give(resume_from="runs/step_000001"),
        "--resume_from runs/step_000001", "no such directory", "name an existing step_NNNNNN", REAL),
    Bad("resume from a directory that is not a checkpoint", SFT, lambda c: c.give(resume_from="hf"),
        "hf", r"no manifest\.json", r"step_NNNNNN of sft\.py"),
    Bad("two answers to where a run goes on", SFT,
        lambda c: (stage_checkpoint(c), c.give(resume_training="True")),
        "--resume_training True.*--resume_from", "runs/old/step_000004", "give one of the two"),
    Bad("flipped byte in a checkpoint's weights", SFT,
        lambda c: c.flip(f"{stage_checkpoint(c)}/policy/rank_0/checkpoint_0.ckpt", 50),
        r"step_000004.*policy/rank_0/checkpoint_0\.ckpt", "SHA-256 is not the manifest's",
        "another checkpoint"),
    Bad("a checkpoint's file cut short", SFT,
        lambda c: c.cut(f"{stage_checkpoint(c)}/policy/rank_0/checkpoint_0.ckpt"),
        r"policy/rank_0/checkpoint_0\.ckpt", "has 50 bytes, the manifest says 100", "another checkpoint"),
    Bad("a checkpoint's manifest cut short", SFT, lambda c: c.cut(f"{stage_checkpoint(c)}/manifest.json"),
        r"manifest\.json", "damaged", "resume from another checkpoint"),
    Bad("nothing but damaged checkpoints to go on from", SFT, nothing_but_damaged_ones,
        "runs/new", r"all 1 checkpoint.*SHA-256", "remove them to start over"),
    Bad("a checkpoint of an earlier version", SFT, checkpoint_of_an_earlier_version,
        r"runs/old/step_000004/state\.json", "format None", "start a new run from its weights"),
    Bad("a checkpoint of PPO", SFT, checkpoint,
        "runs/old/iteration_000001", "recipe: ppo in the checkpoint, sft now",
        "start over in another --save_ckpt_dir"),
    Bad("a checkpoint of another stage", SFT, lambda c: stage_checkpoint(c, recipe="reward"),
        "runs/old/step_000004", "recipe: reward in the checkpoint, sft now", "give the configuration"),
    Bad("a checkpoint of other data", REWARD,
        lambda c: stage_checkpoint(c, **{"recipe": "reward", "rows.train": 5}),
        "runs/old/step_000004", "rows.train: 5 in the checkpoint, 11 now", "give the configuration"),
    Bad("a run that is finished and has no checkpoint", SFT,
        lambda c: (c.write("runs/new/final/rank_0/checkpoint_0.ckpt", "x"), c.give(resume_training="True")),
        "--save_ckpt_dir runs/new", r"has finished \(final\)", "to train again, give another directory"),
    Bad("less than no checkpoints kept", SFT, lambda c: c.give(keep_checkpoints=-1),
        "--keep_checkpoints", r"out of range \(-1\)", "must be a whole number >= 0"),
    Bad("no skipped updates allowed at all", REWARD, lambda c: c.give(max_skipped_updates=0),
        "--max_skipped_updates", r"out of range \(0\)", "must be a whole number >= 1"),
    Bad("a checkpoint every minus one steps", REWARD, lambda c: c.give(save_interval=-1),
        "--save_interval", r"out of range \(-1\)", "must be a whole number >= 0"),
    Bad("a watchdog that waits for a word", SFT, lambda c: c.give(watchdog_timeout="long"),
        "--watchdog_timeout", "'long'", "invalid float value"),
    Bad("no rejected responses", REWARD, lambda c: c.give(mind_dataset_dir="data.mindrecord"),
        r"data\.mindrecord", "no column rejected_ids, rejected_mask", r"rlhf_data\.py --pairs", REAL),
    Bad("one sample to calibrate with", REWARD, lambda c: c.give(calibration_samples=1),
        "--calibration_samples", r"out of range \(1\)", "must be a whole number >= 2"),
    Bad("calibration on nothing known", REWARD, lambda c: c.give(calibrate="all"),
        "--calibrate", "'all'", "choose from"),
    Bad("an unknown key", REWARD,
        lambda c: c.text("finetune_x.yaml", "warmup_ratio", "warm_up_ratio"),
        r"finetune_x\.yaml: lr_schedule\.warm_up_ratio", "unknown key", r"did you mean warmup_ratio\?"),
    Bad("a directory in place of the data", REWARD, lambda c: c.give(mind_dataset_dir="hf"),
        "hf: ", "no such file", "a MindRecord data set is a file"),
]  # fmt: skip
