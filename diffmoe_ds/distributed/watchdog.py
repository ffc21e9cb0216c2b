"""Watchdog: when a rank dies or stops responding, all other ranks exit and name it, instead of hanging.

A thread of every rank writes heartbeats into the rendezvous store; rank 0's thread reads all of them, the others read
rank 0's. It works while the main thread is blocked in a collective, and uses none itself. The store goes down
with rank 0, which serves it, so a second thread only checks the clock.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from diffmoe_ds.distributed import flight_recorder
from diffmoe_ds.errors import RankLostError

MAX_BEAT_S = 1.0
"""Longest time between two heartbeats."""
CONNECT_S = 4.0
"""Seconds to reconnect to the store after a collective failed."""
JOIN_S = 1.0
"""Seconds that the threads have to end; a thread that is blocked on the store is abandoned."""
LEAVE_S = 5.0
"""Seconds to print and to tell the others before a process exits in any case."""
VERDICT = "watchdog/verdict"
"""Key of the store under which rank 0 says why all ranks exit, and which ranks are stuck."""
MISSED_BEATS = 4
"""After a collective failed, a rank that misses this many heartbeats is the lost one."""


class Watchdog:
    """Context manager that watches the ranks; with one rank it does nothing."""

    def __init__(self, rank: int, world: int, timeout_s: float) -> None:
        """Configure the watchdog; MASTER_ADDR and MASTER_PORT must be set.

        Args:
            rank: this rank.
            world: number of ranks.
            timeout_s: seconds that a rank may go without heartbeats, or all ranks without progress.
        """
        self._rank, self._world, self._timeout = rank, world, timeout_s
        self._beat_s = min(MAX_BEAT_S, timeout_s / 5)
        self._step = self._ticks = self._waits = 0
        self._left = threading.Event()
        self._threads: list[threading.Thread] = []
        self._answered = time.monotonic()

    def __enter__(self) -> Watchdog:
        if self._world > 1:
            self._store = self._connect(self._timeout)
            self._store.set(f"watchdog/host/{self._rank}", socket.gethostname())
            for target in (self._watch, self._guard):
                thread = threading.Thread(target=target, name="watchdog", daemon=True)
                thread.start()
                self._threads.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        for thread in self._threads:  # the interpreter must not finalize while they are inside the store
            thread.join(JOIN_S)

    def tick(self, step: int | None = None) -> None:
        """Record progress that every rank makes in the same order; the rank with the fewest ticks holds up the others.

        Args:
            step: optimizer steps finished; unchanged if None.
        """
        self._step = self._step if step is None else step
        self._ticks += 1

    def alive(self) -> None:
        """Record that this rank is working on something that takes every rank a different number of calls."""
        self._waits += 1

    def find_lost(self) -> RankLostError | None:
        """Return an error that names the lost rank, after a collective failed; None if all ranks respond."""
        if self._world == 1:
            return None
        self._left.set()  # from here on, this thread decides
        try:
            store = self._connect(min(CONNECT_S, self._timeout))
            if (verdict := self._verdict(store)) is not None:  # another rank has left because of it
                return RankLostError(f"{verdict[0]}; the other ranks exit.")
            before = self._beats(store)
            for _ in range(MISSED_BEATS):
                time.sleep(self._beat_s)
                self._beat(store)
            after = self._beats(store)
            lost = [rank for rank in range(self._world) if rank != self._rank and after[rank][:1] == before[rank][:1]]
            if not lost:
                return None
            return RankLostError(
                f"{self._name(store, lost)} died in step {after[lost[0]][1] + 1}; the other ranks exit."
            )
        except RuntimeError:  # rank 0 served the store
            return RankLostError(f"rank 0 died in step {self._step + 1}; the other ranks exit.")

    def _connect(self, timeout_s: float) -> dist.TCPStore:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout_s))

    def _beat(self, store: dist.TCPStore) -> None:
        store.set(f"watchdog/beat/{self._rank}", f"{time.monotonic_ns()} {self._step} {self._ticks} {self._waits}")

    def _beats(self, store: dist.TCPStore) -> list[tuple[int, int, int, int]]:
        """Return (heartbeat, step, ticks, calls of `alive`) of every rank; all write one before the first step."""
        texts = store.multi_get([f"watchdog/beat/{rank}" for rank in range(self._world)])
        return [_numbers(text) for text in texts]

    def _name(self, store: dist.TCPStore, ranks: list[int]) -> str:
        hosts = store.multi_get([f"watchdog/host/{rank}" for rank in ranks])
        return ", ".join(f"rank {rank} on {host.decode()}" for rank, host in zip(ranks, hosts, strict=True))

    def _watch(self) -> None:
        """Run the thread that reads the store, on which it may block forever."""
        seen: dict[int, tuple[tuple[int, ...], float]] = {}
        moved, progress = time.monotonic(), None
        while not self._left.wait(self._beat_s):
            try:
                self._beat(self._store)
                if self._rank == 0:
                    beats = dict(enumerate(self._beats(self._store)))
                else:
                    if (verdict := self._verdict(self._store)) is not None:
                        self._leave(*verdict)
                    beats = {0: _numbers(self._store.get("watchdog/beat/0"))}
                answered = self._answered = time.monotonic()
            except (RuntimeError, ValueError):
                continue
            for rank, beat in beats.items():
                if rank not in seen or seen[rank][0] != beat[:1]:
                    seen[rank] = (beat[:1], answered)
            silent_ranks = [rank for rank, (_, since) in seen.items() if answered - since > self._timeout]
            if silent_ranks:
                name = self._name(self._store, silent_ranks)
                step = beats[silent_ranks[0]][1]
                self._leave(f"{name} has not answered for {self._timeout:.0f} s, since step {step + 1}")
            if self._rank == 0:
                now, fewest = [beat[2:] for beat in beats.values()], min(beat[2] for beat in beats.values())
                if now != progress or fewest == 0:  # setup may take long and does not tick
                    moved, progress = answered, now
                elif answered - moved > self._timeout:
                    behind = [rank for rank, beat in beats.items() if beat[2] == fewest]
                    where = self._name(self._store, behind)
                    step = beats[behind[0]][1]
                    self._leave(f"{where} has been stuck for {self._timeout:.0f} s in step {step + 1}", behind)

    def _guard(self) -> None:
        """Run the thread that only checks the clock."""
        while not self._left.wait(self._beat_s):
            silent = time.monotonic() - self._answered
            if silent > self._timeout + 2 * self._beat_s:
                self._leave(f"rank 0 has not answered for {silent:.0f} s, since step {self._step + 1}")

    def _leave(self, why: str, stuck: Sequence[int] = ()) -> None:
        """Exit this process, whose main thread may be in a call that never returns.

        Args:
            why: the reason, which names the ranks.
            stuck: ranks that are alive but do not progress; each prints where its main thread is.
        """
        if self._left.is_set():
            return
        is_stuck = self._rank in stuck
        timer = threading.Timer(2 * self._beat_s + LEAVE_S, _exit, (is_stuck,))
        timer.daemon = True
        timer.start()  # what follows may block, e.g. on the file system that the rank is stuck on
        try:
            if self._rank == 0 and time.monotonic() - self._answered < self._beat_s:
                self._store.set(VERDICT, json.dumps([why, list(stuck)]))
                time.sleep(2 * self._beat_s)  # for the others to read it from rank 0's store
            collectives = flight_recorder.path(self._rank)
            hint = f" (its last collectives: {collectives})" if collectives else ""
            print(f"diffmoe: error: {why}; rank {self._rank} exits{hint}.", file=sys.stderr, flush=True)
            if is_stuck:
                stack = "".join(traceback.format_stack(sys._current_frames()[threading.main_thread().ident or 0]))
                print(f"rank {self._rank} is stuck here:\n{stack}", file=sys.stderr, end="", flush=True)
            sys.stdout.flush()
            flight_recorder.dump(self._rank)
        finally:
            _exit(is_stuck)

    def _verdict(self, store: dist.TCPStore) -> tuple[str, list[int]] | None:
        """Return why all ranks exit and which are stuck, if rank 0 has said so."""
        if not store.check([VERDICT]):
            return None
        why, stuck = json.loads(store.get(VERDICT))
        return why, stuck


def _exit(with_workers: bool) -> None:
    """Exit immediately; with the loader's workers, because one that does not respond would outlive this process."""
    try:
        for worker in multiprocessing.active_children() if with_workers else ():
            worker.kill()
    finally:
        os._exit(RankLostError.exit_code)


def _numbers(text: bytes) -> tuple[int, int, int, int]:
    beat, step, ticks, waits = map(int, text.split())
    return beat, step, ticks, waits
