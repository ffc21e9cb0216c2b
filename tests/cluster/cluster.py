"""A login node and four compute nodes on one machine, with ssh, Slurm and Open MPI, sharing one file system.

Each host has its own network, processes, hostname and mounts (Linux namespaces); `hosts.sh` is PID 1 of each.
Nothing here needs systemd, and nothing outlives the session: killing one process kills everything.
"""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tests.cluster.mounts import make_mount_points, remove_mount_points
from tests.helpers.processes import REPOSITORY, Finished, clean_environment

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "sshd", "pdsh", "mpirun", "ip", "unshare", "nsenter")
NODES = tuple(f"node{i}" for i in range(1, 5))
GPUS = 8
"""Fake GPUs of a node, so that the sbatch files can be submitted as they are."""
MOUNT_POINTS = ("/etc/slurm", "/etc/munge", "/root/.ssh", "/job")

SSH_CONFIG = """Host *
BatchMode yes
ConnectTimeout 5
LogLevel ERROR
ServerAliveInterval 3
ServerAliveCountMax 3
"""
SSHD_CONFIG = """Port 22
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
MaxStartups 100
PidFile /run/sshd.pid
"""
SLURM_CONF = """ClusterName=test
SlurmctldHost=login(10.99.0.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=cred_expire=5
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool/%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={dir}/log/slurmctld.log
SlurmdLogFile={dir}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
SlurmdParameters=config_overrides
KillWait=10
SlurmdTimeout=10
MessageTimeout=10
MailProg=/bin/true
NodeName=node[1-4] Gres=gpu:{gpus} CPUs=64 RealMemory=64000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""

RANKS = "'^[^ ]*python[^ ]* -u (-m )?[d]iffmoe_ds.train'"
"""Pattern of the command lines of ranks; not of the srun that starts them, nor of the shell that searches for them."""


def unusable() -> str | None:
    """Why a cluster cannot be created here; None if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root, for namespaces"
    missing = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    if missing:
        return f"needs {', '.join(missing)}: tests/cluster/install.sh installs them"
    probe = subprocess.run(
        ["unshare", "-n", "-m", "-p", "-u", "-i", "-f", "--mount-proc", "mount", "-t", "tmpfs", "tmpfs", "/mnt"],
        capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    return None if probe.returncode == 0 else f"cannot create namespaces: {probe.stderr.strip()}"


@dataclass(frozen=True)
class Job:
    """Output of ``scontrol show job``, parsed."""

    state: str
    reason: str
    restarts: int
    exit_code: str
    """``CODE``, or ``CODE:SIGNAL`` if killed by a signal."""
    num_nodes: int
    nodes: str


class Cluster:
    """The hosts. Call `start` first, and always call `stop`."""

    def __init__(self, folder: Path) -> None:
        self.dir = folder
        self.python = sys.executable
        self._world: subprocess.Popen | None = None
        self._inside = 0
        self._mount_points: IO[str] | None = None

    def start(self) -> None:
        """Write the configuration, start the hosts and wait until every node accepts jobs and ssh."""
        self._configure()
        self._mount_points = make_mount_points(MOUNT_POINTS)
        self._world = subprocess.Popen(
            ["unshare", "-n", "-m", "-p", "-u", "-i", "-f", "--kill-child=KILL", "--mount-proc",
             "bash", str(Path(__file__).with_name("hosts.sh")), "world", str(self.dir), str(len(NODES))],
            stdin=subprocess.DEVNULL, stdout=(self.dir / "log/world").open("w"), stderr=subprocess.STDOUT,
            preexec_fn=_die_with_parent, env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"},
        )  # fmt: skip
        self.until(lambda: (self.dir / "ready").exists(), 30, "the hosts to start")
        children = Path(f"/proc/{self._world.pid}/task/{self._world.pid}/children")
        self._inside = int(children.read_text().split()[0])
        self.until_idle(NODES)

    def stop(self) -> None:
        """Kill every process on every host."""
        if self._world is not None:
            self._world.kill()
            self._world.wait(timeout=20)
        if self._mount_points is not None:
            remove_mount_points(self._mount_points)

    def command(self, command: str, cwd: Path, **environment: str) -> tuple[list[str], dict[str, str]]:
        """A shell command on the login node, for `run_processes` and `subprocess`."""
        inside = ["nsenter", "-t", str(self._inside), "-n", "-m", "-p", "-u", "-i", f"--wd={cwd}", "--"]
        binaries = Path(self.python).parent
        base = clean_environment(
            PATH=f"{binaries}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", PYTHONPATH=str(REPOSITORY), HOME="/root",
            DS_ENV_FILE=str(self.dir / "deepspeed_env"), OMPI_MCA_orte_tmpdir_base=str(self.dir / "ompi"),
            **environment,
        )  # fmt: skip
        return [*inside, "setpriv", "--pdeathsig", "KILL", "bash", "-c", command], base

    def run(self, command: str, cwd: Path | None = None, timeout: float = 120, **environment: str) -> Finished:
        """Run a shell command on the login node."""
        line, env = self.command(command, cwd or self.dir, **environment)
        done = subprocess.run(
            line, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, check=False
        )
        return Finished(done.returncode, done.stdout)

    def output(self, command: str, **keywords: object) -> str:
        """Output of a command that must succeed."""
        done = self.run(command, **keywords)
        assert done.code == 0, f"{command}: {done.output}"
        return done.output.strip()

    def inside(self, node: str, command: str) -> str:
        """Run a shell command in the namespaces of a node's PID 1, to break things there."""
        world = Path(f"/proc/{self._inside}/ns/pid")
        assert world.exists()
        pid = self.output(f"pgrep -P $(cat {self.dir}/pids/{node})")
        return self.output(f"nsenter -t {pid} -n -m -p -u -i -- bash -c {shlex.quote(command)}")

    def power(self, node: str, state: str) -> None:
        """Power a node ``off`` without a shutdown, or ``on`` again."""
        request = self.dir / "power" / node
        tmp = self.dir / f"power-{node}"
        tmp.write_text(state)
        tmp.rename(request)
        self.until(lambda: not request.exists(), 10, f"{node} to go {state}")
        if state == "on":
            self.until_idle((node,))

    def until_idle(self, nodes: tuple[str, ...]) -> None:
        """Wait until nodes accept jobs and ssh."""
        names = ",".join(nodes)
        self.until(
            lambda: self.run(f"sinfo -h -p all -N -n {names} -o %T").output.split() == ["idle"] * len(nodes),
            60, f"{names} to be idle",
        )  # fmt: skip
        for node in nodes:
            self.until(lambda node=node: self.run(f"ssh {node} true").code == 0, 20, f"ssh to {node}")

    def submit(self, arguments: str, cwd: Path, **environment: str) -> int:
        """Submit a job and return its ID."""
        return int(self.output(f"sbatch --parsable {arguments}", cwd=cwd, **environment).split(";")[0])

    def job(self, number: int | str) -> Job:
        """State of a job, or of a task ``JOB_TASK`` of an array."""
        fields = dict(re.findall(r"(\w+)=(\S*)", self.output(f"scontrol show job {number}")))
        return Job(
            fields["JobState"], fields["Reason"], int(fields["Restarts"]), fields["ExitCode"].removesuffix(":0"),
            int(fields["NumNodes"].split("-")[0]), fields["NodeList"],
        )  # fmt: skip

    def freeze(self, node: str) -> None:
        """Stop the ranks on a node, so that their job trains no step while a test prepares a fault."""
        self.inside(node, f"pkill -STOP -f {RANKS}")

    def thaw(self, node: str) -> None:
        """Let the ranks on a node continue."""
        self.inside(node, f"pkill -CONT -f {RANKS}")

    def until_ended(self, number: int | str, timeout: float, log: Path | None = None) -> Job:
        """Wait until a job has ended for good."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

        def note() -> str:
            text = log.read_text()[-4000:] if log is not None and log.exists() else ""
            return f"{self.job(number)}\n{text}"

        self.until(lambda: self.job(number).state in ended, timeout, f"job {number} to end", note)
        return self.job(number)

    def until(
        self, condition: Callable[[], bool], timeout: float, what: str, note: Callable[[], str] | None = None
    ) -> None:
        """Wait until a condition is true."""
        deadline = time.monotonic() + timeout
        while not condition():
            if self._world is not None and self._world.poll() is not None:
                raise AssertionError(f"the hosts are gone: {(self.dir / 'log/world').read_text()}")
            if time.monotonic() > deadline:
                raise AssertionError(f"waited {timeout} s for {what}\n{note() if note else ''}")
            time.sleep(0.2)

    def _configure(self) -> None:
        for name in (
            "slurm",
            "munge",
            "ssh",
            "home-ssh",
            "state",
            "log",
            "spool",
            "dev",
            "pids",
            "power",
            "job",
            "small",
            "ompi",
        ):
            (self.dir / name).mkdir(parents=True)
        for name in ("munge", "home-ssh"):
            (self.dir / name).chmod(0o700)
        self.dir.chmod(0o755)
        for node in NODES:
            (self.dir / "spool" / node).mkdir()
        for number in range(GPUS):  # the same device as /dev/null
            os.mknod(self.dir / f"dev/gpu{number}", 0o600 | 0o020000, os.makedev(1, 3))
        addresses = {node: f"10.99.0.{i}" for i, node in enumerate(NODES, 1)}
        write = {
            "hosts": "127.0.0.1 localhost\n10.99.0.254 login\n"
            + "".join(f"{address} {node}\n" for node, address in addresses.items()),
            "slurm/slurm.conf": SLURM_CONF.format(dir=self.dir, gpus=GPUS),
            "slurm/gres.conf": f"Name=gpu File={self.dir}/dev/gpu[0-{GPUS - 1}]\n",
            # otherwise slurmd looks for a cgroup file system even with linuxproc
            "slurm/cgroup.conf": "CgroupPlugin=cgroup/v1\n",
            "home-ssh/config": SSH_CONFIG,
            "ssh/sshd_config": SSHD_CONFIG,
            "job/hostfile": "".join(f"{node} slots=1\n" for node in NODES),
            "deepspeed_env": "OMP_NUM_THREADS=1\n",
        }
        for name, text in write.items():
            (self.dir / name).write_text(text)
        _call("mungekey", "--create", f"--keyfile={self.dir}/munge/munge.key")
        key = self.dir / "home-ssh/id_ed25519"
        _keygen(key)
        shutil.copy(f"{key}.pub", self.dir / "home-ssh/authorized_keys")
        known = []
        for node, address in addresses.items():
            _keygen(self.dir / f"ssh/{node}_key")
            public = (self.dir / f"ssh/{node}_key.pub").read_text().split()[:2]
            known.append(f"{node},{address} {' '.join(public)}\n")
        (self.dir / "home-ssh/known_hosts").write_text("".join(known))
        for path in (self.dir / "home-ssh").iterdir():
            path.chmod(0o600)


def _keygen(path: Path) -> None:
    _call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path))


def _call(*command: str) -> None:
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    subprocess.run(command, check=True, capture_output=True, timeout=30, env={**os.environ, "PATH": path})


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
