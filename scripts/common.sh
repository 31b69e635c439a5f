# Shell functions that quickstart.sh and run_tests.sh share. Source it; it runs nothing by itself.
# Defines REPO_ROOT, VENV, PYTHON, say, die and ensure_venv.

REPO_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$REPO_ROOT/.venv"
PYTHON="$VENV/bin/python"

# A foreign environment must not leak into .venv; MindSpore and MindFormers log only errors.
unset PYTHONHOME PYTHONPATH
export PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export GLOG_v="${GLOG_v:-3}"

# say TEXT...: one line with the seconds since the script started.
say() {
    printf '[%4ds] %s\n' "$SECONDS" "$*"
}

die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

python_is_supported() {
    "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1
}

# Name of a Python 3.11 on PATH; fails when there is none.
find_python() {
    local candidate
    for candidate in python3.11 python3 python; do
        if command -v "$candidate" >/dev/null && python_is_supported "$candidate"; then
            printf '%s\n' "$candidate"
            return 0
        fi
    done
    return 1
}

make_venv() {
    local base
    base="$(find_python)" || die "MindRLHF needs Python 3.11 (the pinned mindspore 2.9.0 stack supports no" \
        "other); found: $(python3 --version 2>&1 || true). Install python3.11 and python3.11-venv, put" \
        "python3.11 on PATH, and run this again."
    say "making $VENV with $base"
    "$base" -m venv "$VENV" || {
        rm -rf "$VENV"
        die "'$base -m venv' failed; on Debian run: apt-get install python3.11-venv"
    }
}

# What an installation depends on: where it is, what it needs, and which extra.
install_key() {
    { printf '%s\n' "$REPO_ROOT" "$1"; cat "$REPO_ROOT/setup.py" "$REPO_ROOT/requirements.txt"; } |
        sha256sum | cut -d' ' -f1
}

# Whether extra $1 was installed by an earlier run and nothing has changed since.
is_installed() {
    local stamp="$VENV/.mindrlhf-installed-${1:-run}"
    [[ -f "$stamp" && "$(cat "$stamp")" == "$(install_key "$1")" ]]
}

# ensure_venv EXTRA: makes .venv when missing and installs the package with EXTRA ("", "demo" or "test"),
# unless that was done before; the test extra includes all the others.
ensure_venv() {
    local extra="$1" target="$REPO_ROOT"
    command -v "$PYTHON" >/dev/null && "$PYTHON" -m pip --version >/dev/null 2>&1 || make_venv
    python_is_supported "$PYTHON" || die "$VENV holds $("$PYTHON" --version 2>&1), MindRLHF needs Python 3.11;" \
        "delete that directory and run this again."
    if is_installed "$extra" || is_installed test; then
        say "environment is up to date: $VENV"
        return 0
    fi
    [[ -z "$extra" ]] || target="$REPO_ROOT[$extra]"
    say "installing $target (a few minutes the first time)"
    "$PYTHON" -m pip install --quiet --quiet --editable "$target" ||
        die "pip could not install the pinned packages; see its message above (is a package index configured?)"
    install_key "$extra" >"$VENV/.mindrlhf-installed-${extra:-run}"
    say "installed"
}
