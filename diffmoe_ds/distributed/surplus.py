"""Surplus ranks of an elastic launch: wait until the run is complete, without taking part in it."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time

import torch.distributed as dist

from diffmoe_ds.distributed import signals
from diffmoe_ds.distributed.agent_store import move_to_own_store
from diffmoe_ds.distributed.launch import Launch, export_launch
from diffmoe_ds.distributed.reports import Report, write_report
from diffmoe_ds.distributed.store import LINGER_S, open_store
from diffmoe_ds.errors import AlreadyReportedError, DiffMoEError, RankLostError
from diffmoe_ds.files import Progress

COMPLETE, SEEN = "surplus/complete", "surplus/seen"
"""Keys of the store: the run is complete; number of surplus ranks that know it."""
POLL_S = 1.0
"""Seconds between two questions."""


def wait_for_run(launch: Launch, start_timeout_s: float, rank_timeout_s: float) -> None:
    """Wait on a surplus rank until the run is complete.

    Args:
        launch: this process's place; its rank is among the surplus.
        start_timeout_s: seconds to wait for rank 0 to start.
        rank_timeout_s: seconds that rank 0 may not answer afterwards.

    Raises:
        LaunchError: rank 0 cannot be reached, or another process has joined as this rank.
        RankLostError: rank 0 exited or does not answer. torchrun restarts this rank with the others.
        AlreadyReportedError: likewise, on all surplus ranks but the first; or a signal asked this process to exit.
    """
    launch = move_to_own_store(export_launch(launch), start_timeout_s)
    store = open_store(launch, start_timeout_s)
    # if rank 0 fails before it knows that there are surplus ranks, it waits for the reports of all (`fail_together`)
    report = Report(socket.gethostname(), "", "", os.getpid())
    try:
        write_report(store, launch.rank, report, rank_timeout_s)
    except TimeoutError:
        raise _silent(launch, rank_timeout_s) from None
    if launch.rank == launch.world:
        last = launch.world + launch.surplus - 1
        ranks = f"rank {last}" if launch.surplus == 1 else f"ranks {launch.world} to {last}"
        text = f"{'waiting':>11}  {ranks}, until the run ends or torchrun restarts all ranks"
        print(text, file=sys.stderr, flush=True)
    poll = _Poll(store)
    poll.start()
    while not poll.ended.wait(POLL_S / 4):
        if signals.received():
            raise AlreadyReportedError(RankLostError.exit_code)
        silent = time.monotonic() - poll.answered
        if silent > rank_timeout_s:
            raise _silent(launch, silent)
    if not poll.complete:  # because of any rank, which the others name
        raise _lost(launch, f"the run has ended before it was complete (the store at {launch.address} is closed)")


def release_surplus(launch: Launch, store: dist.Store | None, alive: Progress) -> None:
    """Tell the surplus ranks that the run is complete, on rank 0; wait for a short time until they know it.

    Args:
        launch: this process's place among the ranks.
        store: the rendezvous store.
        alive: called while rank 0 waits, see `Watchdog.alive`: ranks that were lost while they waited never answer.
    """
    if launch.rank != 0 or not launch.surplus:
        return
    assert store is not None, "a launch with surplus ranks has a store"
    store.set(COMPLETE, "")
    deadline = time.monotonic() + LINGER_S
    while store.add(SEEN, 0) < launch.surplus and time.monotonic() < deadline:
        alive()
        time.sleep(POLL_S / 20)


class _Poll(threading.Thread):
    """Asks rank 0's store whether the run is complete; a question may block forever if its host lost power."""

    def __init__(self, store: dist.Store) -> None:
        super().__init__(name="surplus", daemon=True)
        self.ended = threading.Event()
        self.complete = False
        self.answered = time.monotonic()
        self._store = store

    def run(self) -> None:
        try:
            while not self._store.check([COMPLETE]):
                self.answered = time.monotonic()
                time.sleep(POLL_S)
            self._store.add(SEEN, 1)
            self.complete = True
        except RuntimeError:  # the connection is closed
            pass
        finally:
            self.ended.set()


def _silent(launch: Launch, silent_s: float) -> DiffMoEError:
    return _lost(launch, f"rank 0 at {launch.address} has not answered for {silent_s:.0f} s")


def _lost(launch: Launch, what: str) -> DiffMoEError:
    """Return the error that ends the wait, which only the first surplus rank prints."""
    if launch.rank != launch.world:
        return AlreadyReportedError(RankLostError.exit_code)
    return RankLostError(f"{what}; the surplus ranks exit.")
