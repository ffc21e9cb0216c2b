#!/bin/bash
# Train on the hosts of a hostfile with Open MPI's mpirun; ranks rendezvous through mpi4py.
#
#   launchers/mpirun.sh [options of diffmoe train]
#
# --dry-run, anywhere on the line, prints the command.
# Variables:
#   HOSTFILE      file with lines "HOST slots=GPUS" (/job/hostfile; see hostfile.example)
#   RANKS         number of ranks (all slots)
#   MPI_OPTIONS   additional mpirun options, such as "--mca btl_tcp_if_include eth0" (none)
#   CHECK         0 to skip the ssh check of every host before the start (1)
#   PYTHON        the interpreter, at the same path on all hosts (python)
set -euo pipefail
dry_run="" options=()
for option; do
  if [[ $option == --dry-run ]]; then dry_run=yes; else options+=("$option"); fi
done
python=${PYTHON:-python} hostfile=${HOSTFILE:-/job/hostfile}
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
command=(mpirun --hostfile "$hostfile" --map-by slot --bind-to none -x OMP_NUM_THREADS)
# Remote ranks without MASTER_ADDR would wait for one over MPI, while those of this host have it already.
for name in PYTHONPATH PATH LD_LIBRARY_PATH NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME MASTER_ADDR MASTER_PORT; do
  [[ -z ${!name:-} ]] || command+=(-x "$name")
done
[[ -z ${RANKS:-} ]] || command+=(-n "$RANKS")
[[ $EUID -ne 0 ]] || command+=(--allow-run-as-root)
read -rd "" -a more <<<"${MPI_OPTIONS:-}" || true # to the end, not to the first line break
command+=("${more[@]}" "$python" -u -m diffmoe_ds.train "${options[@]}")
if [[ -n $dry_run ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi
[[ ${CHECK:-1} == 0 ]] || "$python" -m diffmoe_ds.cli doctor --hostfile "$hostfile" --quiet
exec "${command[@]}"
