"""MindFormers' other keys: no key of a YAML is swallowed.

A key that :mod:`mindrlhf.configs.keys` declares is used. Any other key of MindFormers may appear in a YAML
as long as it asks for nothing (its *neutral* values). Another value is refused, with what to do instead,
where it would change numbers, memory or where work is done; it is named in one warning where it is
harmless. ``test_mindformers_agreement.py`` compares these tables with the installed MindFormers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from mindrlhf.configs.faults import Faults, shown
from mindrlhf.configs.fields import join


class Foreign(NamedTuple):
    """A key of MindFormers that is not used.

    Attributes:
        neutral: values that ask for nothing; ``None``: any value.
        instead: what to do in place of another value; empty: it is harmless.
        same_as: a key of the same section whose value is neutral, too.
    """

    neutral: tuple[Any, ...] | None
    instead: str = ""
    same_as: str = ""

    def is_neutral(self, value: object, section: Mapping[Any, Any]) -> bool:
        """Whether ``value`` asks for nothing."""
        if self.neutral is None or (self.same_as and value == section.get(self.same_as)):
            return True
        # False == 0 == 0.0 in Python, as intended here: any of them is neutral.
        return value in self.neutral


def _describes_nothing(*names: str) -> dict[str, Foreign]:
    return dict.fromkeys(names, Foreign(None))


def _harmless(*names: str, neutral: tuple[Any, ...] = (None, False, "", "OFF")) -> dict[str, Foreign]:
    return dict.fromkeys(names, Foreign(neutral))


def _unsupported(
    *names: str, neutral: tuple[Any, ...] = (False, None), instead: str = ""
) -> dict[str, Foreign]:
    remedy = instead or f"remove it or set it to {neutral[0]}"
    return dict.fromkeys(names, Foreign(neutral, remedy))


_DROPOUT = "remove it or set it to 0: dropout would make old and new log-probs differ"
_SHARDED_OPTIMIZER = "remove it: parallel.enable_parallel_optimizer shares out the optimizer's state"
_PIPELINE = (
    "set it to 1 and raise model_parallel: layers are not split into stages, which would wait for each other "
    "in every token of a rollout"
)
_RECOMPUTE = "set it to False: recompute computes whole layers anew"
_SWAP = "set it to False: context.memory_offload ON moves models to the host, optimizer.swap their moments"

_ARCHITECTURE = "LlamaForCausalLM"
ARCH = _unsupported(
    "type",
    neutral=(_ARCHITECTURE, None),
    instead=f"set it to {_ARCHITECTURE}, MindFormers' class for Qwen2; other architectures are not supported",
)
MODEL = {
    **_describes_nothing(
        "model_type", "model_name", "auto_map",  # what the section describes
        "use_past",  # generation always has a key/value cache, training never
        "multiple_of", "ffn_dim_multiplier",  # for models without intermediate_size
        "max_position_embedding", "offset", "ignore_token_id",
    ),
    **_harmless(
        "checkpoint_name_or_path", "use_rope_slice", "rmsnorm_compute_2d", "is_dynamic",
        "use_attn_mask_compression", "input_sliced_sig", "chunk_prefill", "calculate_per_token_loss",
        "return_hidden_states", "llm_backend", "parallel_decoding_params", "max_decode_length",
        "max_new_tokens", "max_length", "block_size", "num_blocks",
    ),
    **_harmless("do_sample", neutral=(True, None)),
    **_harmless("top_k", neutral=(0, None)),
    **_harmless("top_p", "temperature", "fine_grain_interleave", neutral=(1, None)),
    **_harmless("fused_rms_norm", neutral=(True, False, None)),
    **_harmless("batch_size", neutral=(1, None)),
    "init_method_std": Foreign((0.01, None), same_as="initializer_range"),
    "embedding_init_type": Foreign((None,), "remove it: all weights have param_init_type", "param_init_type"),
    "residual_dtype": Foreign((None,), "remove it: the residual has compute_dtype", "compute_dtype"),
    "repetition_penalty": Foreign((1, None), "remove it or set it to 1"),
    "scaling_factor": Foreign((1, None), "remove it or set it to 1"),
    "extend_method": Foreign(("None", "none", "", None), "remove it or set it to None"),
    "hidden_act": Foreign(("silu", "swiglu", None), "remove it or set it to silu"),
    "rope_scaling": Foreign((None, {}), "remove it"),
    "sliding_window": Foreign((None,), "remove it"),
    "quant_config": Foreign((None, {}), "remove it"),
    "moe_config": Foreign((None, {}, {"expert_num": 1}), "remove it"),
    "parallel_config": Foreign((None, {}), "remove it: the split is parallel_config of the YAML"),
    "pipeline_stage": Foreign((None, 1), _PIPELINE),
    "pp_interleave_num": Foreign((0, 1, None), "remove it or set it to 1"),
    "parallel_optimizer": Foreign((False, None), _SHARDED_OPTIMIZER),
    **_unsupported(
        "attn_proj_has_bias", "qkv_concat", "use_sliding_window", "use_ring_attention",
        "use_eod_attn_mask_compression",
    ),
    **_unsupported(
        "emb_dropout_prob", "embedding_dropout_prob", "hidden_dropout_prob", "attention_dropout_prob",
        "hidden_dropout_rate", "attention_dropout_rate", "attention_dropout", "dropout_rate",
        neutral=(0, None), instead=_DROPOUT,
    ),
}  # fmt: skip

SYNONYMS = {
    "layernorm_compute_dtype": "layernorm_compute_type",
    "softmax_compute_dtype": "softmax_compute_type",
    "params_dtype": "param_init_type",
    "torch_dtype": "compute_dtype",
    "add_qkv_bias": "qkv_has_bias",
    "attention_bias": "qkv_has_bias",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "n_kv_heads",
    "max_position_embeddings": "seq_length",
    "rope_theta": "theta",
    "rotary_base": "theta",
    "layernorm_epsilon": "rms_norm_eps",
}
"""Names of ``model_config`` keys in newer model classes of MindFormers and in Hugging Face -> ours."""

PARALLEL = {
    **_describes_nothing("context_parallel_algo", "mem_coeff"),
    "micro_batch_num": Foreign(None),  # see read_run.py
    "use_seq_parallel": Foreign(None),  # see read_run.py
    **_harmless("gradient_aggregation_group", neutral=(4, None)),
    **_harmless("vocab_emb_dp"),
    "pipeline_stage": Foreign((1, None), _PIPELINE),
    **_unsupported(
        "context_parallel", "expert_parallel", "seq_split_num", "ulysses_degree_in_cp",
        neutral=(1, None),
    ),
    "optimizer_shard": Foreign((False, None, 1), _SHARDED_OPTIMIZER),
}  # fmt: skip

CONTEXT = {
    **_describes_nothing("save_graphs_path", "compile_cache_path", "print_file_path"),  # where, not whether
    "mode": Foreign((0, "0", "GRAPH_MODE", None), "must be 0 (graph): everything is compiled"),
    "device_id": Foreign((0, None), "remove it: msrun gives each rank its device; for one process set "
                         "ASCEND_RT_VISIBLE_DEVICES"),
    "deterministic": Foreign(("OFF", False, None), "set it to OFF: kernels choose their order"),
    "enable_compile_cache": Foreign((False, None), "remove it; --enable_compile_cache True keeps graphs"),
    "jit_config": Foreign((None, {}), "remove it: graphs are compiled at MindSpore's default level"),
    "ascend_config": Foreign((None, {}, {"precision_mode": "must_keep_origin_dtype"}), "remove it: "
                             "operators keep the types of the YAML (precision_mode must_keep_origin_dtype)"),
    "gpu_config": Foreign((None, {}), "remove it"),
    **_unsupported("jit_level", "jit_syntax_level", "infer_boost", "precompile_only", neutral=(None, False),
                   instead="remove it: graphs are compiled at MindSpore's default level"),
    **_harmless(
        "enable_graph_kernel", "graph_kernel_flags", "save_graphs", "variable_memory_max_size",
        "runtime_num_threads", "inter_op_parallel_num", "op_timeout", "reserve_class_name_in_scope",
        "check_bprop", "disable_format_transform", "pynative_synchronize", "env_config_path", "aoe_tune_mode",
        "aoe_config", "debug_level", "exec_order", "affinity_cpu_list", "affinity_config",
        "dataset_broadcast_opt_level", "train_precision_sync", "infer_precision_sync", "exclude_cann_cpu",
        "postprocess_use_numpy", "use_graceful_exit", neutral=(None, False, "", 0),
    ),
    **_harmless("memory_optimize_level", neutral=("O0", 0, None)),
    **_harmless("mempool_block_size", neutral=("1GB", None)),
}  # fmt: skip

RUNNER = {
    **_describes_nothing("num_classes", "image_size"),
    **_harmless("sink_mode"),
    **_harmless("sink_size", neutral=(1, -1, 0, None)),
    "stop_step": Foreign((0, None), "remove it: total_iterations or --epochs says when a job ends"),
    **_unsupported("has_trained_epoches", "has_trained_steps", neutral=(0, None),
                   instead="remove it: --resume_training True resumes from a checkpoint"),
}  # fmt: skip

USED_SECTIONS = ("context", "parallel_config", "model", "optimizer", "lr_schedule", "runner_config")
# Sections and top-level keys of MindFormers that are not read.
IGNORED_SECTIONS = (
    "seed", "output_dir", "run_mode", "use_parallel", "print_separate_loss",
    "load_ckpt_format", "transform_process_num",
    "src_strategy_path_or_dir", "load_ckpt_async", "use_legacy", "use_legacy_format",
    "balanced_load", "reshard_worker_num", "remove_redundancy", "save_checkpoint",
    "eval_step_interval", "eval_epoch_interval", "ignore_data_skip", "data_skip_steps",
    "profile_communication", "profile_memory", "init_start_profile", "profile_start_step",
    "profile_stop_step", "profile_rank_ids", "profile_pipeline", "profile_level", "mstx",
    "layer_decay", "lr_scale_factor", "remote_save_url", "save_file",
    "input_data", "predict_batch_size", "adapter_id", "exclude_cann_cpu", "train_precision_sync",
    "infer_precision_sync", "postprocess_use_numpy", "infer", "generation",
    "auto_tune", "filepath_prefix", "autotune_per_step", "cloud_config",
    "trainer", "parallel", "recompute_config", "swap_config", "runner_wrapper", "metric", "processor",
    "train_dataset", "train_dataset_task", "eval_dataset", "eval_dataset_task", "predict_dataset",
    "callbacks", "eval_callbacks", "monitor_config", "moe_config",
)  # fmt: skip

TOP = {
    **_harmless(
        "resume_training", "load_checkpoint", "pretrained_model_dir", "auto_trans_ckpt", "only_save_strategy",
        "do_eval", "profile",
    ),
    **_unsupported("layer_scale", "lr_scale"),
    "grouped_lr_schedule": Foreign((None, {}), "remove it: one lr_schedule is for all weights"),
    "micro_batch_interleave_num": Foreign((1, None), "set it to 1: batches are not interleaved"),
}  # fmt: skip

# What must not be asked for in sections of which at most one key is read (see read_run.py).
WITHIN_IGNORED = {
    "recompute_config": _unsupported(
        "select_recompute", "select_comm_recompute", neutral=(False, None, [], {}), instead=_RECOMPUTE
    ),
    "swap_config": _unsupported("swap", instead=_SWAP),
    "moe_config": {"expert_num": Foreign((1, None), "set it to 1: a Qwen2 model has no experts")},
}  # fmt: skip


def check_foreign(
    section: Mapping[Any, Any], foreign: Mapping[str, Foreign], where: str, faults: Faults
) -> Iterator[str]:
    """Adds a fault for each key that asks for something unsupported.

    Yields:
        ``key (value)`` for each that is harmless.
    """
    for name, key in foreign.items():
        if name not in section or key.is_neutral(section[name], section):
            continue
        if key.instead:
            faults.add(join(where, name), f"not supported ({shown(section[name])})", key.instead)
        else:
            yield f"{name} ({shown(section[name])})"
