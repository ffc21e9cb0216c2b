"""Rendezvous: the ranks find each other before any process group exists, so that a missing rank is named.

torch's own rendezvous waits silently for half an hour for a host that is down. Here every rank reports its host, rank 0
waits for all of them and names those that did not join. Afterwards the ranks share a key-value store, through which any
error of one rank reaches the others at once (`Rendezvous.raise_on_all_ranks`), which then exit instead of waiting.
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
from typing import Any, TypeVar

import torch.distributed as dist

from diffmoe_ds.distributed.agent_store import move_to_own_store
from diffmoe_ds.distributed.consensus import encode_error, raise_agreed
from diffmoe_ds.distributed.launch import Launch, export_launch
from diffmoe_ds.distributed.shared_gpus import check_gpus, gpu_of
from diffmoe_ds.errors import AlreadyReportedError, DiffMoEError, LaunchError

START_TIMEOUT_S = 300.0
"""Seconds that ranks wait for each other: importing torch from a slow shared disk can take minutes."""
TELL_AFTER_S = 15.0
"""Seconds after which rank 0 prints which ranks it is waiting for."""
LINGER_S = 5.0
"""Seconds that rank 0 keeps serving the store after an error, for the others to read it."""

T = TypeVar("T")


class Rendezvous:
    """The joined ranks: their hosts, and a store for messages between them."""

    def __init__(self, launch: Launch, hosts: tuple[str, ...], store: dist.Store | None, timeout_s: float) -> None:
        """Wrap the result of `join_ranks`.

        Args:
            launch: this process's place among the ranks, with the address of the rendezvous.
            hosts: the host of every rank, by rank.
            store: the shared key-value store; None in a world of one. It must live as long as the process group, which
                shares its port.
            timeout_s: seconds to wait for a message.
        """
        self.launch = launch
        self.hosts = hosts
        self.store = store
        self._timeout = timedelta(seconds=timeout_s)

    def raise_on_all_ranks(self, name: str, action: Callable[[], T]) -> T:
        """Run an action that may fail on a single rank; if it fails on any, all ranks raise. Every rank must call this.

        Use it for everything between `join_ranks` and the process group, e.g.
        ``model = rendezvous.raise_on_all_ranks("model", lambda: load_model(path))``; with a process group,
        `diffmoe_ds.distributed.consensus.raise_on_all_ranks` does the same. To run something on rank 0 only, pass an
        action that does nothing elsewhere, or use `on_main`.

        Args:
            name: a key of the store, different for each call.
            action: may raise a `DiffMoEError`.

        Returns:
            What the action returns on this rank.

        Raises:
            DiffMoEError: on all ranks, if the action of any failed; see `consensus.raise_agreed`.
            LaunchError: a rank did not report within the timeout.
        """
        failure = None
        try:
            result = action()
        except DiffMoEError as error:
            failure = error
        if self.store is None:
            if failure is not None:
                raise failure
            return result
        rank = self.launch.rank
        self.store.set(f"{name}/{rank}", str(encode_error(failure, rank)))
        if rank == 0:
            try:
                failure_codes = self._read_all(name)
            except LaunchError as error:
                failure, failure_codes = error, [encode_error(error, rank)]
            self.store.set(name, str(max(failure_codes)))
        self._raise_agreed(name, failure)
        return result

    def on_main(self, name: str, action: Callable[[], T]) -> T | None:
        """Run an action on rank 0; if it fails there, all ranks raise. Every rank must call this.

        Args:
            name: a key of the store, different for each call.
            action: may raise a `DiffMoEError`.

        Returns:
            What the action returns on rank 0; None elsewhere.

        Raises:
            DiffMoEError: on all ranks, if the action failed; see `consensus.raise_agreed`.
        """
        failure, result = None, None
        if self.launch.rank == 0:
            try:
                result = action()
            except DiffMoEError as error:
                failure = error
            if self.store is not None:
                self.store.set(name, str(encode_error(failure, 0)))
        if self.store is not None:
            self._raise_agreed(name, failure)
        elif failure is not None:
            raise failure
        return result

    def check_same(self, name: str, text: str, message: str) -> None:
        """Verify that a text is equal on all ranks. Every rank must call this.

        Args:
            name: a key of the store, different for each call.
            text: for example the path of a checkpoint.
            message: the error, after "rank N on HOST ".

        Raises:
            LaunchError: on all ranks, if a rank's text differs from rank 0's.
        """
        if self.store is None:
            return
        self.store.set(f"{name}/text/{self.launch.rank}", text)

        def compare() -> None:
            assert self.store is not None
            keys = [f"{name}/text/{rank}" for rank in range(self.launch.world)]
            self._wait(keys)
            texts = [self.store.get(key) for key in keys]
            for rank, found in enumerate(texts):
                if found != texts[0]:
                    raise LaunchError(f"rank {rank} on {self.hosts[rank]} {message}")

        self.on_main(name, compare)

    def _read_all(self, name: str) -> list[int]:
        """Return the encoded errors of all ranks, on rank 0."""
        assert self.store is not None
        keys = [f"{name}/{rank}" for rank in range(self.launch.world)]
        self._wait(keys)
        return [int(self.store.get(key)) for key in keys]

    def _wait(self, keys: list[str]) -> None:
        """Wait for one key of every rank, by rank; LaunchError names the ranks that do not set theirs."""
        assert self.store is not None
        try:
            self.store.wait(keys, self._timeout)
        except RuntimeError:
            silent = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
            names = ", ".join(f"rank {rank} on {self.hosts[rank]}" for rank in silent)
            raise LaunchError(
                f"{names}: no answer for {self._timeout.total_seconds():g} s after the ranks joined."
            ) from None

    def _raise_agreed(self, name: str, mine: DiffMoEError | None) -> None:
        assert self.store is not None
        winner = int(_read(self.store, name, 2 * self._timeout))
        if winner:
            _let_others_read(self.store, self.launch)
        raise_agreed(winner, mine, self.launch.rank)


def join_ranks(
    launch: Launch, fingerprint: str = "", timeout_s: float = START_TIMEOUT_S, error: DiffMoEError | None = None
) -> Rendezvous:
    """Wait until every rank has joined; sets the ``env://`` variables of torch.distributed.

    Args:
        launch: from `resolve_launch`.
        fingerprint: what must be equal on all ranks, such as a hash of the resolved configuration.
        timeout_s: seconds to wait.
        error: an error that this rank has already hit; see `fail_together`.

    Raises:
        LaunchError: a rank did not join, rank 0 cannot be reached, a rank's fingerprint differs, or two share a GPU.
        DiffMoEError: on all ranks, if any rank passed an error; see `consensus.raise_agreed`.
    """
    if launch.world == 1 and not launch.surplus:
        launch = move_to_own_store(export_launch(launch), timeout_s)
        return Rendezvous(launch, (socket.gethostname(),), None, timeout_s)
    launch, store = connect(launch, timeout_s)
    rank = launch.rank
    mine = {"host": socket.gethostname(), "fingerprint": fingerprint, "error": encode_error(error, rank)}
    mine["gpu"] = gpu_of(launch)
    store.set(f"rank/{rank}", json.dumps(mine))
    if rank == 0:
        reports: list[dict[str, Any]] = []
        try:
            reports = _gather(store, launch, timeout_s)
            winner = max(report["error"] for report in reports)
            if not winner:
                _check_fingerprints(reports)
                check_gpus([report["host"] for report in reports], [report["gpu"] for report in reports])
        except LaunchError as failure:
            error, winner = failure, encode_error(failure, 0)
        store.set("joined", json.dumps({"error": winner, "hosts": [report["host"] for report in reports]}))
    joined = json.loads(_read(store, "joined", timedelta(seconds=timeout_s + LINGER_S)))
    if joined["error"]:
        _let_others_read(store, launch)
        raise_agreed(joined["error"], error, rank)
    return Rendezvous(launch, tuple(joined["hosts"]), store, timeout_s)


def fail_together(launch: Launch, error: DiffMoEError) -> None:
    """Report an error that this rank alone hit before joining, so that the other ranks do not wait for it.

    Args:
        launch: from `resolve_launch`.
        error: this rank's error.

    Raises:
        DiffMoEError: the error, or `AlreadyReportedError` if another rank reports one.
    """
    try:
        join_ranks(launch, error=error)
    except LaunchError:  # this rank's own error is more specific
        raise error from None


def _let_others_read(store: dist.Store, launch: Launch) -> None:
    """Call after reading an error: rank 0, which serves the store, exits last."""
    if launch.rank == 0:
        _linger(store, launch.world - 1)
    else:
        store.add("left", 1)


def connect(launch: Launch, timeout_s: float) -> tuple[Launch, dist.Store]:
    """Connect to the store, which rank 0 serves; return the launch with its address, which is exported, and the store.

    Raises:
        LaunchError: rank 0 cannot be reached, or its port is in use.
    """
    launch = move_to_own_store(export_launch(launch), timeout_s)
    serves = launch.rank == 0
    assert launch.master_addr is not None and launch.master_port is not None, "set by `export_launch`"
    try:
        store = dist.TCPStore(
            launch.master_addr,
            launch.master_port,
            is_master=serves,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,  # torch's env:// connects to the same port and shares this server
        )
    except RuntimeError as error:
        host = socket.gethostname()
        if serves and "EADDRINUSE" in str(error):
            raise LaunchError(
                f"rank 0 on {host}: port {launch.master_port} is in use; set MASTER_PORT (deepspeed: --master_port) to "
                "a free one."
            ) from None
        raise LaunchError(
            f"rank {launch.rank} on {host} cannot reach rank 0 at {launch.address} within {timeout_s:g} s; check that "
            "the address is right, that rank 0 was started and that the port is open."
        ) from None
    return launch, dist.PrefixStore("diffmoe", store)


def _gather(store: dist.Store, launch: Launch, timeout_s: float) -> list[dict[str, Any]]:
    """Return what every rank reported: ``host``, ``fingerprint`` and ``error``."""
    start = time.monotonic()
    missing, told = set(range(launch.world)), False
    while missing:
        missing = {rank for rank in missing if not store.check([f"rank/{rank}"])}
        waited = time.monotonic() - start
        if waited > timeout_s or (missing and waited > TELL_AFTER_S and not told):
            joined = {rank: json.loads(store.get(f"rank/{rank}"))["host"] for rank in range(launch.world)
                    if rank not in missing}  # fmt: skip
            if waited > timeout_s:
                raise LaunchError(
                    f"{_absent(missing, joined)} did not join within {timeout_s:g} s; run `diffmoe doctor`."
                )
            print(f"{'waiting':>11}  {_absent(missing, joined)} have not joined yet", file=sys.stderr, flush=True)
            told = True
        if missing:
            time.sleep(0.05)
    return [json.loads(store.get(f"rank/{rank}")) for rank in range(launch.world)]


def _check_fingerprints(reports: list[dict[str, Any]]) -> None:
    """Raise LaunchError if a rank resolved a different configuration than rank 0."""
    for rank, report in enumerate(reports):
        if report["fingerprint"] != reports[0]["fingerprint"]:
            raise LaunchError(
                f"rank {rank} on {report['host']} resolved a different configuration than rank 0 on "
                f"{reports[0]['host']}; compare the files, the package versions and the number of ranks per host."
            )


def _absent(missing: set[int], joined: Mapping[int, str]) -> str:
    """Name the missing ranks, and the silent hosts as far as the launcher lists its hosts."""
    short = {host.partition(".")[0] for host in joined.values()}
    silent = [host for host in expected_hosts() if host.partition(".")[0] not in short]
    where = f" (nothing from {', '.join(silent)})" if silent else ""
    ranks = ", ".join(map(str, sorted(missing)[:8])) + (", ..." if len(missing) > 8 else "")
    return f"rank(s) {ranks}{where} of {len(missing) + len(joined)}"


def expected_hosts() -> list[str]:
    """Return the hosts that the launcher was told to use; empty if unknown."""
    if "SLURM_STEP_NODELIST" in os.environ:
        command = ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()
        except (OSError, subprocess.SubprocessError):
            return []
    if "CROSS_SIZE" in os.environ:  # deepspeed's launcher is the parent process and has the list in its arguments
        try:
            arguments = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode().split("\0")
            encoded = next(text for text in arguments if text.startswith("--world_info="))
            return list(json.loads(base64.urlsafe_b64decode(encoded.partition("=")[2])))
        except (OSError, StopIteration, ValueError):
            return []
    return []


def _linger(store: dist.Store, others: int) -> None:
    """Wait on rank 0, which serves the store, until the others have read its error."""
    deadline = time.monotonic() + LINGER_S
    while time.monotonic() < deadline and store.add("left", 0) < others:
        time.sleep(0.05)


def _read(store: dist.Store, key: str, timeout: timedelta) -> bytes:
    """Return what rank 0 wrote. If rank 0 is gone it has already reported the reason."""
    try:
        store.wait([key], timeout)
        return store.get(key)
    except RuntimeError:
        raise AlreadyReportedError(LaunchError.exit_code) from None
