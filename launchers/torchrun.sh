#!/bin/bash
# Train with torchrun.  Run this on every node with the same variables except NODE_RANK.
#
#   NODES=2 NODE_RANK=0 MASTER_ADDR=node1 launchers/torchrun.sh [options of diffmoe train]
#
# --dry-run, anywhere on the line, prints the command.
# Variables:
#   NODES         number of nodes, or MIN:MAX: torchrun then restarts the rest by itself when a node is lost or added (1)
#   NODE_RANK     index of this node, from 0; not with MIN:MAX (0)
#   MASTER_ADDR   host name of the node with NODE_RANK 0, or with MIN:MAX of any; required with several nodes (localhost)
#   MASTER_PORT   rendezvous port on that node (29500)
#   RESTARTS      restarts of each node's ranks after failures, with MIN:MAX (3)
#   RUN_ID        name of the run, the same on all nodes, with MIN:MAX (a checksum of the options)
#   PROCESSES     ranks per node (the number of visible GPUs, or 1)
#   PYTHON        the interpreter (python)
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
[[ ${NODES:-1} == 1 ]] || : "${MASTER_ADDR:?set it to the host name of the node with NODE_RANK 0}"
address=${MASTER_ADDR:-localhost} port=${MASTER_PORT:-29500}
if [[ ${NODES:-1} == *:* ]]; then
  # Otherwise torchrun keeps the address of the first rank 0 for all restarts.
  command=(env TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1)
  # The options name the run: torchrun would let a run with the same name join this one.
  name=$(printf '%s\n' "${options[@]}" | cksum)
  rendezvous=(--max_restarts "${RESTARTS:-3}" --rdzv_backend c10d --rdzv_endpoint "$address:$port"
    --rdzv_id "${RUN_ID:-${name%% *}}")
else
  command=()
  rendezvous=(--node_rank "${NODE_RANK:-0}" --master_addr "$address" --master_port "$port")
fi
command+=("${PYTHON:-python}" -m torch.distributed.run --nnodes "${NODES:-1}"
  --nproc_per_node "$processes" "${rendezvous[@]}" -m diffmoe_ds.train "${options[@]}")
if [[ -n $dry_run ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "${command[@]}"
