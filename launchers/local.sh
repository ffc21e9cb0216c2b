#!/bin/bash
# Train on this machine, one process per GPU.
#
#   launchers/local.sh [options of diffmoe train]
#
# --dry-run, anywhere on the line, prints the command.
# Variables:
#   PROCESSES   number of ranks (the number of visible GPUs, or 1)
#   PYTHON      the interpreter (python)
set -euo pipefail
dry_run="" options=()
for option; do
  if [[ $option == --dry-run ]]; then dry_run=yes; else options+=("$option"); fi
done
processes=${PROCESSES:-}
if [[ -z $processes && -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
  IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES" && processes=${#visible[@]}
elif [[ -z $processes ]]; then
  processes=$(timeout 60 nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
fi
[[ $processes != 0 ]] || processes=1
command=("${PYTHON:-python}" -m torch.distributed.run --standalone
  --nproc_per_node "$processes"
  -m diffmoe_ds.train "${options[@]}")
if [[ -n $dry_run ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "${command[@]}"
