#!/usr/bin/env python
"""The PPO iteration of ppo_iteration.py by TRL's PPOTrainer, for comparison; in its own environment.

    python3.11 -m venv trl_venv
    trl_venv/bin/pip install trl==1.12.0 transformers==5.23.0 torch==2.13.0
    trl_venv/bin/python scripts/benchmark/trl_baseline.py --model default

compare.sh makes that environment. 1.12.0 is the newest TRL with a PPO trainer. Same work: Qwen2 of the same
sizes with random weights, prompts without padding, responses of full length (no stop token, a pad id outside
the vocabulary), value and reward model full transformers of the same size, a reference, one AdamW step of
policy and value model over the whole batch. TRL does not clip gradients and computes logits of all columns.

--dtype: float32; autocast (bf16 autocast of Accelerate around policy and value model in training, weights and
optimizer float32; PPOConfig(bf16=True) alone changes nothing); bf16 (weights and optimizer too, which at this
learning rate lose nearly all of an update in rounding).
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from results import (
    BATCH,
    CLIP_RANGE,
    COLUMNS,
    GAMMA,
    KL_COEF,
    LAMBDA,
    LEARNING_RATE,
    MODELS,
    TEMPERATURE,
    VALUE_CLIP_RANGE,
    VALUE_COEF,
    Steps,
    append_json,
    memory_gib,
    progress,
    row,
    table,
)

DTYPES = ("float32", "autocast", "bf16")


def parse_args() -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="default", help="sizes by name (default: default)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="see above (default: float32)")
    parser.add_argument("--layers", type=int, default=0, help="0: the model's (default)")
    parser.add_argument("--batch", type=int, default=0, help="sequences; 0: the model's (default)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt (default: 64)")
    parser.add_argument("--response", type=int, default=64, help="tokens of a response (default: 64)")
    parser.add_argument("--micro_batch", type=int, default=0, help="rows per backward pass; 0: all (default)")
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa", help="(default: sdpa)")
    parser.add_argument(
        "--optimizer", choices=("adamw_torch", "adamw_torch_fused"), default="adamw_torch_fused",
        help="(default: adamw_torch_fused)",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: the machine's cores (default)")
    parser.add_argument("--steps", type=int, default=5, help="steps that count (default: 5)")
    parser.add_argument("--warm_up", type=int, default=2, help="steps before them (default: 2)")
    parser.add_argument("--json", type=Path, help="append the run to this file as one line of JSON")
    return parser.parse_args()


@dataclass
class Clock:
    """Records when the phases of TRL's loop begin and end, by wrapping the calls at their boundaries."""

    steps: Steps
    marks: list[dict[str, float]] = field(default_factory=list)

    def mark(self, name: str, *, again: bool = False) -> None:
        """Records the time, unless it was already recorded in this step."""
        if again or name not in self.marks[-1]:
            self.marks[-1][name] = time.perf_counter()

    def start(self) -> None:
        """A step begins where the previous one ended."""
        self.marks.append({})
        self.mark("start")

    def end(self) -> None:
        """A step has ended."""
        mark, now = self.marks[-1], time.perf_counter()
        self.steps.seconds.append(
            {
                "iteration": now - mark["start"],
                "rollout": mark["generated"] - mark["generating"],
                "scoring": mark["training"] - mark["generated"],
                "training": mark["trained"] - mark["training"],
            }
        )
        self.steps.notes.setdefault("peak_gib_first_step", memory_gib())
        progress(self.steps)
        self.start()

    def around(self, call: Callable[..., Any], before: str, after: str) -> Callable[..., Any]:
        """``call`` with its beginning and end recorded."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.mark(before)
            result = call(*args, **kwargs)
            self.mark(after, again=True)
            return result

        return timed


def build_models(args: argparse.Namespace) -> dict[str, Any]:
    """Policy, reference, reward and value model with random weights of transformers' own initialisation."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification

    sizes = MODELS[args.model]
    config = Qwen2Config(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_hidden_layers=args.layers or sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        num_key_value_heads=sizes["n_kv_heads"],
        tie_word_embeddings=sizes.get("tie_word_embeddings", False),
        max_position_embeddings=2048,
        rope_theta=1e6,
        num_labels=1,
        use_cache=True,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation=args.attention,
    )
    torch.manual_seed(0)
    models = {
        "model": Qwen2ForCausalLM(config),
        "ref_model": Qwen2ForCausalLM(config),
        "reward_model": Qwen2ForSequenceClassification(config),
        "value_model": Qwen2ForSequenceClassification(config),
    }
    models["ref_model"].load_state_dict(models["model"].state_dict())
    if args.dtype == "bf16":
        models = {name: model.to(torch.bfloat16) for name, model in models.items()}
    return models


