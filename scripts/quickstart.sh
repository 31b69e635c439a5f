#!/usr/bin/env bash
# The main job on an ordinary CPU machine, from nothing: a tiny Qwen2 checkpoint in Hugging Face format is
# made, converted, given prompts, trained with PPO on 4 workers (infer dp1 mp4, train dp2 mp2) and exported.
#   bash scripts/quickstart.sh [OUTPUT_DIR]      OUTPUT_DIR: default runs/quickstart in the repository
set -euo pipefail
output="$(realpath -m "${1:-$(dirname "${BASH_SOURCE[0]}")/../runs/quickstart}")"
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$REPO_ROOT"

tutorial="examples/qwen_ppo_tutorial"
configs="model_configs/qwen_ppo"

# What an earlier quick start left is replaced; a folder that is something else is not touched.
if [[ -e "$output" && ! -e "$output/.mindrlhf-quickstart" && -n "$(ls -A "$output" 2>/dev/null)" ]]; then
    die "$output exists and is not from a quick start; name another folder: bash scripts/quickstart.sh DIR"
fi

ensure_venv ""
rm -rf "$output"
mkdir -p "$output"
touch "$output/.mindrlhf-quickstart"
started=$SECONDS

say "1/5 inputs: CValues-like prompts, a tokenizer, a tiny random Qwen2 (our own generator)"
"$PYTHON" scripts/make_demo_inputs.py --output_dir "$output/inputs"

say "2/5 convert: Hugging Face -> MindSpore"
"$PYTHON" "$tutorial/convert_weight.py" --torch_ckpt_dir "$output/inputs/hf_model" \
    --mindspore_ckpt_path "$output/qwen2_tiny.ckpt" --dtype fp32

say "3/5 preprocess: jsonl -> MindRecord"
"$PYTHON" "$tutorial/rlhf_data.py" --vocab_path "$output/inputs/tokenizer/vocab.json" \
    --merges_file_path "$output/inputs/tokenizer/merges.txt" --file_path "$output/inputs/cvalues_demo.jsonl" \
    --output_path "$output/prompts.mindrecord" --max_prompt_length 32 --seq_length 129

say "4/5 PPO on 4 workers: infer dp1 mp4, train dp2 mp2 (the first iteration compiles every graph)"
"$PYTHON" scripts/msrun_launcher.py --workers 4 --log_dir "$output/logs" "$tutorial/ppo_one_stage.py" \
    --sft_path_infer "$configs/generate_qwen2_tiny.yaml" --sft_path_train "$configs/finetune_qwen2_tiny.yaml" \
    --reward_path "$configs/generate_qwen2_tiny.yaml" --critic_path "$configs/generate_qwen2_tiny.yaml" \
    --mind_dataset_dir "$output/prompts.mindrecord" --save_ckpt_dir "$output/ppo" --use_parallel True \
    --load_sft_checkpoint_infer "$output/qwen2_tiny.ckpt" --load_sft_checkpoint_train "$output/qwen2_tiny.ckpt" \
    --tokenizer_path "$output/inputs/tokenizer" --export_hf_dir "$output/hf_trained" --verify_sync True

say "5/5 check: the export in transformers' own format"
"$PYTHON" scripts/compare_models.py "$output/inputs/hf_model" "$output/hf_trained"

cat <<TEXT

Done in $((SECONDS - started)) s after installing. What lies where:
  $output/inputs/hf_model        the checkpoint PPO started from (Hugging Face format)
  $output/qwen2_tiny.ckpt        the same in MindSpore format
  $output/prompts.mindrecord     the preprocessed prompts
  $output/ppo/metrics.jsonl      one line of metrics an iteration      curves.png  samples.jsonl
  $output/ppo/iteration_*        policy and critic as rank_0 .. rank_3, with optimizer state
  $output/hf_trained             the trained policy (Hugging Face format)
  $output/logs                   output of every worker
TEXT
