#!/bin/bash
# Train on the hosts of a hostfile with Open MPI's mpirun; ranks rendezvous through mpi4py.
#
#   launchers/mpirun.sh [--dry-run] [options of diffmoe train]
#
# Variables:
#   HOSTFILE      file with lines "HOST slots=GPUS" (/job/hostfile; see hostfile.example)
#   RANKS         number of ranks (all slots)
#   MPI_OPTIONS   additional mpirun options, such as "--mca btl_tcp_if_include eth0" (none)
#   CHECK         0 to skip the ssh check of every host before the start (1)
#   PYTHON        the interpreter, at the same path on all hosts (python)
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python} hostfile=${HOSTFILE:-/job/hostfile}
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
command=(mpirun --hostfile "$hostfile" --map-by slot --bind-to none -x OMP_NUM_THREADS)
for name in PYTHONPATH PATH LD_LIBRARY_PATH NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME; do
  [[ -z ${!name:-} ]] || command+=(-x "$name")
done
[[ -z ${RANKS:-} ]] || command+=(-n "$RANKS")
[[ $EUID -ne 0 ]] || command+=(--allow-run-as-root)
read -ra more <<<"${MPI_OPTIONS:-}"
command+=("${more[@]}" "$python" -u diffmoe_ds/train.py)
if [[ ${1:-} == --dry-run ]]; then
  shift
  printf '%q ' "${command[@]}" "$@"
  echo
  exit
fi
[[ ${CHECK:-1} == 0 ]] || "$python" -m diffmoe_ds.cli doctor --hostfile "$hostfile" --quiet
exec "${command[@]}" "$@"
