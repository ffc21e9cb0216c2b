"""Rendezvous: the ranks find each other before any process group exists, so that a missing rank is named.

torch's own rendezvous waits silently for half an hour for a host that is down. Here every rank reports its host, rank 0
waits for all of them and names those that did not join. Afterwards the ranks share a key-value store, through which any
error of one rank reaches the others at once (`Rendezvous.raise_on_all_ranks`), which then exit instead of waiting.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from diffmoe_ds.distributed.absent_ranks import absent_ranks
from diffmoe_ds.distributed.agent_store import move_to_own_store
from diffmoe_ds.distributed.consensus import encode_error, raise_agreed
from diffmoe_ds.distributed.heartbeats import write_first
from diffmoe_ds.distributed.launch import Launch, export_launch
from diffmoe_ds.distributed.reports import Report, check_same, write_report
from diffmoe_ds.distributed.shared_gpus import check_gpus, gpu_of
from diffmoe_ds.distributed.store import (
    LINGER_S,
    POLL_S,
    SILENCE_S,
    init_method,
    let_others_read,
    open_store,
    read_from_rank_0,
    silent_since_startup,
    wait_for,
)
from diffmoe_ds.errors import DiffMoEError, LaunchError, RankLostError, TopologyError, as_reported

START_TIMEOUT_S = 300.0
"""Seconds that ranks wait for each other: importing torch from a slow shared disk can take minutes."""
TELL_AFTER_S = 15.0
"""Seconds after which rank 0 prints which ranks it is waiting for."""
ANSWER_S = 60.0
"""Least number of seconds to wait for a rank that has joined: rank 0 may first wait for a run lock to become stale."""

T = TypeVar("T")


class Rendezvous:
    """The joined ranks: their hosts, and a store for messages between them."""

    def __init__(
        self,
        launch: Launch,
        hosts: tuple[str, ...],
        store: dist.Store | None,
        timeout_s: float,
        silence_s: float = SILENCE_S,
    ) -> None:
        """Wrap the result of `join_ranks`.

        Args:
            launch: this process's place among the ranks, with the address of the rendezvous.
            hosts: the host of every rank, by rank.
            store: the shared key-value store; None in a world of one. Process groups use its connection too.
            timeout_s: seconds to wait for another rank's answer, at least `ANSWER_S`. A watchdog ends the wait for a
                rank that is lost.
            silence_s: seconds that the store may go without answering.
        """
        self.launch = launch
        self.hosts = hosts
        self.store = store
        self.timeout_s = max(timeout_s, ANSWER_S)
        """Seconds that ranks which have joined wait for each other."""
        self._silence_s = silence_s

    def init_method(self) -> str:
        """Return torch's ``init_method`` for a process group of these ranks, which uses the store's open connection.

        A single rank needs no server, whose port another process could take first.
        """
        return init_method(self.store or dist.HashStore(), self.launch)

    def raise_on_all_ranks(self, name: str, action: Callable[[], T]) -> T:
        """Run an action that may fail on a single rank; if it fails on any, all ranks raise. Every rank must call this.

        Use it for everything between `join_ranks` and the process group, e.g.
        ``model = rendezvous.raise_on_all_ranks("model", lambda: load_model(path))``; with a process group,
        `diffmoe_ds.distributed.consensus.raise_on_all_ranks` does the same. To run something on rank 0 only, pass an
        action that does nothing elsewhere, or use `on_main`.

        Args:
            name: a key of the store, different for each call.
            action: may raise a `DiffMoEError`, or an `OSError` about a file.

        Returns:
            What the action returns on this rank.

        Raises:
            DiffMoEError: on all ranks, if the action of any failed; see `consensus.raise_agreed`.
            LaunchError: a rank did not report within the timeout.
            RankLostError: rank 0 died.
        """
        failure = None
        try:
            result = action()
        except (DiffMoEError, OSError) as error:
            failure = as_reported(error)
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
            action: may raise a `DiffMoEError`, or an `OSError` about a file.

        Returns:
            What the action returns on rank 0; None elsewhere.

        Raises:
            DiffMoEError: on all ranks, if the action failed; see `consensus.raise_agreed`.
            LaunchError: rank 0 did not report within the timeout.
            RankLostError: rank 0 died.
        """
        failure, result = None, None
        if self.launch.rank == 0:
            try:
                result = action()
            except (DiffMoEError, OSError) as error:
                failure = as_reported(error)
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
            texts = self.store.multi_get(keys)
            for rank, found in enumerate(texts):
                if found != texts[0]:
                    raise LaunchError(f"rank {rank} on {self.hosts[rank]} {message}")

        self.on_main(name, compare)

    def _read_all(self, name: str) -> list[int]:
        """Return the encoded errors of all ranks, on rank 0."""
        assert self.store is not None
        keys = [f"{name}/{rank}" for rank in range(self.launch.world)]
        self._wait(keys)
        return [int(text) for text in self.store.multi_get(keys)]

    def _wait(self, keys: list[str]) -> None:
        """Wait for one key of every rank, by rank; LaunchError names the ranks that do not set theirs."""
        assert self.store is not None
        try:
            wait_for(self.store, keys, self.timeout_s)
        except dist.DistStoreError:  # the timeout
            silent = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
            names = ", ".join(f"rank {rank} on {self.hosts[rank]}" for rank in silent)
            raise LaunchError(f"{names}: no answer for {self.timeout_s:g} s after the ranks joined.") from None

    def _raise_agreed(self, name: str, mine: DiffMoEError | None) -> None:
        assert self.store is not None
        limit_s = 2 * self.timeout_s  # rank 0 waits, too
        rank_0 = f"rank 0 on {self.hosts[0]}"
        winner = int(_read(self.store, self.launch, name, rank_0, limit_s, self._silence_s))
        if winner:
            let_others_read(self.store, self.launch)
        raise_agreed(winner, mine, self.launch.rank)


