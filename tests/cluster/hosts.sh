#!/bin/bash
# Simulated hosts on one machine, built from namespaces.  Started by cluster.py, which writes the configuration to DIR.
#   hosts.sh world DIR COUNT   PID 1 of "login": a bridge, slurmctld, and the nodes as children
#   hosts.sh node DIR NAME     PID 1 of a node: its own hostname, network, processes and mounts
# DIR is the file system that all hosts share.
set -eu
role=$1 dir=$2
self=$(readlink -f "$0")

own_run() { # NAME: private /run and /dev/shm, and munge
  mount -t tmpfs tmpfs /run
  mount -t tmpfs tmpfs /dev/shm
  mkdir -m 755 /run/munge /run/sshd
  munged --foreground --key-file=/etc/munge/munge.key --pid-file=/run/munged.pid --seed-file=/run/munge/seed \
    --log-file="$dir/log/munged.$1" >"$dir/log/munged.$1.out" 2>&1 &
  for _ in $(seq 500); do
    [ -S /run/munge/munge.socket.2 ] && return
    sleep 0.02
  done
}

reap_forever() {
  while :; do
    wait || true
    sleep 0.2
  done
}

mount --make-rprivate /
if [ "$role" = node ]; then
  name=$3
  hostname "$name"
  own_run "$name"
  /usr/sbin/sshd -D -e -f "$dir/ssh/sshd_config" -h "$dir/ssh/${name}_key" >"$dir/log/sshd.$name" 2>&1 &
  slurmd -D -N "$name" >"$dir/log/slurmd.$name.out" 2>&1 &
  reap_forever
fi

count=$3
mount -t sysfs sysfs /sys # the network devices of this namespace, not of the machine
hostname login
ip link set lo up
ip link add br0 type bridge
ip addr add 10.99.0.254/24 dev br0
ip link set br0 up
mount -t tmpfs -o size=16m tmpfs "$dir/small" # a shared disk that fills up quickly
for pair in hosts:/etc/hosts slurm:/etc/slurm munge:/etc/munge home-ssh:/root/.ssh job:/job; do
  mount --bind "$dir/${pair%%:*}" "${pair#*:}"
done
own_run login
slurmctld -D -c >"$dir/log/slurmctld.out" 2>&1 &
for i in $(seq "$count"); do
  ip netns add "node$i"
  ip link add "v$i" type veth peer name eth0 netns "node$i"
  ip link set "v$i" master br0 up
  ip -n "node$i" link set lo up
  ip -n "node$i" addr add "10.99.0.$i/24" dev eth0
  ip -n "node$i" link set eth0 up
done

power_on() { # I
  ip link set "v$1" up
  ip netns exec "node$1" unshare -m -p -u -i -f --kill-child=KILL --mount-proc \
    bash "$self" node "$dir" "node$1" >"$dir/log/node$1" 2>&1 &
  echo $! >"$dir/pids/node$1"
}

for i in $(seq "$count"); do power_on "$i"; done
touch "$dir/ready"
while :; do # cluster.py switches power through files: a process that it started itself would not be a child of this one
  for request in "$dir"/power/*; do
    [ -e "$request" ] || continue
    node=${request##*/}
    if [ "$(cat "$request")" = off ]; then
      ip link set "v${node#node}" down # first, so that no peer is told that its connection was closed
      kill -KILL "$(cat "$dir/pids/$node")"
    else
      power_on "${node#node}"
    fi
    rm "$request"
  done
  sleep 0.1
done
