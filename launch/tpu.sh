#!/usr/bin/env bash
# Train on a Cloud TPU VM, or on all hosts of a TPU slice at once.
#
#   bash launch/tpu.sh --config configs/sst.py --config.model.source=models/27b-nf4 --workdir runs/27b
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command='cd sst_jax && bash launch/tpu.sh --config ...'
#
# All arguments go to `python -m sst_jax.train`. Needs a TPU VM (v5e, v5p or v6e) and `pip install 'sst-jax[tpu]'`; on a
# slice of several hosts the same checkout and environment on each, and the working folder on a file system that they
# share (Filestore, NFS). Hosts find one another by the VM's metadata. A preempted VM gets SIGTERM and 30 seconds;
# the same command on the next one resumes. PYTHON chooses the interpreter. Not yet run on a TPU.
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^set /{/^#/!d;/^#SBATCH/d;s/^# \{0,1\}//p}' "$0"; exit ;; esac
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
fail() { echo "launch/tpu.sh: $*" >&2; exit 2; }

# 1. A TPU that no other process uses: its runtime admits one.
compgen -G '/dev/accel*' > /dev/null || compgen -G '/dev/vfio/[0-9]*' > /dev/null || fail "no TPU here: start this on a TPU VM"
"$python" -c 'import libtpu' 2> /dev/null || fail "libtpu is missing: $python -m pip install 'sst-jax[tpu]'"
if command -v fuser > /dev/null && users=$(fuser /dev/accel* /dev/vfio/[0-9]* 2> /dev/null); then
  fail "process$users has the TPU: end it first"
fi

# 2. The other hosts of the slice, from the metadata: HOST, or on older VMs NAME:ID:ADDRESS, for each host in order.
attribute() {
  curl --silent --fail --max-time 10 -H 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1" || true
}
mesh=()
hosts=$(attribute worker-network-endpoints)
if [[ $hosts == *,* ]]; then
  number=$(attribute agent-worker-number)
  [ -n "$number" ] || fail "the metadata does not say which host of the slice this is (agent-worker-number)"
  first=${hosts%%,*}
  commas=${hosts//[^,]/}
  mesh=(
    "--config.mesh.coordinator=${first##*:}:8476" "--config.mesh.processes=$((${#commas} + 1))"
    "--config.mesh.process=$number"
  )
fi

# 3. With the cache a resumed run does not compile its step again; the last save has 25 of the 30 seconds' notice.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/sst_jax/xla}
exec "$python" -m sst_jax.train --stop-within 25 "${mesh[@]}" "$@"
