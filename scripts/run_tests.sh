#!/usr/bin/env bash
# Makes .venv when needed, then runs lint, types and all tests. With arguments, which go to pytest, those in one
# process:
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

ensure_venv test
# msrun and other tools of the environment are found by name.
export PATH="$VENV/bin:$PATH"

step "ruff check" "$PYTHON" -m ruff check
step "ruff format --check" "$PYTHON" -m ruff format --check
step "mypy" "$PYTHON" -m mypy
if (($#)); then
    step "pytest $*" "$PYTHON" -m pytest "$@"
else
    # Most tests keep one core busy; tests/conftest.py says which share a process.
    step "pytest" "$PYTHON" -m pytest -n 2
fi

((${#failed[@]} == 0)) || { say "FAILED: $(printf '%s; ' "${failed[@]}")"; exit 1; }
say "all checks passed"
