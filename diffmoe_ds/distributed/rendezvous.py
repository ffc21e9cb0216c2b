"""The ranks find each other before any process group exists, so that what is missing has a name.

torch's own rendezvous waits silently for half an hour for a host that is down.  Here every rank says on which host it
runs, rank 0 waits for all of them and tells who has not come; and whatever only rank 0 can find out afterwards (the
run directory is in use, its disk is full) reaches the others at once, which then leave instead of waiting.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from diffmoe_ds.distributed.launch import Launch, export_launch
from diffmoe_ds.errors import AlreadyReportedError, DiffMoEError, LaunchError

START_TIMEOUT_S = 300.0
"""Seconds that ranks wait for each other: Python and torch from a slow shared disk take their time."""
TELL_AFTER_S = 15.0
"""Seconds after which rank 0 says whom it is waiting for."""
LINGER_S = 5.0
"""Seconds that rank 0 keeps the meeting point open after an error, for the others to read it."""

T = TypeVar("T")


class Meeting:
    """All ranks have come."""

    def __init__(self, launch: Launch, hosts: tuple[str, ...], store: dist.Store | None, timeout_s: float) -> None:
        """Bind what `meet` found.

        Args:
            launch: this process's place, with the meeting point.
            hosts: the host of every rank, by rank.
            store: where ranks leave messages for each other; none in a world of one.  It must live as long as the
                process group, which shares its port.
            timeout_s: seconds to wait for a message.
        """
        self.launch = launch
        self.hosts = hosts
        self.store = store
        self._timeout = timedelta(seconds=timeout_s)

    def on_main(self, name: str, action: Callable[[], T]) -> T | None:
        """Do something on rank 0; if it fails there, all ranks leave.  Every rank must call.

        Args:
            name: a different one for each call.
            action: raises a DiffMoEError if this run cannot go on.

        Returns:
            What the action returns, on rank 0.

        Raises:
            DiffMoEError: the action's on rank 0, a `AlreadyReportedError` on the others.
        """
        if self.store is None:
            return action()
        if self.launch.rank == 0:
            try:
                result = action()
            except DiffMoEError as error:
                self.store.set(name, str(error.exit_code))
                _linger(self.store, self.launch.world - 1)
                raise
            self.store.set(name, "0")
            return result
        code = int(_read(self.store, name, self._timeout))
        if code:
            self.store.add("left", 1)
            raise AlreadyReportedError(code)
        return None


def meet(launch: Launch, same: str = "", timeout_s: float = START_TIMEOUT_S) -> Meeting:
    """Wait until every rank has come; sets the variables of torch.distributed's ``env://``.

    Args:
        launch: from `resolve_launch`.
        same: what must be equal on all ranks, such as the resolved configuration.
        timeout_s: seconds to wait.

    Raises:
        LaunchError: a rank has not come, the meeting point cannot be reached, or a rank's ``same`` differs.
    """
    launch = export_launch(launch)
    if launch.world == 1:
        return Meeting(launch, (socket.gethostname(),), None, timeout_s)
    store = _open(launch, timeout_s)
    mine = {"host": socket.gethostname(), "same": same}
    store.set(f"rank/{launch.rank}", json.dumps(mine))
    if launch.rank == 0:
        try:
            ranks = _gather(store, launch, timeout_s)
        except LaunchError as error:
            store.set("met", json.dumps({"code": error.exit_code}))
            _linger(store, launch.world - 1)
            raise
        store.set("met", json.dumps({"code": 0, "hosts": [rank["host"] for rank in ranks]}))
    met = json.loads(_read(store, "met", timedelta(seconds=timeout_s + LINGER_S)))
    if met["code"]:
        store.add("left", 1)
        raise AlreadyReportedError(met["code"])
    return Meeting(launch, tuple(met["hosts"]), store, timeout_s)


def _open(launch: Launch, timeout_s: float) -> dist.Store:
    """Rank 0 serves the store, except under torchrun, whose agent does."""
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = launch.rank == 0 and not by_agent
    try:
        store = dist.TCPStore(
            launch.master_addr,
            launch.master_port,
            is_master=serves,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,  # torch's env:// opens the same port again and shares this server
        )
    except RuntimeError as error:
        host = socket.gethostname()
        if serves and "EADDRINUSE" in str(error):
            raise LaunchError(
                f"rank 0 on {host}: port {launch.master_port} is in use; set MASTER_PORT (deepspeed: --master_port) to "
                "a free one."
            ) from None
        raise LaunchError(
            f"rank {launch.rank} on {host} cannot reach rank 0 at {launch.meeting_point} within {timeout_s:g} s: is "
            "that its address, was it started, and is the port open?"
        ) from None
    # an agent's store outlives a restart of its ranks
    return dist.PrefixStore(f"diffmoe/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _gather(store: dist.Store, launch: Launch, timeout_s: float) -> list[dict[str, str]]:
    """What every rank said of itself."""
    begun = time.monotonic()
    missing, told = set(range(launch.world)), False
    while missing:
        missing = {rank for rank in missing if not store.check([f"rank/{rank}"])}
        waited = time.monotonic() - begun
        if waited > timeout_s or (missing and waited > TELL_AFTER_S and not told):
            came = {rank: json.loads(store.get(f"rank/{rank}"))["host"] for rank in range(launch.world)
                    if rank not in missing}  # fmt: skip
            if waited > timeout_s:
                raise LaunchError(f"{_absent(missing, came)} within {timeout_s:g} s; `diffmoe doctor` tells more.")
            print(f"{'waiting':>11}  {_absent(missing, came)} yet", file=sys.stderr, flush=True)
            told = True
        if missing:
            time.sleep(0.05)
    ranks = [json.loads(store.get(f"rank/{rank}")) for rank in range(launch.world)]
    for rank, said in enumerate(ranks):
        if said["same"] != ranks[0]["same"]:
            raise LaunchError(
                f"rank {rank} on {said['host']} resolved another configuration than rank 0 on {ranks[0]['host']}: "
                "the files, the package or the number of ranks per host differ there."
            )
    return ranks


def _absent(missing: set[int], came: Mapping[int, str]) -> str:
    """Who has not come, with the hosts' names as far as the launcher's list gives them."""
    short = {host.partition(".")[0] for host in came.values()}
    silent = [host for host in expected_hosts() if host.partition(".")[0] not in short]
    where = f" (nothing from {', '.join(silent)})" if silent else ""
    ranks = ", ".join(map(str, sorted(missing)[:8])) + (", ..." if len(missing) > 8 else "")
    return f"rank(s) {ranks}{where} of {len(missing) + len(came)} have not come"


def expected_hosts() -> list[str]:
    """The hosts that the launcher was told to use; empty where it does not say."""
    if "SLURM_STEP_NODELIST" in os.environ:
        command = ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()
        except (OSError, subprocess.SubprocessError):
            return []
    if "CROSS_SIZE" in os.environ:  # deepspeed's launcher is the parent and has the list among its arguments
        try:
            arguments = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode().split("\0")
            encoded = next(text for text in arguments if text.startswith("--world_info="))
            return list(json.loads(base64.urlsafe_b64decode(encoded.partition("=")[2])))
        except (OSError, StopIteration, ValueError):
            return []
    return []


def _linger(store: dist.Store, others: int) -> None:
    """Rank 0 serves the store: wait a little until the others have read why it leaves."""
    deadline = time.monotonic() + LINGER_S
    while time.monotonic() < deadline and store.add("left", 0) < others:
        time.sleep(0.05)


def _read(store: dist.Store, key: str, timeout: timedelta) -> bytes:
    """What rank 0 says; a rank 0 that is gone has said why."""
    try:
        store.wait([key], timeout)
        return store.get(key)
    except RuntimeError:
        raise AlreadyReportedError(LaunchError.exit_code) from None
