#!/usr/bin/env bash
# Makes .venv when needed, then runs lint, types and all tests. Arguments go to pytest, which then runs alone:
#   bash scripts/run_tests.sh tests/unit -k kl
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$REPO_ROOT"

failed=()

# step NAME COMMAND...: runs a check; a failure is remembered and the next check still runs.
step() {
    local name="$1"
    shift
    say "$name"
    "$@" || failed+=("$name")
}

# side_by_side PATH: the tests of PATH beside all others, for most tests keep one core busy, and a job of msrun
# now none, now all. What pytest says of PATH is shown last.
side_by_side() {
    local code=0
    log="$(mktemp)"
    # Without env, bash would have what it starts in the background ignore Ctrl-C.
    env --default-signal=INT,QUIT "$PYTHON" -m pytest "$1" >"$log" 2>&1 &
    beside=$!
    trap 'kill "$beside" 2>/dev/null || true; rm -f "$log"' EXIT
    "$PYTHON" -m pytest --ignore="$1" || code=$?
    say "pytest $1, which began with the others"
    wait "$beside" || code=$?
    cat "$log"
    return "$code"
}

ensure_venv test
# msrun and other tools of the environment are found by name.
export PATH="$VENV/bin:$PATH"

step "ruff check" "$PYTHON" -m ruff check
step "ruff format --check" "$PYTHON" -m ruff format --check
step "mypy" "$PYTHON" -m mypy
if (($#)); then
    step "pytest $*" "$PYTHON" -m pytest "$@"
else
    step "pytest" side_by_side tests/st
fi

((${#failed[@]} == 0)) || { say "FAILED: $(printf '%s; ' "${failed[@]}")"; exit 1; }
say "all checks passed"
