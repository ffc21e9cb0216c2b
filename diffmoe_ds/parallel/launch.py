"""Which rank is this process?  Every launcher says it in its own variables; this is the one place that asks.

Order: ``RANK`` (deepspeed, torchrun), a Slurm step (srun), Open MPI (mpirun), else a process on its own.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from diffmoe_ds.errors import TopologyError

SLURM_PORTS = range(20_000, 40_000)
"""A job's port is taken from its number, so that two jobs on one node do not meet."""


@dataclass(frozen=True)
class Launch:
    """A process's place among the ranks."""

    rank: int
    """This process, from 0."""
    world: int
    """Number of processes W."""
    local_rank: int
    """This process among those of its host, from 0."""
    local_world: int
    """Number of processes on this host."""
    source: str
    """Where this was taken from."""


def resolve_launch(environ: Mapping[str, str] | None = None) -> Launch:
    """Read this process's place from the environment.

    Raises:
        TopologyError: a variable is missing or not a number, or the rank is outside the world.
    """
    env = os.environ if environ is None else environ
    if "RANK" in env:
        launch = _from(env, "the launcher's RANK", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    elif "SLURM_STEP_NUM_TASKS" in env:
        launch = _from(
            env, "Slurm's step", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"
        )
    elif "OMPI_COMM_WORLD_RANK" in env:
        names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
        launch = _from(env, "Open MPI", *(f"OMPI_COMM_WORLD_{name}" for name in names))
    else:
        launch = Launch(0, 1, 0, 1, "no launcher: a single process")
    if not 0 <= launch.rank < launch.world:
        raise TopologyError(
            f"{launch.source}: the rank is {launch.rank}, but it must be from 0 to {launch.world - 1} in a world of "
            f"{launch.world}."
        )
    return launch


def export_launch(launch: Launch) -> None:
    """Set the variables that torch.distributed's ``env://`` reads, where the launcher did not."""
    os.environ["RANK"] = str(launch.rank)
    os.environ["WORLD_SIZE"] = str(launch.world)
    os.environ["LOCAL_RANK"] = str(launch.local_rank)
    if launch.world == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
        return
    if "SLURM_STEP_NUM_TASKS" in os.environ:
        os.environ.setdefault("MASTER_ADDR", _first_host(os.environ["SLURM_STEP_NODELIST"]))
        job = int(os.environ["SLURM_JOB_ID"])
        os.environ.setdefault("MASTER_PORT", str(SLURM_PORTS[job % len(SLURM_PORTS)]))
    elif "MASTER_ADDR" not in os.environ:
        _agree_over_mpi(launch)


def _from(env: Mapping[str, str], source: str, rank: str, world: str, local_rank: str, local_world: str) -> Launch:
    def number(name: str, default: int | None = None) -> int:
        text = env.get(name)
        if text is None and default is not None:
            return default
        leading = re.match(r"\d+", text or "")  # Slurm writes "2(x4)" for two tasks on each of four nodes
        if leading is None:
            raise TopologyError(f"{source}: {name} is {text!r}, but it must be a number.")
        return int(leading[0])

    ranks = number(world)
    return Launch(number(rank), ranks, number(local_rank, 0), number(local_world, ranks), source)


def _first_host(nodelist: str) -> str:
    """``node[3-5,9],other`` to ``node3``."""
    head = re.match(r"([^\[,]+)(?:\[(\d+))?", nodelist)
    assert head is not None, f"a Slurm node list never starts like {nodelist!r}"
    return head[1] + (head[2] or "")


def _agree_over_mpi(launch: Launch) -> None:
    """mpirun gives no meeting point: rank 0 chooses one and tells the others."""
    from mpi4py import MPI  # only here: it starts MPI, which nobody else wants

    mine = (socket.gethostname(), _free_port()) if launch.rank == 0 else None
    host, port = MPI.COMM_WORLD.bcast(mine, root=0)
    os.environ["MASTER_ADDR"] = host
    os.environ.setdefault("MASTER_PORT", str(port))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