def build_trainer(args: argparse.Namespace, batch: int, directory: str) -> Any:
    """TRL's trainer over random prompts."""
    import torch
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    vocabulary = MODELS[args.model]["vocab_size"]
    micro = args.micro_batch or batch
    config = PPOConfig(
        output_dir=directory,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        logging_steps=10**9,
        save_strategy="no",
        num_sample_generations=0,
        gradient_checkpointing=False,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=batch // micro,
        num_mini_batches=1,
        num_ppo_epochs=1,
        local_rollout_forward_batch_size=batch,  # a smaller one would split generation
        total_episodes=batch * (args.warm_up + args.steps),
        response_length=args.response,
        stop_token_id=None,
        temperature=TEMPERATURE,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim=args.optimizer,
        kl_coef=KL_COEF,
        cliprange=CLIP_RANGE,
        cliprange_value=VALUE_CLIP_RANGE,
        vf_coef=VALUE_COEF,
        gamma=GAMMA,
        lam=LAMBDA,
    )
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(1, vocabulary, (4 * batch, args.prompt), generator=generator)
    return PPOTrainer(
        args=config,
        # No text is read or written: two ids outside the vocabulary are all that TRL asks for.
        processing_class=SimpleNamespace(pad_token_id=vocabulary, eos_token_id=vocabulary + 1),
        train_dataset=[{"input_ids": prompt} for prompt in prompts],
        data_collator=lambda rows: {"input_ids": torch.stack([item["input_ids"] for item in rows])},
        **build_models(args),
    )


def watch(trainer: Any, clock: Clock) -> None:
    """Puts the clock around generation, the first training pass and the end of a step."""
    import trl.experimental.ppo.ppo_trainer as module
    from transformers import PrinterCallback, TrainerCallback

    generate = clock.around(module.batch_generation, "generating", "generated")

    def checked(*args: Any, **kwargs: Any) -> Any:
        tokens, logits = generate(*args, **kwargs)
        expected = (clock.steps.batch, clock.steps.prompt + clock.steps.response)
        if tuple(tokens.shape) != expected:
            raise RuntimeError(f"generated {tuple(tokens.shape)}, not the full {expected}")
        return tokens, logits

    module.batch_generation = checked
    accumulate = trainer.accelerator.accumulate

    def accumulating(*models: Any) -> Any:
        clock.mark("training")
        return accumulate(*models)

    trainer.accelerator.accumulate = accumulating
    log = trainer.log

    def logging(*args: Any, **kwargs: Any) -> Any:
        clock.mark("trained")
        return log(*args, **kwargs)

    trainer.log = logging

    class StepEnd(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.end()

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(StepEnd())


def measure(args: argparse.Namespace) -> Steps:
    """All steps of one run."""
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if args.dtype == "autocast" else "no"
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    warnings.simplefilter("ignore")
    import torch
    import transformers
    import trl

    torch.set_num_threads(args.threads or os.cpu_count() or 1)
    transformers.logging.set_verbosity_error()
    batch = args.batch or BATCH[args.model]
    steps = Steps(
        system=f"TRL {trl.__version__}",
        model=args.model,
        dtype=args.dtype,
        batch=batch,
        prompt=args.prompt,
        response=args.response,
        layers=args.layers or MODELS[args.model]["num_layers"],
        warm_up=args.warm_up,
    )
    steps.notes |= {"torch": torch.__version__, "transformers": transformers.__version__}
    with tempfile.TemporaryDirectory(prefix="trl_") as directory:
        trainer = build_trainer(args, batch, directory)
        steps.notes["built_gib"] = memory_gib("VmRSS")
        before = next(trainer.policy_model.model.layers[0].mlp.gate_proj.parameters()).detach().clone()
        clock = Clock(steps)
        watch(trainer, clock)
        gc.collect()
        gc.freeze()  # TRL collects garbage twice per step, which takes 0.3 s when it visits all modules
        clock.start()
        trainer.train()
        after = next(trainer.policy_model.model.layers[0].mlp.gate_proj.parameters())
        steps.notes["changed_weights"] = float((after != before).float().mean())
    steps.peak_gib = memory_gib()
    return steps


def main() -> None:
    """Measure, print, record."""
    args = parse_args()
    steps = measure(args)
    print(f"weights changed by {len(steps.seconds)} steps: {steps.notes['changed_weights']:.1%}")
    print(table(COLUMNS, [row(steps)]))
    if args.json:
        append_json(args.json, steps)


if __name__ == "__main__":
    main()
