#!/bin/bash
# Train with torchrun.  Run this on every node with the same variables except NODE_RANK.
#
#   NODES=2 NODE_RANK=0 MASTER_ADDR=node1 launchers/torchrun.sh [options of diffmoe train]
#
# --dry-run, anywhere on the line, prints the command.
# Variables:
#   NODES         number of nodes (1)
#   NODE_RANK     index of this node, from 0 (0)
#   MASTER_ADDR   host name of the node with NODE_RANK 0; required with several nodes (localhost)
#   MASTER_PORT   rendezvous port on that node (29500)
#   PROCESSES     ranks per node (the number of GPUs, or 1)
#   PYTHON        the interpreter (python)
set -euo pipefail
dry_run="" options=()
for option; do
  if [[ $option == --dry-run ]]; then dry_run=yes; else options+=("$option"); fi
done
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
[[ ${NODES:-1} == 1 ]] || : "${MASTER_ADDR:?set it to the host name of the node with NODE_RANK 0}"
command=("${PYTHON:-python}" -m torch.distributed.run --nnodes "${NODES:-1}" --node_rank "${NODE_RANK:-0}"
  --nproc_per_node "${PROCESSES:-$((gpus > 0 ? gpus : 1))}"
  --master_addr "${MASTER_ADDR:-localhost}" --master_port "${MASTER_PORT:-29500}"
  -m diffmoe_ds.train "${options[@]}")
if [[ -n $dry_run ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "${command[@]}"