def join_ranks(
    launch: Launch,
    fingerprint: str = "",
    timeout_s: float = START_TIMEOUT_S,
    silence_s: float = SILENCE_S,
    error: DiffMoEError | None = None,
) -> Rendezvous:
    """Wait until every rank has joined; sets the ``env://`` variables of torch.distributed.

    Args:
        launch: from `resolve_launch`.
        fingerprint: what must be equal on all ranks, such as a hash of the resolved configuration.
        timeout_s: seconds to wait.
        silence_s: seconds that rank 0's store may go without answering.
        error: an error that this rank has already hit; see `fail_together`.

    Raises:
        LaunchError: a rank did not join, rank 0 cannot be reached, a rank's fingerprint differs, or two share a GPU.
        DiffMoEError: on all ranks, if any rank passed an error; see `consensus.raise_agreed`.
    """
    launch = move_to_own_store(export_launch(launch), timeout_s)
    host, rank = socket.gethostname(), launch.rank
    if launch.world == 1 and not launch.surplus:
        return Rendezvous(launch, (host,), None, timeout_s)
    report = Report(host, fingerprint, gpu_of(launch), os.getpid(), encode_error(error, rank), launch.world)
    store = open_store(launch, timeout_s)
    winner, hosts, failure = exchange_reports(store, launch, report, timeout_s, silence_s)
    if winner:
        let_others_read(store, launch)
        raise_agreed(winner, failure or error, rank)
    if len(hosts) != launch.world:  # rank 0 does not know of this rank, and nobody would miss it
        raise LaunchError(
            f"rank {rank} on {host} was started as one of {launch.world} ranks, but rank 0 at {launch.address} as one "
            f"of {len(hosts)}; start all ranks with the same WORLD_SIZE."
        )
    return Rendezvous(launch, hosts, store, timeout_s, silence_s)


def exchange_reports(
    store: dist.Store, launch: Launch, report: Report, timeout_s: float, silence_s: float
) -> tuple[int, tuple[str, ...], LaunchError | None]:
    """Report this rank to rank 0 and wait until all ranks have done so. Every rank must call this.

    Args:
        store: from `open_store`.
        launch: this rank's place among the ranks.
        report: this rank's report.
        timeout_s: seconds to wait.
        silence_s: seconds that the store may go without answering.

    Returns:
        The agreed error, encoded (0 for none); the host of every rank (empty after an error); and rank 0's own error,
        if it found one.

    Raises:
        LaunchError: another process has joined as this rank.
        RankLostError: rank 0 is gone.
    """
    write_first(store, launch.rank)  # before the report: the watchdog expects one from every rank that has joined
    rank_0, failure = f"rank 0 at {launch.address}", None
    try:
        write_report(store, launch.rank, report, silence_s)
    except TimeoutError:
        raise _from_one_rank(silent_since_startup(rank_0, silence_s), launch.rank) from None
    if launch.rank == 0:
        hosts: list[str] = []
        try:
            reports = _gather(store, launch, timeout_s)
            hosts = [each.host for each in reports]
            winner = max(each.error for each in reports)
            if not winner:
                check_same(reports)
                check_gpus(hosts, [each.gpu for each in reports])
        except LaunchError as error:
            failure, winner = error, encode_error(error, 0)
        store.set("joined", json.dumps({"error": winner, "hosts": hosts}))
    joined = json.loads(_read(store, launch, "joined", rank_0, timeout_s + LINGER_S, silence_s))
    return joined["error"], tuple(joined["hosts"]), failure


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
    except (LaunchError, RankLostError, TopologyError):  # this rank's own error is more specific
        raise error from None


def _gather(store: dist.Store, launch: Launch, timeout_s: float) -> list[Report]:
    """Return the report of every rank, on rank 0.

    Raises:
        LaunchError: a rank did not join in time.
    """
    keys = [f"rank/{rank}" for rank in range(launch.world)]
    start, told = time.monotonic(), False
    while (waited := time.monotonic() - start) < timeout_s:
        if waited > TELL_AFTER_S and not told:
            told = True
            if absent := absent_ranks(store, keys):
                print(f"{'waiting':>11}  {absent} have not joined yet", file=sys.stderr, flush=True)
        try:
            store.wait(keys, timedelta(seconds=min(POLL_S, timeout_s - waited + 0.01)))
            return [Report(**json.loads(text)) for text in store.multi_get(keys)]
        except dist.DistStoreError:  # the timeout
            continue
    raise LaunchError(f"{absent_ranks(store, keys)} did not join within {timeout_s:g} s; run `diffmoe doctor`.")


def _read(store: dist.Store, launch: Launch, key: str, rank_0: str, timeout_s: float, silence_s: float) -> bytes:
    """Return what rank 0 wrote under a key; see `read_from_rank_0`. If rank 0 is lost, only rank 1 reports it."""
    if launch.rank == 0:
        return store.get(key)
    try:
        return read_from_rank_0(store, key, rank_0, timeout_s, silence_s)
    except RankLostError as lost:
        raise _from_one_rank(lost, launch.rank) from None


def _from_one_rank(lost: RankLostError, rank: int) -> RankLostError:
    """Return an error that all ranks but rank 0 have, so that only rank 1 reports it."""
    lost.same_on_all_ranks = rank != 1
    return lost
