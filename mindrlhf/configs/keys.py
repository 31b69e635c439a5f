"""The keys of MindFormers' YAML: which are read, which may stand there, which must stay neutral."""

from __future__ import annotations

from typing import Any

from mindrlhf.configs.rules import Rule

_SIZE = Rule(kind="int", at_least=1)
_REQUIRED_SIZE = Rule(kind="int", at_least=1, required=True)
_DTYPE = Rule(kind="str", choices=("float32", "float16", "bfloat16"))
_REQUIRED_DTYPE = Rule(kind="str", choices=_DTYPE.choices, required=True)
_FLAG = Rule(kind="bool")
_REQUIRED_FLAG = Rule(kind="bool", required=True)

DTYPE_KEYS = (
    "compute_dtype",
    "param_init_type",
    "layernorm_compute_type",
    "softmax_compute_type",
    "rotary_dtype",
)

# Required here: every key whose MindFormers default is not Qwen2's value.
MODEL_RULES: dict[str, Rule] = {
    "vocab_size": _REQUIRED_SIZE,
    "hidden_size": _REQUIRED_SIZE,
    "num_layers": _REQUIRED_SIZE,
    "num_heads": _REQUIRED_SIZE,
    "n_kv_heads": Rule(kind="int", at_least=1, nullable=True),  # null: as many as num_heads
    "intermediate_size": _REQUIRED_SIZE,
    "seq_length": _REQUIRED_SIZE,
    "rms_norm_eps": Rule(kind="float", above=0, below=1, required=True),
    "theta": Rule(kind="float", above=1, required=True),
    "initializer_range": Rule(kind="float", above=0),
    "qkv_has_bias": _REQUIRED_FLAG,
    "tie_word_embeddings": _FLAG,
    "use_flash_attention": _FLAG,
    "compute_dtype": _REQUIRED_DTYPE,
    "param_init_type": _REQUIRED_DTYPE,
    "layernorm_compute_type": _DTYPE,
    "softmax_compute_type": _DTYPE,
    "rotary_dtype": _DTYPE,
    "batch_size": _SIZE,
    "pad_token_id": Rule(kind="int", at_least=0, required=True),
    "bos_token_id": Rule(kind="int", at_least=0, nullable=True),
    "eos_token_id": Rule(kind="ids", at_least=0, required=True),
}

# LlamaConfig's other keys: they steer MindFormers' kernels, memory or text generation, not the numerics here.
MODEL_ACCEPTED = (
    "type",
    "model_type",
    "model_name",
    "checkpoint_name_or_path",
    "use_past",
    "do_sample",
    "top_k",
    "top_p",
    "temperature",
    "max_decode_length",
    "max_new_tokens",
    "max_length",
    "max_position_embedding",
    "multiple_of",
    "ffn_dim_multiplier",
    "ignore_token_id",
    "embedding_init_type",
    "init_method_std",
    "is_dynamic",
    "block_size",
    "num_blocks",
    "use_rope_slice",
    "use_ring_attention",
    "use_attn_mask_compression",
    "use_eod_attn_mask_compression",
    "fused_rms_norm",
    "rmsnorm_compute_2d",
    "fine_grain_interleave",
    "pp_interleave_num",
    "offset",
    "parallel_optimizer",
    "input_sliced_sig",
    "chunk_prefill",
    "calculate_per_token_loss",
    "return_hidden_states",
    "llm_backend",
    "parallel_decoding_params",
    "auto_map",
)

# Keys that would change the numerics in a way PPO here does not implement: only these values may stand there.
MODEL_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1, None),
    "scaling_factor": (1, None),
    "extend_method": ("None", "none", "", None),
    "attn_proj_has_bias": (False, None),
    "qkv_concat": (False, None),
    "residual_dtype": (None,),
    "moe_config": (None, {}),
    "parallel_config": (None, {}),
    "quant_config": (None, {}),
    "pipeline_stage": (None, 1),
    "emb_dropout_prob": (0, None),
    "embedding_dropout_prob": (0, None),
    "hidden_dropout_prob": (0, None),
    "attention_dropout_prob": (0, None),
    "hidden_dropout_rate": (0, None),
    "attention_dropout_rate": (0, None),
    "attention_dropout": (0, None),
    "dropout_rate": (0, None),
    "hidden_act": ("silu", "swiglu", None),
    "rope_scaling": (None, {}),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
}

