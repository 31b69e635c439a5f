#!/usr/bin/env bash
# One PPO iteration of MindRLHF beside TRL's on this machine, as one table of times, memory and ratios.
#
#   scripts/benchmark/compare.sh [--rounds N] [--steps N] [--dtypes "float32 autocast bf16"]
#                                [--own_dtypes "float32 bfloat16"] [--output FILE] [small] [default] [large]
#
# --dtypes are TRL's; --own_dtypes ours: the operands of products (bfloat16 needs avx512_bf16 and g++).
#
# Ours and TRL's runs alternate (A B A B), each a process of its own of at most RUN_LIMIT seconds (default 240),
# so that what else the machine does meets both. TRL lives in TRL_VENV (default ~/.cache/mindrlhf/trl_venv), made
# on the first call from the package index (PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu gives torch
# without CUDA where the index has only the other). RUN_PREFIX is put before each run, for example "taskset -c 0,1".
# A round of all three models takes about 17 minutes. bf16 is run once per round for small and default only.

set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$HERE/../common.sh"

TRL_VENV="${TRL_VENV:-${XDG_CACHE_HOME:-$HOME/.cache}/mindrlhf/trl_venv}"
TRL_PACKAGES=(trl==1.12.0 transformers==5.23.0 torch==2.13.0)
RUN_LIMIT="${RUN_LIMIT:-240}"
rounds=2 steps=3 dtypes="float32 autocast bf16" own_dtypes="float32 bfloat16" output="" models=()

usage() {
    sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

while [[ $# -gt 0 ]]; do
    case "$1" in
        --rounds) rounds="$2"; shift 2 ;;
        --steps) steps="$2"; shift 2 ;;
        --dtypes) dtypes="$2"; shift 2 ;;
        --own_dtypes) own_dtypes="$2"; shift 2 ;;
        --output) output="$2"; shift 2 ;;
        -h | --help) usage; exit 0 ;;
        small | default | large) models+=("$1"); shift ;;
        *) usage >&2; die "unknown argument $1" ;;
    esac
done
[[ ${#models[@]} -gt 0 ]] || models=(small default large)
[[ -n "$output" ]] || output="$(mktemp --suffix=.jsonl)"

ensure_trl() {
    "$TRL_VENV/bin/python" -c 'import torch, transformers, trl' 2>/dev/null && return 0
    local base
    base="$(find_python)" || die "TRL's environment needs Python 3.11"
    say "making $TRL_VENV (${TRL_PACKAGES[*]})"
    "$base" -m venv "$TRL_VENV"
    "$TRL_VENV/bin/python" -m pip install --quiet "${TRL_PACKAGES[@]}" ||
        die "pip could not install ${TRL_PACKAGES[*]}; see its message above"
}

# run LABEL CMD...: one bounded run; a failure is said and the others go on.
run() {
    local label="$1"
    shift
    say "$label"
    # RUN_PREFIX is a command with its arguments: it must split.
    # shellcheck disable=SC2086
    ${RUN_PREFIX:-} timeout "$RUN_LIMIT" "$@" --steps "$steps" --json "$output" >"$log" 2>&1 ||
        { say "$label FAILED, its last lines:"; tail -n 5 "$log"; }
    grep -E '^\| (MindRLHF|TRL)' "$log" || true
}

# Rows of our backward and scoring passes and steps of a decode call, by model and dtype: nearly the same time as all at once, and less
# memory than TRL.
rows() {
    case "$1" in
        small) echo "--micro_batch $([[ $2 == float32 ]] && echo 8 || echo 16) --decode_steps 4" ;;
        default) echo "--micro_batch 8 --score_batch 8" ;;
        large) echo "--micro_batch 4 --score_batch 4" ;;
    esac
}

ensure_trl
export TRL_EXPERIMENTAL_SILENCE=1
log="$(mktemp)"
trap 'rm -f "$log"' EXIT
for ((round = 1; round <= rounds; round++)); do
    for model in "${models[@]}"; do
        for dtype in $own_dtypes; do
            # shellcheck disable=SC2046
            run "round $round/$rounds: MindRLHF $model $dtype" \
                "$PYTHON" "$HERE/ppo_iteration.py" --model "$model" --dtype "$dtype" $(rows "$model" "$dtype")
        done
        for dtype in $dtypes; do
            [[ "$dtype $model" != "bf16 large" ]] || continue
            run "round $round/$rounds: TRL $model $dtype" \
                "$TRL_VENV/bin/python" "$HERE/trl_baseline.py" --model "$model" --dtype "$dtype"
        done
    done
done
say "all runs: $output"
"$PYTHON" "$HERE/compare_table.py" "$output"
