#!/usr/bin/env bash
# Train on one NVIDIA GPU, after checking driver, memory, disk and JAX.
#
#   bash launch/gpu.sh --config configs/sst.py --config.model.source=models/27b-nf4 --workdir runs/27b
#
# All arguments go to `python -m sst_jax.train`. Needs Linux, the NVIDIA driver and `pip install 'sst-jax[cuda]'`; no CUDA
# toolkit. Not yet run on a card. PYTHON chooses the interpreter, MIN_DISK_GB the free disk asked for (default 20).
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^set /{/^#/!d;/^#SBATCH/d;s/^# \{0,1\}//p}' "$0"; exit ;; esac
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
fail() { echo "launch/gpu.sh: $*" >&2; exit 2; }

# 1. The driver. The cuda extra brings CUDA 13, which drivers before 580 do not run.
command -v nvidia-smi > /dev/null || fail "nvidia-smi is missing: install the NVIDIA driver"
driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1) || fail "nvidia-smi sees no GPU"
[ "${driver%%.*}" -ge 580 ] || fail "driver $driver is too old for CUDA 13: install 580 or newer"

# 2. Memory of the first visible GPU, and whether other processes use it.
gpu=${CUDA_VISIBLE_DEVICES:-0}; gpu=${gpu%%,*}
export CUDA_VISIBLE_DEVICES=$gpu
IFS=, read -r name total used < <(nvidia-smi -i "$gpu" --query-gpu=name,memory.total,memory.used --format=csv,noheader,nounits)
echo "$name: $used of $total MiB in use, driver $driver"
[ "$used" -lt $((total / 10)) ] || fail "GPU $gpu already has $used MiB in use: free it, or set CUDA_VISIBLE_DEVICES"
echo "does the recipe fit?  $python -m sst_jax.plan --config ... --target ..."

# 3. Disk, for checkpoints (an adapter and its optimizer) and the cache of compiled programs.
workdir=.
previous=
for argument in "$@"; do
  case $argument in --workdir=*) workdir=${argument#*=} ;; esac
  [ "$previous" = --workdir ] && workdir=$argument
  previous=$argument
done
parent=$workdir
while [ ! -d "$parent" ]; do parent=$(dirname "$parent"); done
free=$(df --output=avail -BG "$parent" | tail -n 1 | tr -dc 0-9)
[ "$free" -ge "${MIN_DISK_GB:-20}" ] || fail "$parent has $free GB free, ${MIN_DISK_GB:-20} are asked for (MIN_DISK_GB)"

# 4. JAX on that GPU.
"$python" -c 'import jax, sys; sys.exit(jax.default_backend() != "gpu")' || fail "JAX sees no GPU: pip install 'sst-jax[cuda]'"

# 5. Settings. No XLA flags, as none has been measured here.
# JAX takes three quarters of the card by default; the planned peak may need more.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.95}
# With the cache a resumed run does not compile its step again.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/sst_jax/xla}
exec "$python" -m sst_jax.train "$@"
