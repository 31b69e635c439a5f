"""Bad inputs of ppo_one_stage.py and the launcher."""

from __future__ import annotations

import json
import socket

import numpy as np

from mindrlhf.utils.files import job_lock
from tests.bad_input.harness import CHAT, LAUNCHER, PPO, REPORT, VOCAB, Bad, Case
from tests.bad_input.spoiling import MODEL, REAL, checkpoint, hf_config, records

ALONE = frozenset({"alone"})


def renamed(case: Case, name: str) -> None:
    for suffix in ("", ".db"):
        (case / f"data.mindrecord{suffix}").rename(case / f"{name}{suffix}")
    case.give(mind_dataset_dir=name)


def under_msrun(case: Case, role: str = "MS_WORKER", workers: str = "4", **env: str) -> None:
    """The environment that msrun gives a process."""
    case.env = {"MS_ROLE": role, "MS_WORKER_NUM": workers, **env}
    case.give(use_parallel="True")


def taken_port(case: Case) -> str:
    """A port that something listens on until the case is over."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    case.closing.append(listener.close)
    return str(listener.getsockname()[1])


def launch_on_port_in_use(case: Case) -> None:
    case.flags = {"--master_port": taken_port(case), **case.flags}


def in_use(case: Case) -> None:
    lock = job_lock(case / "runs/new")
    lock.__enter__()
    case.closing.append(lambda: lock.__exit__(None, None, None))


def port_in_use(case: Case) -> None:
    port = taken_port(case)
    under_msrun(case, "MS_SCHED", "1", MS_SCHED_HOST="127.0.0.1", MS_SCHED_PORT=port)


def large_tokenizer(case: Case) -> None:
    """More tokens than the model has rows."""
    vocab = json.loads((case / "tokenizer/vocab.json").read_text(encoding="utf-8"))
    more = {f"a{letter}": len(vocab) + number for number, letter in enumerate("bcdefghijk")}
    case.write("tokenizer/vocab.json", json.dumps(vocab | more))
    case.write("tokenizer/merges.txt", "#version: 0.2\n" + "".join(f"a {pair[1]}\n" for pair in more))
    case.give(tokenizer_path="tokenizer")


def reward_of_another_tokenizer(case: Case) -> None:
    """The same size, other ids."""
    vocab = json.loads((case / "tokenizer/vocab.json").read_text(encoding="utf-8"))
    case.write("hf/vocab.json", json.dumps({text: len(vocab) - 1 - number for text, number in vocab.items()}))
    case.write("hf/merges.txt", "#version: 0.2\n")
    case.give(load_rm_checkpoint="hf", tokenizer_path="tokenizer")


def strategies_of_another_layout(case: Case) -> None:
    from mindrlhf.parallel.layout import Layout, Mesh
    from mindrlhf.parallel.strategy import write_strategy

    layouts = {"w": Layout(Mesh(1, 4), (8,), ("mp",))}
    write_strategy(layouts, case / "strategy/ref_strategy/strategy_0.ckpt")
    case.give(only_save_strategy="True")


def damaged_strategy(case: Case) -> None:
    case.write("strategy/ref_strategy/strategy_0.ckpt", b"\x08\xff\xff")
    case.give(only_save_strategy="True")


YAMLS = ("generate_x.yaml", "finetune_x.yaml")


def other_reward_weights(case: Case) -> None:
    """``other.ckpt``: the reward model with a larger vocabulary."""
    from mindrlhf.checkpoint.sources import ArraySource
    from mindrlhf.checkpoint.weight_files import open_weights, write_weights

    with open_weights(case / "reward.ckpt") as source:
        arrays = {name: source.read(name) for name in source.tensors}
    name = "model.tok_embeddings.embedding_weight"
    arrays[name] = np.zeros((280, 16), np.float32)
    write_weights(case / "other.ckpt", ArraySource(arrays))


PPO_ROWS = [
    Bad("no such YAML", PPO, lambda c: c.give(reward_path="no.yaml"),
        r"no\.yaml", "there is no such file", "give the path of a YAML file", REAL),
    Bad("no PPO settings", PPO, lambda c: c.remove("ppo_x.yaml"),
        "--ppo_config", r"there is no ppo_x\.yaml", "pass --ppo_config"),
    Bad("an empty YAML", PPO, lambda c: c.write("ppo_x.yaml", ""),
        r"ppo_x\.yaml", "the root is empty", "write 'key: value' lines"),
    Bad("a YAML cut in a string", PPO, lambda c: c.write("ppo_x.yaml", 'seed: 1\nkl_estimator: "k1'),
        r"ppo_x\.yaml: line 2", "while scanning a quoted scalar|found unexpected end", "fix the YAML there"),
    Bad("a tab in a YAML", PPO, lambda c: c.write("ppo_x.yaml", "seed: 1\n\tgamma: 1"),
        r"ppo_x\.yaml: line 2", r"'\\t'|found character", "fix the YAML there"),
    Bad("a key given twice", PPO, lambda c: c.text("ppo_x.yaml", "log_", "total_iterations: 2\nlog_"),
        r"ppo_x\.yaml: line 2", "the key total_iterations is given twice", "fix the YAML there"),
    Bad("an unknown key", PPO, lambda c: c.text("ppo_x.yaml", "gamma:", "gama:"),
        r"ppo_x\.yaml: gama", "unknown key", r"did you mean gamma\?", REAL),
    Bad("text where a number belongs", PPO, lambda c: c.yaml("finetune_x.yaml", f"{MODEL}.num_layers", "two"),
        r"finetune_x\.yaml: model\.model_config\.num_layers", r"wrong type \('two'\)", "be a whole number"),
    Bad("an unknown key on the command line", PPO, lambda c: c.give(set="gamme=1"),
        "--set gamme", "unknown key", r"did you mean gamma\?"),
    Bad("no value on the command line", PPO, lambda c: c.give(set="gamma"),
        "--set 'gamma'", "not of the form key=value", "write --set key=value"),
    Bad("batches that do not divide", PPO, lambda c: c.give(set="num_minibatches=3"),
        r"ppo_x\.yaml: rollout_batch_size", r"4 is not divisible by num_minibatches \(3\)", "divides it"),
    Bad("sizes that do not divide", PPO, lambda c: c.yaml("generate_x.yaml", f"{MODEL}.hidden_size", 18),
        r"generate_x\.yaml: model\.model_config\.hidden_size", r"18 is not divisible by num_heads \(4\)",
        "that divides it"),
    Bad("policies that are not one model", PPO, lambda c: c.yaml("finetune_x.yaml", f"{MODEL}.theta", 5e5),
        r"finetune_x\.yaml: model\.model_config\.theta", r"500000\.0 against 1000000\.0", "share their"),
    Bad("prompt and response longer than the model", PPO, lambda c: c.give(set="max_response_length=65"),
        r"\.yaml: model\.model_config\.seq_length", r"96 is below .* = 97", "raise seq_length or shorten"),
    Bad("stop token outside the vocabulary", PPO, lambda c: c.give(set="stop_token_ids=[258,264]"),
        "stop_token_ids", r"outside the vocabulary \(264\)", "ids must be below 264"),
    Bad("reward model of another vocabulary", PPO,
        lambda c: (c.write("reward.yaml", (c / "generate_x.yaml").read_bytes()),
                   c.yaml("reward.yaml", f"{MODEL}.vocab_size", 272), c.give(reward_path="reward.yaml")),
        r"reward\.yaml: model\.model_config\.vocab_size", "272 against 264", "share one tokenizer"),
    Bad("several faults in several files", PPO,
        lambda c: (c.yaml("generate_x.yaml", f"{MODEL}.theta", "x"), c.give(set=["lam=2", "seed=-1"])),
        r"generate_x\.yaml: model\.model_config\.theta.*seed|seed.*theta|lam",
        r"3 configuration errors.*\('x'\)", "must be a number"),
    Bad("wrong world size", PPO, under_msrun,
        r"finetune_x\.yaml: parallel_config", "1 ranks, but there are 4", "start that many workers", ALONE),
    Bad("one process under msrun", PPO, lambda c: (under_msrun(c), c.give(use_parallel="False")),
        "--use_parallel False", "msrun started 4 workers", "pass --use_parallel True, or start", ALONE),
    Bad("no world size in msrun's environment", PPO, lambda c: under_msrun(c, workers="four"),
        "MS_WORKER_NUM", "'four' is not a number", "start the workers with msrun, or unset it", ALONE),
    Bad("port in use", PPO, port_in_use,
        r"port \d+ of 127\.0\.0\.1", "Address already in use", "give msrun another --master_port", ALONE),
    Bad("a device that is not there", PPO, lambda c: c.give(device_target="Ascend"),
        "context.device_target", "'Ascend', but this machine has no such device", "pass --device_target CPU"),
    Bad("a device that is none", PPO, lambda c: c.give(device_target="TPU"),
        "--device_target", "'TPU'", "choose from"),
    Bad("neither true nor false", PPO, lambda c: c.give(use_parallel="perhaps"),
        "--use_parallel", "'perhaps'", "expected True or False"),
    Bad("no weights", PPO, lambda c: c.give(load_sft_checkpoint_train="no.ckpt"),
        r"train: no\.ckpt", "do not exist", "give existing paths"),
    Bad("a reward model from a run of PPO", PPO,
        lambda c: (checkpoint(c), c.write("runs/old/iteration_000001/critic/rank_0/x", ""),
                   c.give(load_rm_checkpoint="runs/old")),
        "runs/old/iteration_000001 holds", "several models",
        "name runs/old/iteration_000001/policy or runs/old/iteration_000001/critic"),
    Bad("a run without weights", PPO,
        lambda c: (c.write("run/config.json", '{"created": 1, "versions": {}, "configuration": {}}'),
                   c.give(load_sft_checkpoint_train="run")),
        r"run/config\.json", "is the record of a run", "name weights in the run, such as its final/"),
    Bad("no weights named", PPO, lambda c: c.give(load_sft_checkpoint_train=None),
        "no policy weights", "no policy weights", "pass --load_sft_checkpoint_train"),
    Bad("weights cut short", PPO, lambda c: c.cut("policy.ckpt", 0.7),
        r"policy\.ckpt", "damaged", "copy or save it again", REAL),
    Bad("weights of another model", PPO,
        lambda c: [c.yaml(name, f"{MODEL}.intermediate_size", 24) for name in YAMLS],
        r"policy\.ckpt", r"w1\.weight is \(16, 16\), the model has \(24, 16\)", "of one model"),
    Bad("weights of another vocabulary", PPO,
        lambda c: [c.yaml(name, f"{MODEL}.vocab_size", 272) for name in YAMLS],
        r"policy\.ckpt", r"embedding_weight is \(264, 16\), the model has \(272, 16\)", "of one model"),
    Bad("reward model's weights of another vocabulary", PPO,
        lambda c: (other_reward_weights(c), c.give(load_rm_checkpoint="other.ckpt")),
        r"other\.ckpt", r"embedding_weight is \(280, 16\), the model has \(264, 16\)", "of one model"),
    Bad("reward model with another tokenizer", PPO, reward_of_another_tokenizer,
        "--load_rm_checkpoint hf has another tokenizer than --tokenizer_path tokenizer", r"a text is \[\d+\]",
        "give models of one tokenizer"),
    Bad("weights of which a rank is missing", PPO,
        lambda c: (c.give(load_sft_checkpoint_train="two_ranks"), c.remove("two_ranks/rank_1")),
        "two_ranks", "holds 1/2 of the model", r"copy what is missing:\n  - rank_1"),
    Bad("weights with positions scaled by YaRN", PPO,
        lambda c: (hf_config(c, rope_scaling={"type": "yarn"}), c.give(load_ref_checkpoint="hf")),
        r"hf/config\.json.*rope_scaling", "'yarn'", "remove it, unless"),
    Bad("weights of another rope_theta", PPO,
        lambda c: (hf_config(c, rope_theta=5.0), c.give(load_sft_checkpoint_train="hf")),
        r"hf/config\.json and generate_x\.yaml", r"theta: 5\.0 and 1000000\.0", "give files of one model"),
    Bad("a tokenizer larger than the model", PPO, large_tokenizer,
        "--tokenizer_path tokenizer", r"269 tokens, more than the .*vocab_size 264", "give the model's own"),
    Bad("ids that the tokenizer lacks", PPO,
        lambda c: c.give(tokenizer_path="tokenizer", set=f"valid_vocab_size={VOCAB}"),
        "valid_vocab_size 264", r"\(259 tokens\)", "set valid_vocab_size=259"),
    Bad("no data set named", PPO, lambda c: c.give(mind_dataset_dir=None),
        "--mind_dataset_dir", "is missing", "needed unless --only_save_strategy"),
    Bad("no data set", PPO, lambda c: c.give(mind_dataset_dir="no.mindrecord"),
        r"no\.mindrecord", "no such file", r"a MindRecord data set is a file and its \.db index"),
    Bad("a data set without its index", PPO, lambda c: c.remove("data.mindrecord.db"),
        r"data\.mindrecord\.db", "no such file", r"a MindRecord data set is a file and its \.db index"),
    Bad("a data set cut short", PPO, lambda c: c.write("data.mindrecord", b"x" * 1000),
        r"data\.mindrecord", "damaged", "make it again with rlhf_data.py"),
    Bad("a data set under another name", PPO, lambda c: renamed(c, "b.mindrecord"),
        r"b\.mindrecord", "was renamed after it was made", "make it again with rlhf_data.py"),
    Bad("a data set with other columns", PPO, lambda c: records(c, loss_mask=None),
        r"data\.mindrecord", "no column loss_mask", "make it with rlhf_data.py"),
    Bad("prompts longer than allowed", PPO, lambda c: c.give(set="max_prompt_length=16"),
        r"data\.mindrecord", "made with max_prompt_length 32, but the job's is 16", "make the data again"),
    Bad("fewer rows than one batch", PPO, lambda c: c.give(set="rollout_batch_size=16"),
        r"data\.mindrecord", "12 rows are fewer than one batch of 16 prompts", "a smaller batch"),
    Bad("no held-out data set", PPO, lambda c: c.give(eval_dataset_dir="no.mindrecord"),
        r"no\.mindrecord", "no such file", "a MindRecord data set is"),
    Bad("held-out prompts of another length", PPO,
        lambda c: (c.give(eval_dataset_dir="pairs.mindrecord"),
                   records(c, "pairs.mindrecord", prompt_ids=lambda column: column[:, 16:])),
        r"pairs\.mindrecord", "made with max_prompt_length 16", "make the data again"),
    Bad("results in a file", PPO, lambda c: c.give(save_ckpt_dir="data.jsonl"),
        r"--save_ckpt_dir data\.jsonl", "Not a directory", "give a directory that can"),
    Bad("results where nothing can be made", PPO, lambda c: c.give(save_ckpt_dir="/proc/none/x"),
        "--save_ckpt_dir /proc/none/x", "cannot be written", "give a directory that can"),
    Bad("results of another run", PPO, lambda c: c.write("runs/new/metrics.jsonl", ""),
        "--save_ckpt_dir runs/new", r"earlier run \(metrics\.jsonl\)", "give another directory"),
    Bad("results of a job that is running", PPO, in_use,
        "--save_ckpt_dir runs/new", r"in use by process \d+ on \S+ since", "wait until that has ended"),
    Bad("export into a directory with other files", PPO, lambda c: c.give(export_hf_dir="two_ranks"),
        "--export_hf_dir two_ranks", "also holds rank_0, rank_1", "give another path"),
    Bad("export into the working directory", PPO, lambda c: c.give(export_hf_dir="tokenizer/.."),
        r"--export_hf_dir tokenizer/\.\.", "holds --sft_path_infer", "give another path"),
    Bad("export in place of the base model", PPO,
        lambda c: c.give(load_sft_checkpoint_train="hf", export_hf_dir="hf", overwrite="True"),
        "--export_hf_dir hf", "is --load_sft_checkpoint_train hf", "give another path", REAL),
    Bad("export in place of another model", PPO, lambda c: c.give(export_hf_dir="hf"),
        "--export_hf_dir hf", "exists", "give another path, or --overwrite"),
    Bad("export in place of checkpoints", PPO, lambda c: c.give(export_hf_dir="runs/new/iteration_000001"),
        "--save_ckpt_dir runs/new", "writes in --export_hf_dir", "give another path"),
    Bad("weights that checkpoints would replace", PPO,
        lambda c: c.give(save_ckpt_dir="runs/old", load_ref_checkpoint=f"{checkpoint(c)}/policy"),
        "--save_ckpt_dir runs/old", "writes in --load_ref_checkpoint runs/old/iter", "give another path"),
    Bad("export where nothing can be made", PPO, lambda c: c.give(export_hf_dir="/proc/none/x"),
        "/proc/none/x", "cannot be written", "give another path"),
    Bad("experience of another run", PPO,
        lambda c: (c.write("e_iteration_000007.mindrecord", (c / "data.mindrecord").read_bytes()),
                   c.give(save_data_file="e.mindrecord")),
        r"--save_data_file e_iteration_000007\.mindrecord", "exists", "give another path, or --overwrite"),
    Bad("experience where nothing can be made", PPO, lambda c: c.give(save_data_file="data.jsonl/e"),
        "--save_data_file data.jsonl/e_iteration_000001", "Not a directory", "give another path"),
    Bad("resume from nothing", PPO, lambda c: c.give(resume_from="runs/iteration_000001"),
        "--resume_from runs/iteration_000001", "no such directory", "name an existing iteration_NNNNNN"),
    Bad("resume from a directory that is not a checkpoint", PPO, lambda c: c.give(resume_from="hf"),
        "hf", r"no manifest\.json", "name an iteration_NNNNNN directory"),
    Bad("flipped byte in a checkpoint's weights", PPO,
        lambda c: c.flip(f"{checkpoint(c)}/policy/rank_0/checkpoint_0.ckpt", 50),
        r"iteration_000001.*policy/rank_0/checkpoint_0\.ckpt", "SHA-256 is not the manifest's",
        "another checkpoint"),
    Bad("a checkpoint's file cut short", PPO,
        lambda c: c.cut(f"{checkpoint(c)}/policy/rank_0/checkpoint_0.ckpt"),
        r"policy/rank_0/checkpoint_0\.ckpt", "has 50 bytes, the manifest says 100", "another checkpoint"),
    Bad("a checkpoint's manifest cut short", PPO, lambda c: c.cut(f"{checkpoint(c)}/manifest.json"),
        r"manifest\.json", "damaged", "resume from another checkpoint"),
    Bad("a manifest that leaves its directory", PPO,
        lambda c: c.text(f"{checkpoint(c)}/manifest.json", "state.json", "../state.json"),
        r"manifest\.json", r"'\.\./state\.json', which is not in the checkpoint", "another checkpoint"),
    Bad("a reward function without texts", PPO, lambda c: c.give(reward_fn="rewards:f"),
        "--reward_fn", "reads texts", "pass --tokenizer_path too"),
    Bad("a reward function that is not there", PPO,
        lambda c: c.give(reward_fn="nowhere_to_be:found", tokenizer_path="tokenizer"),
        "--reward_fn 'nowhere_to_be:found'", "No module named 'nowhere_to_be'", "must be importable here"),
    Bad("a reward function that is none", PPO,
        lambda c: c.give(reward_fn="math:pi", tokenizer_path="tokenizer"),
        "--reward_fn 'math:pi'", "pi is not a function", "name a function"),
    Bad("strategy files of another layout", PPO, strategies_of_another_layout,
        r"strategy/ref_strategy/strategy_0\.ckpt", "is of dp1 mp4", "remove it or work elsewhere"),
    Bad("a damaged strategy file", PPO, damaged_strategy,
        r"strategy/ref_strategy/strategy_0\.ckpt", "is damaged", "write it again with --only_save_strategy"),
]  # fmt: skip


LAUNCHER_ROWS = [
    Bad("no workers", LAUNCHER, lambda c: c.give(workers=0),
        "--workers", "got 0", "at least 1"),
    Bad("workers that are not a number", LAUNCHER, lambda c: c.give(workers="two"),
        "--workers", "'two'", "invalid int value"),
    Bad("no script", LAUNCHER, lambda c: c.give({"": "no.py"}),
        r"no\.py", "no such script", "give the path of one"),
    Bad("a rank that is not there", LAUNCHER,
        lambda c: (c.flags.pop(""), c.give(show_rank=1), c.give({"": "script.py"})),
        "--show_rank 1", "is not one of", "the 1 workers"),
    Bad("logs in a file", LAUNCHER, lambda c: c.give(log_dir="data.jsonl"),
        r"--log_dir data\.jsonl", "is a file", "give a directory"),
    Bad("port in use", LAUNCHER, launch_on_port_in_use,
        r"--master_port \d+", "is in use", "leave the choice to the launcher", REAL),
    Bad("a port that is none", LAUNCHER,
        lambda c: (c.flags.pop(""), c.give(master_port=70000), c.give({"": "script.py"})),
        "--master_port", "got 70000", "from 1024 to 65535"),
]  # fmt: skip


OTHER_ROWS: list[Bad] = [
    Bad("replies in place of the prompts", CHAT,
        lambda c: c.give(output_file="./data.jsonl", overwrite=True),
        r"--output_file data\.jsonl", r"is --prompt_file data\.jsonl", "give another path", REAL),
    Bad("replies in place of something else", CHAT,
        lambda c: c.give(output_file="script.py", overwrite=True),
        r"--output_file script\.py", "is not a jsonl file with prompt, response", "give another path"),
    Bad("replies that are there", CHAT,
        lambda c: c.write("out.jsonl", '{"prompt": "", "response": "", "tokens": 1, "stopped": true}'),
        r"--output_file out\.jsonl", "exists", "give another path, or --overwrite"),
    Bad("report in place of the metrics", REPORT,
        lambda c: c.give({"--output": "run/metrics.jsonl", "--overwrite": True}),
        r"--output run/metrics\.jsonl", r"is RUN_DIR run/metrics\.jsonl", "give another path", REAL),
    Bad("report in place of something else", REPORT,
        lambda c: (c.write("run/report.html", "mine"), c.give({"--output": None})),
        r"--output run/report\.html", "is not a report", "give another path"),
]  # fmt: skip

ROWS = [*PPO_ROWS, *LAUNCHER_ROWS, *OTHER_ROWS]
