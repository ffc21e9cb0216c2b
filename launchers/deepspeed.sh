#!/bin/bash
# Train on the hosts of a hostfile with the DeepSpeed launcher, started on one of them or on a login node.
#
#   launchers/deepspeed.sh [options of diffmoe train]
#
# --dry-run, anywhere on the line, prints the command.
# Variables:
#   HOSTFILE      file with lines "HOST slots=GPUS" (/job/hostfile, DeepSpeed's default; see hostfile.example)
#   NODES         use only the first NODES hosts (all; not with openmpi)
#   LAUNCHER      pdsh, openmpi or slurm (pdsh)
#   LAUNCHER_ARGS options of that launcher, such as "--partition=gpu --ntasks-per-node=8" (none)
#   MASTER_PORT   rendezvous port on the first host (29500)
#   CHECK         0 to skip the ssh check of every host before the start (1; pdsh only)
#   PYTHON        the interpreter, at the same path on all hosts (python)
# Put variables that ranks need (PATH, NCCL_SOCKET_IFNAME, ...) into .deepspeed_env in the current directory or your
# home directory, because pdsh does not forward the environment.  See deepspeed_env.example.
set -euo pipefail
dry_run="" options=()
for option; do
  if [[ $option == --dry-run ]]; then dry_run=yes; else options+=("$option"); fi
done
python=${PYTHON:-python} hostfile=${HOSTFILE:-/job/hostfile} launcher=${LAUNCHER:-pdsh}
command=("$python" -m deepspeed.launcher.runner --hostfile "$hostfile" --launcher "$launcher"
  --master_port "${MASTER_PORT:-29500}")
[[ -z ${LAUNCHER_ARGS:-} ]] || command+=("--launcher_args=$LAUNCHER_ARGS")
[[ -z ${NODES:-} ]] || command+=(--num_nodes "$NODES")
if [[ $launcher == slurm ]]; then # DeepSpeed ignores --module there
  command+=("$("$python" -c 'from importlib.util import find_spec; print(find_spec("diffmoe_ds.train").origin)')")
else
  command+=(--module diffmoe_ds.train)
fi
command+=("${options[@]}")
if [[ -n $dry_run ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi
[[ ${CHECK:-1} == 0 || $launcher != pdsh ]] ||
  "$python" -m diffmoe_ds.cli doctor --hostfile "$hostfile" ${NODES:+--nodes "$NODES"} --quiet
exec "${command[@]}"
