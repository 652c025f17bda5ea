#!/usr/bin/env bash
# Lint and tests in an environment of their own.   ./test.sh [--all] [pytest arguments]
#
# --all adds the tests marked slow, and a second run of the fast ones on Python 3.12 where that is installed.
# Needs Python 3.11 or newer and a package index; PyTorch (CPU) is used by parity tests and skipped where it has no build.
set -euo pipefail
cd "$(dirname "$0")"
ROOT=$PWD
all=0
if [ "${1:-}" = --all ]; then all=1; shift; fi

environment() {  # environment PYTHON FOLDER EXTRAS: a virtual environment that is made once and kept while it fits
  local python=$1 folder=$2 extras=$3 stamp
  stamp=$("$python" -c 'import sys; print(sys.version)')$(cat pyproject.toml)
  if [ "$(cat "$folder/stamp" 2>/dev/null)" != "$stamp" ]; then
    rm -rf "$folder"
    "$python" -m venv "$folder"
    "$folder/bin/pip" install --quiet --upgrade pip
    "$folder/bin/pip" install --quiet -e ".[$extras]"
    printf '%s' "$stamp" > "$folder/stamp"
  fi
}

python=${PYTHON:-python3}
environment "$python" "$ROOT/.venv" dev,gguf,torch
.venv/bin/ruff check .
.venv/bin/ruff format --check .
marks=(-m "not slow")
if [ $all = 1 ]; then marks=(); fi
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} TRANSFORMERS_OFFLINE=1 HF_HUB_OFFLINE=1
.venv/bin/python -m pytest -q "${marks[@]}" "$@"

if [ $all = 1 ]; then
  for newer in python3.12 "$HOME/.pyenv/versions/"3.12*/bin/python; do
    if "$newer" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
      environment "$newer" "$ROOT/.venv312" dev,gguf
      .venv312/bin/python -m pytest -q -m "not slow" "$@"
      break
    fi
  done
fi
