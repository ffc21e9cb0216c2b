#!/bin/bash
# Installs the system packages that tests/cluster needs, when run by root on a system with apt.  Otherwise it says why
# not, and tests that need a missing package are skipped.
set -euo pipefail
packages=(slurmctld slurmd slurm-client munge openssh-server openssh-client pdsh numactl openmpi-bin iproute2 procps
  util-linux shellcheck chromium)
missing=()
for package in "${packages[@]}"; do
  [[ $(dpkg-query -W -f '${Status}' "$package" 2>/dev/null) == "install ok installed" ]] || missing+=("$package")
done
[[ ${#missing[@]} -gt 0 ]] || exit 0
if [[ $EUID -ne 0 ]] || ! command -v apt-get >/dev/null; then
  echo "test-cluster: missing ${missing[*]}; run as root with apt to install them. Tests that need them are skipped" >&2
  exit 0
fi
if [[ ! -e /usr/sbin/policy-rc.d ]]; then # packages must not start their daemons here
  printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
  chmod +x /usr/sbin/policy-rc.d
  trap 'rm -f /usr/sbin/policy-rc.d' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${missing[@]}"
