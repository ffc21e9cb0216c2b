"""Resolve this process's rank and the rendezvous address from its launcher's environment variables.

Order: ``RANK`` (deepspeed, torchrun), Open MPI (mpirun), a Slurm step (srun), any other MPI through mpi4py, else a
single process. An mpirun inside a Slurm job passes the variables of its own step on to its ranks, so MPI takes
precedence over Slurm where they disagree. A ``RANK`` that contradicts another launcher is an error, raised before any
ranks join.
"""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from diffmoe_ds.errors import TopologyError

if TYPE_CHECKING:
    import torch

SLURM_PORTS = range(20_000, 32_000)
"""Ports for Slurm steps, chosen by job id so that jobs on one node do not collide; below the ephemeral range."""
PORTS_PER_STEP = 6_151
"""Distance between the ports of a job's steps: a prime, so that they do not collide with the next jobs' either."""
DEFAULT_PORT = 29_500
"""The default port of torch's own launchers."""
LAUNCHED = ("TORCHELASTIC_RUN_ID", "CROSS_SIZE")
"""Set by torchrun and by deepspeed's launcher, perhaps inside a Slurm step or batch script, whose variables then do not
describe this process."""
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
"""Set to "True" by torchrun if its agent serves the store at the rendezvous address, instead of rank 0."""
EXPORTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", AGENT_STORE)
"""Variables that torch.distributed's ``env://`` reads."""
MAX_RANKS = 1 << 20
"""Largest world; a larger number is a mistake, and lists of ranks would fill the memory."""
NUMBER = re.compile("([0-9]{1,18})")
TASKS = re.compile(r"([0-9]{1,18})([(,][0-9x(),]*)?")
ADDRESS = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,252}|[0-9A-Fa-f:.]{2,45}(%[A-Za-z0-9_.-]{1,32})?")
"""A host name or an IP address."""
OTHER_MPI = ("PMIX_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
"""Set if an MPI launcher started this process; mpi4py provides the rest."""
MPI_SIZES = ("PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""Number of ranks according to such a launcher."""


@dataclass(frozen=True)
class Launch:
    """This process's place among the ranks."""

    rank: int
    """This process's rank, from 0."""
    world: int
    """Number of processes W."""
    local_rank: int
    """This process's rank among those of its host, from 0."""
    local_world: int
    """Number of processes on this host."""
    source: str
    """Source of the values above, for messages."""
    master_addr: str | None = None
    """Host of rank 0, which serves the rendezvous; None until rank 0 has sent it over MPI."""
    master_port: int | None = None
    """Port of the rendezvous; None as above."""
    master_source: str = ""
    """Source of address and port, for messages."""
    surplus: int = 0
    """Number of ranks, from `world` on, that wait: an elastic launch has more than the configuration allows."""

    @property
    def is_surplus(self) -> bool:
        """Whether this process is one of the surplus ranks."""
        return self.rank >= self.world

    @property
    def address(self) -> str:
        """``host:port`` of the rendezvous, for messages."""
        return f"{self.master_addr}:{self.master_port}"

    def describe(self) -> str:
        """Return one line with the ranks, the rendezvous address and their sources."""
        if self.world == 1 and not self.surplus:
            return f"rank 0 of 1 ({self.source})"
        ranks = f"{self.world} ranks, {self.local_world} on this host ({self.source})"
        if self.surplus:
            ranks = f"{self.world} of {self.world + self.surplus} ranks, the others wait ({self.source})"
        if self.master_addr is None:
            return f"{ranks}; rank 0 will choose the rendezvous"
        return f"{ranks}; rendezvous at {self.address} ({self.master_source})"


def resolve_launch(environ: Mapping[str, str] | None = None) -> Launch:
    """Resolve this process's place among the ranks from the environment.

    Raises:
        TopologyError: a variable is missing or not a number, the rank is outside the world, or two launchers
            contradict each other.
    """
    env = os.environ if environ is None else environ
    if "RANK" in env:
        local_world = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in env else "LOCAL_SIZE"  # torchrun's, deepspeed's
        launch = _from(env, _launcher(env), "RANK", "WORLD_SIZE", "LOCAL_RANK", local_world)
        _check_contradictions(env, launch)
    elif "OMPI_COMM_WORLD_RANK" in env:
        names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
        launch = _from(env, "mpirun's OMPI_COMM_WORLD_RANK", *(f"OMPI_COMM_WORLD_{name}" for name in names))
        env = _without_step(env)
    elif "SLURM_STEP_NUM_TASKS" in env and not _is_step_of_an_mpirun(env):
        launch = _from(
            env, "srun's SLURM_PROCID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID",
            "SLURM_STEP_TASKS_PER_NODE",
        )  # fmt: skip
    elif any(name in env for name in OTHER_MPI):
        launch = _from_mpi()
        _check_mpi(env, launch)
        env = _without_step(env)
    elif env.get("WORLD_SIZE", "1") != "1":
        raise TopologyError(f"WORLD_SIZE is {_shown(env['WORLD_SIZE'])} but RANK is not set; set both or neither.")
    else:
        launch = Launch(0, 1, 0, 1, "no launcher: a single process")
    if not 0 <= launch.rank < launch.world:
        raise TopologyError(
            f"{launch.source}: the rank must be from 0 to {launch.world - 1} in a world of {launch.world}, got "
            f"{launch.rank}."
        )
    return _with_master(env, launch)


def local_device(launch: Launch) -> torch.device:
    """Return this process's GPU, or the CPU if there is none; some launchers show each task only its own GPU."""
    import torch  # imported lazily so that typos fail fast

    gpus = torch.cuda.device_count()
    return torch.device("cuda", launch.local_rank % gpus) if gpus else torch.device("cpu")


def cores_of_rank(launch: Launch, environ: Mapping[str, str] | None = None) -> int:
    """Return the number of CPU cores that this process can use without taking those of other ranks on its host.

    Args:
        launch: this process's place among the ranks.
        environ: the environment; that of this process if None.
    """
    env = os.environ if environ is None else environ
    visible = len(os.sched_getaffinity(0))
    bound = env.get("SLURM_CPUS_PER_TASK", "")
    if launch.source.startswith("srun") and NUMBER.fullmatch(bound):  # each task sees its own cores, or those of all
        return max(1, min(visible, int(bound)))
    return max(1, visible // launch.local_world)


@contextmanager
def restored_environment() -> Iterator[None]:
    """Restore at the end of the context what a launch sets.

    Programs started later would take the variables of `export_launch` as theirs, and torch.distributed's hook for
    exceptions would begin every line of a later traceback with the rank.
    """
    before = {name: os.environ.get(name) for name in EXPORTED}
    hook = sys.excepthook
    try:
        yield
    finally:
        sys.excepthook = hook
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def export_launch(launch: Launch) -> Launch:
    """Set the variables that torch.distributed's ``env://`` reads; return the launch with the rendezvous address."""
    if launch.master_addr is None:
        launch = _agree_over_mpi(launch)
    os.environ["RANK"] = str(launch.rank)
    os.environ["WORLD_SIZE"] = str(launch.world)
    os.environ["LOCAL_RANK"] = str(launch.local_rank)
    os.environ["MASTER_ADDR"] = str(launch.master_addr)
    os.environ["MASTER_PORT"] = str(launch.master_port)
    return launch


def _launcher(env: Mapping[str, str]) -> str:
    if "TORCHELASTIC_RUN_ID" in env:
        return "torchrun's RANK"
    return "deepspeed's RANK" if "CROSS_SIZE" in env else "the variable RANK"


def _is_step_of_an_mpirun(env: Mapping[str, str]) -> bool:
    """Return whether mpirun started the Slurm step; srun also sets PMI variables, but consistent with its own."""
    pairs = (("PMI_RANK", "SLURM_PROCID"), ("PMIX_RANK", "SLURM_PROCID"), ("PMI_SIZE", "SLURM_STEP_NUM_TASKS"))
    return any(mpi in env and env[mpi] != env.get(slurm) for mpi, slurm in pairs)


def _without_step(env: Mapping[str, str]) -> Mapping[str, str]:
    return {name: value for name, value in env.items() if not name.startswith("SLURM_STEP_")}


def _check_contradictions(env: Mapping[str, str], launch: Launch) -> None:
    """Compare RANK with Slurm and Open MPI, unless another launcher runs between them and this process."""
    if any(name in env for name in LAUNCHED):
        return
    for name, ours, what in (
        ("SLURM_PROCID", launch.rank, "RANK"),
        ("SLURM_STEP_NUM_TASKS", launch.world, "WORLD_SIZE"),
        ("OMPI_COMM_WORLD_RANK", launch.rank, "RANK"),
        ("OMPI_COMM_WORLD_SIZE", launch.world, "WORLD_SIZE"),
    ):
        if name in env and env[name] != str(ours):
            raise TopologyError(
                f"{what} is {ours}, but {name} is {_shown(env[name])}: two launchers contradict each other; unset "
                f"{what} to use {name.split('_')[0]}'s."
            )


def _from(env: Mapping[str, str], source: str, rank: str, world: str, local_rank: str, local_world: str) -> Launch:
    def number(name: str, default: int | None = None, least: int = 0) -> int:
        if name not in env and default is not None:
            return default
        text = env.get(name)
        # Slurm writes "2(x3),1" for two tasks on each of three nodes and one on the next
        found = (TASKS if name.startswith("SLURM_") else NUMBER).fullmatch(text or "")
        if found is None:
            raise TopologyError(f"{source}: {name} must be a number, got {_shown(text)}.")
        if not least <= int(found[1]) <= MAX_RANKS:
            raise TopologyError(f"{source}: {name} must be from {least} to {MAX_RANKS:,}, got {text}.")
        return int(found[1])

    ranks = number(world, least=1)
    launch = Launch(number(rank), ranks, number(local_rank, 0), number(local_world, ranks, least=1), source)
    if launch.local_rank >= launch.local_world and not local_world.startswith("SLURM_"):
        raise TopologyError(
            f"{source}: {local_rank} must be less than {local_world} ({launch.local_world}), got {launch.local_rank}."
        )
    return launch


def _mpi() -> Any:
    """Return mpi4py's module ``MPI``, which initializes MPI when it is imported."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # the latter if there is no MPI library
        found = next((name for name in OTHER_MPI if name in os.environ), "RANK without MASTER_ADDR")
        raise TopologyError(
            f"{found} is set, but mpi4py cannot load MPI ({' '.join(str(error).split())[:200]}); set RANK, WORLD_SIZE, "
            "LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT instead, or unset it to use a single process."
        ) from None
    return MPI


def _from_mpi() -> Launch:
    MPI = _mpi()
    world = MPI.COMM_WORLD
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    return Launch(world.rank, world.size, local.rank, local.size, "MPI through mpi4py")


def _check_mpi(env: Mapping[str, str], launch: Launch) -> None:
    """Check that mpi4py's MPI is the one that started this process; otherwise every rank would be the only one."""
    for name in MPI_SIZES:
        if name in env and env[name] != str(launch.world):
            raise TopologyError(
                f"{name} is {_shown(env[name])}, but this is rank {launch.rank} of {launch.world} for mpi4py, which "
                "uses another MPI than the launcher; install mpi4py with the launcher's MPI or set MPI4PY_LIBMPI to "
                "its library."
            )


def _with_master(env: Mapping[str, str], launch: Launch) -> Launch:
    """Return the launch with the rendezvous address, if it is known without asking the other ranks."""
    given = "MASTER_PORT" in env
    text = env.get("MASTER_PORT", str(DEFAULT_PORT))
    if not NUMBER.fullmatch(text) or not 0 < int(text) < 2**16:
        raise TopologyError(f"MASTER_PORT must be a port from 1 to 65535, got {_shown(text)}.")
    port, port_source = int(text), "MASTER_PORT" if given else "torch's default port"
    if "MASTER_ADDR" in env:
        address, source = env["MASTER_ADDR"], "MASTER_ADDR"
        if not ADDRESS.fullmatch(address):
            raise TopologyError(f"MASTER_ADDR must be a host name or an IP address, got {_shown(address)}.")
    elif launch.world == 1:
        address, source = "127.0.0.1", "a single process"
        port = port if given else free_port()
    elif "SLURM_STEP_NODELIST" in env:
        address, source = first_host(env["SLURM_STEP_NODELIST"]), "first of SLURM_STEP_NODELIST"
    else:
        return launch
    if "SLURM_STEP_NODELIST" in env and not given:
        step = _slurm_id(env, "SLURM_JOB_ID") + PORTS_PER_STEP * _slurm_id(env, "SLURM_STEP_ID")
        port, port_source = SLURM_PORTS[step % len(SLURM_PORTS)], "port from the job id"
    both = source if launch.world == 1 else f"{source}, {port_source}"
    return replace(launch, master_addr=address, master_port=port, master_source=both)


def first_host(nodelist: str) -> str:
    """Return the first host of a Slurm list: ``rack2-node[003-5,9],other`` gives ``rack2-node003``.

    Raises:
        TopologyError: it is not such a list.
    """
    head = re.match(r"(?:[^\[\],]|\[[0-9][0-9,-]*\])+(?=,|\Z)", nodelist)
    host = re.sub(r"\[([0-9]+)[^\]]*\]", r"\1", head[0]) if head is not None else ""
    if not ADDRESS.fullmatch(host):
        raise TopologyError(f"SLURM_STEP_NODELIST must be a list such as node[1-4,7], got {_shown(nodelist)}.")
    return host


def _slurm_id(env: Mapping[str, str], name: str) -> int:
    """Return the number of a job or step, 0 if it is unset."""
    text = env.get(name, "0")
    if not NUMBER.fullmatch(text):
        raise TopologyError(f"{name} must be a number, got {_shown(text)}.")
    return int(text)


def _shown(text: str | None) -> str:
    """Return the value of a variable for a message."""
    return repr(text) if text is None or len(text) <= 80 else f"{text[:77]!r}..."


def _agree_over_mpi(launch: Launch) -> Launch:
    """Let rank 0 choose an address and send it to the others: mpirun does not provide one."""
    world = _mpi().COMM_WORLD
    if (world.rank, world.size) != (launch.rank, launch.world):  # set by hand, or MPI's launcher is another one
        raise TopologyError(
            f"{launch.source}: this is rank {launch.rank} of {launch.world}, but rank {world.rank} of {world.size} for "
            "MPI, which could provide the address of rank 0; set MASTER_ADDR and MASTER_PORT."
        )
    mine = (socket.gethostname(), int(os.environ.get("MASTER_PORT", 0)) or free_port()) if launch.rank == 0 else None
    host, port = world.bcast(mine, root=0)
    return replace(launch, master_addr=host, master_port=port, master_source="sent by rank 0 over MPI")


def free_port() -> int:
    """Return a TCP port that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
