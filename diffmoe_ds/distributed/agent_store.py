"""Move the rendezvous from the store of torchrun's agent to one that rank 0 serves and that ends with the ranks.

The agent's store outlives restarts of the ranks, with everything that they wrote: addresses of dead ranks, the reason
why all of them exited. No variable tells one attempt from the next: each agent counts only the restarts of its own
ranks, so TORCHELASTIC_RESTART_COUNT differs between nodes after one of them was lost. Here, ranks use the agent's store
only to find rank 0's.
"""

from __future__ import annotations

import functools
import os
import socket
import time
from dataclasses import replace

import torch.distributed as dist

from diffmoe_ds.distributed.launch import AGENT_STORE, Launch, export_launch, free_port
from diffmoe_ds.distributed.store import answer_within, connect
from diffmoe_ds.errors import LaunchError

ADDRESS = "diffmoe/rank-0"
"""Key in the agent's store with the host and port of rank 0's."""
CONNECT_S = 3.0
"""Seconds to connect to an address, which may be that of an earlier rank 0 on a host that is gone."""
POLL_S = 0.2
"""Seconds between two attempts."""


def move_to_own_store(launch: Launch, timeout_s: float) -> Launch:
    """Agree on the address of a store that rank 0 will serve, if torchrun's agent serves one.

    Every rank must call this.

    Args:
        launch: this process's place among the ranks, after `export_launch`.
        timeout_s: seconds to wait for the agent and for rank 0.

    Returns:
        The launch with the address of rank 0's store, which is exported; the same launch if no agent serves a store.

    Raises:
        LaunchError: the agent's store or rank 0 cannot be reached.
    """
    if os.environ.get(AGENT_STORE) != "True":
        return launch
    assert launch.master_addr is not None and launch.master_port is not None, "set by `export_launch`"
    rank, host = launch.rank, socket.gethostname()
    try:
        agent = connect(launch.master_addr, launch.master_port, timeout_s)
        if rank == 0:
            address = _own_host(launch.master_addr, launch.master_port), free_port()
            agent.set(ADDRESS, " ".join(map(str, address)))
        else:
            address = _find_rank_0(agent, rank, timeout_s)
    except (RuntimeError, OSError):  # torch's errors are RuntimeErrors
        raise LaunchError(
            f"rank {rank} on {host} cannot reach rank 0 through torchrun's store at {launch.address} within "
            f"{timeout_s:g} s; check that rank 0 was started and that its host's ports are open."
        ) from None
    os.environ[AGENT_STORE] = "False"  # torch reads it, too
    source = "chosen by rank 0 under torchrun"
    return export_launch(replace(launch, master_addr=address[0], master_port=address[1], master_source=source))


def _own_host(agent_host: str, agent_port: int) -> str:
    """Return the name or address under which the other ranks reach this host.

    Args:
        agent_host: host of the agent's store, a name that they know.
        agent_port: its port.
    """
    with socket.create_connection((agent_host, agent_port), timeout=CONNECT_S) as connection:
        mine, theirs = connection.getsockname()[0], connection.getpeername()[0]
    return agent_host if mine == theirs else str(mine)


def _find_rank_0(agent: dist.Store, rank: int, timeout_s: float) -> tuple[str, int]:
    """Return the host and port of rank 0's store, once it answers.

    Raises:
        RuntimeError: it does not answer in time.
        TimeoutError: the agent's store does not answer.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        text = answer_within(timeout_s + POLL_S, functools.partial(agent.get, ADDRESS))
        try:
            host, port = text.decode().split()
            store = connect(host, int(port), CONNECT_S)
            found = answer_within(CONNECT_S, functools.partial(store.add, f"found/{rank}", 1))
            if found == 1:  # otherwise it is the store of an earlier attempt
                return host, int(port)
        except (RuntimeError, TimeoutError, ValueError):  # the last: no address
            pass
        if time.monotonic() > deadline:
            raise RuntimeError("rank 0 does not answer")
        time.sleep(POLL_S)
