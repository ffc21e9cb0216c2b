#!/bin/bash
# Train on the hosts of a hostfile with DeepSpeed's launcher, from one of them or from a login node.
#
#   launchers/deepspeed.sh [--dry-run] [options of diffmoe train]
#
# Variables:
#   HOSTFILE      lines "HOST slots=GPUS" (/job/hostfile, where DeepSpeed looks by itself; see hostfile.example)
#   NODES         use only the first so many hosts (all; not with openmpi)
#   LAUNCHER      pdsh, openmpi or slurm (pdsh)
#   LAUNCHER_ARGS options for it, such as "--partition=gpu --ntasks-per-node=8" (none)
#   MASTER_PORT   the port on the first host where ranks meet (29500)
#   CHECK         0 leaves out the check of every host over ssh before the start (1, with pdsh)
#   PYTHON        the interpreter, the same path on all hosts (python)
# What the ranks' environment needs (PATH, NCCL_SOCKET_IFNAME, ...) goes into .deepspeed_env in this directory or in the
# home directory: pdsh carries no variables.  See deepspeed_env.example.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python} hostfile=${HOSTFILE:-/job/hostfile} launcher=${LAUNCHER:-pdsh}
command=("$python" -m deepspeed.launcher.runner --hostfile "$hostfile" --launcher "$launcher"
  --master_port "${MASTER_PORT:-29500}")
[[ -z ${LAUNCHER_ARGS:-} ]] || command+=("--launcher_args=$LAUNCHER_ARGS")
[[ -z ${NODES:-} ]] || command+=(--num_nodes "$NODES")
command+=(diffmoe_ds/train.py)
if [[ ${1:-} == --dry-run ]]; then
  shift
  printf '%q ' "${command[@]}" "$@"
  echo
  exit
fi
[[ ${CHECK:-1} == 0 || $launcher != pdsh ]] ||
  "$python" -m diffmoe_ds.cli doctor --hostfile "$hostfile" ${NODES:+--nodes "$NODES"} --quiet
exec "${command[@]}" "$@"
