#!/bin/bash
# Train on this machine, one process per GPU.
#
#   launchers/local.sh [options of diffmoe train]
#
# --dry-run, anywhere on the line, prints the command.
# Variables:
#   PROCESSES   number of ranks (the number of GPUs, or 1)
#   PYTHON      the interpreter (python)
set -euo pipefail
dry_run="" options=()
for option; do
  if [[ $option == --dry-run ]]; then dry_run=yes; else options+=("$option"); fi
done
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
command=("${PYTHON:-python}" -m torch.distributed.run --standalone
  --nproc_per_node "${PROCESSES:-$((gpus > 0 ? gpus : 1))}"
  -m diffmoe_ds.train "${options[@]}")
if [[ -n $dry_run ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "${command[@]}"
