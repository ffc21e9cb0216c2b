#!/bin/bash
# Train on this machine, one process per GPU.
#
#   launchers/local.sh [--dry-run] [options of diffmoe train]
#
# Variables:
#   PROCESSES   number of ranks (the number of GPUs, or 1)
#   PYTHON      the interpreter (python)
set -euo pipefail
cd "$(dirname "$0")/.."
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
command=("${PYTHON:-python}" -m torch.distributed.run --standalone
  --nproc_per_node "${PROCESSES:-$((gpus > 0 ? gpus : 1))}" diffmoe_ds/train.py)
if [[ ${1:-} == --dry-run ]]; then
  shift
  printf '%q ' "${command[@]}" "$@"
  echo
  exit
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "${command[@]}" "$@"