PARALLEL_RULES: dict[str, Rule] = {"data_parallel": _REQUIRED_SIZE, "model_parallel": _REQUIRED_SIZE}
PARALLEL_ACCEPTED = (
    "micro_batch_num",
    "use_seq_parallel",
    "optimizer_shard",
    "gradient_aggregation_group",
    "vocab_emb_dp",
    "context_parallel_algo",
    "ulysses_degree_in_cp",
    "mem_coeff",
)
PARALLEL_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "pipeline_stage": (1, None),
    "context_parallel": (1, None),
    "expert_parallel": (1, None),
    "seq_split_num": (1, None),
}

DEVICE_TARGETS = ("CPU", "Ascend", "GPU")
MODES = {0: 0, 1: 1, "0": 0, "1": 1, "GRAPH_MODE": 0, "PYNATIVE_MODE": 1}
CONTEXT_RULES: dict[str, Rule] = {
    "device_target": Rule(kind="str", choices=DEVICE_TARGETS, required=True),
    "max_device_memory": Rule(kind="str", nullable=True),
    "max_call_depth": Rule(kind="int", at_least=1),
}
# Handed on in ContextConfig.extra.
CONTEXT_ACCEPTED = (
    "mode",
    "device_id",
    "enable_graph_kernel",
    "graph_kernel_flags",
    "save_graphs",
    "save_graphs_path",
    "deterministic",
    "ascend_config",
    "gpu_config",
    "jit_config",
    "jit_level",
    "jit_syntax_level",
    "infer_boost",
    "memory_optimize_level",
    "memory_offload",
    "mempool_block_size",
    "variable_memory_max_size",
    "enable_compile_cache",
    "compile_cache_path",
    "runtime_num_threads",
    "inter_op_parallel_num",
    "op_timeout",
    "precompile_only",
    "reserve_class_name_in_scope",
    "check_bprop",
    "disable_format_transform",
    "pynative_synchronize",
    "print_file_path",
    "env_config_path",
    "aoe_tune_mode",
    "aoe_config",
    "debug_level",
    "exec_order",
    "affinity_cpu_list",
    "affinity_config",
    "dataset_broadcast_opt_level",
    "train_precision_sync",
    "infer_precision_sync",
    "exclude_cann_cpu",
    "postprocess_use_numpy",
    "use_graceful_exit",
)

RUNNER_RULES: dict[str, Rule] = {
    "epochs": _SIZE,
    "batch_size": _SIZE,
    "sink_mode": _FLAG,
    "sink_size": Rule(kind="int", at_least=-1),
    # gradient accumulation is micro_batch_size of the PPO configuration
    "gradient_accumulation_steps": Rule(kind="int", choices=(1,)),
}
RUNNER_ACCEPTED = ("num_classes", "stop_step", "image_size", "has_trained_epoches", "has_trained_steps")

USED_SECTIONS = ("context", "parallel_config", "model", "optimizer", "lr_schedule", "runner_config")
# Sections and top-level keys of MindFormers that PPO does not use.
IGNORED_SECTIONS = (
    "seed", "output_dir", "run_mode", "use_parallel", "resume_training", "print_separate_loss",
    "load_checkpoint", "load_ckpt_format", "auto_trans_ckpt", "transform_process_num",
    "src_strategy_path_or_dir", "only_save_strategy", "load_ckpt_async", "use_legacy", "use_legacy_format",
    "pretrained_model_dir", "balanced_load", "reshard_worker_num", "remove_redundancy", "save_checkpoint",
    "do_eval", "eval_step_interval", "eval_epoch_interval", "ignore_data_skip", "data_skip_steps",
    "profile", "profile_communication", "profile_memory", "init_start_profile", "profile_start_step",
    "profile_stop_step", "profile_rank_ids", "profile_pipeline", "profile_level", "mstx",
    "layer_decay", "lr_scale_factor", "micro_batch_interleave_num", "remote_save_url", "save_file",
    "input_data", "predict_batch_size", "adapter_id", "exclude_cann_cpu", "train_precision_sync",
    "infer_precision_sync", "postprocess_use_numpy", "infer", "generation",
    "auto_tune", "filepath_prefix", "autotune_per_step", "cloud_config",
    "trainer", "parallel", "recompute_config", "swap_config", "runner_wrapper", "metric", "processor",
    "train_dataset", "train_dataset_task", "eval_dataset", "eval_dataset_task", "predict_dataset",
    "callbacks", "eval_callbacks", "monitor_config", "moe_config",
)  # fmt: skip
TOP_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "layer_scale": (False, None),
    "lr_scale": (False, None),
    "grouped_lr_schedule": (None, {}),
}
MOE_NEUTRAL: dict[str, tuple[Any, ...]] = {"expert_num": (1, None)}
