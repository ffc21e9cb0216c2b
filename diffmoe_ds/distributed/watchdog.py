"""Watchdog: when a rank dies or stops responding, all other ranks exit and name it, instead of hanging.

It works from the moment the ranks have joined to the end of the run. A thread of every rank writes heartbeats into the
rendezvous store, through a connection of its own, so that it works while the main thread is blocked. Rank 0's thread
reads all heartbeats and alone decides whom to blame; the others read its status. The store goes down with rank 0, which
serves it, so a second thread only checks the clock.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

from diffmoe_ds.distributed import flight_recorder, main_thread
from diffmoe_ds.distributed.heartbeats import (
    BROKEN,
    FAILED,
    LEFT,
    WATCHING,
    Heartbeat,
    Judge,
    Status,
    read_heartbeats,
    read_status,
    write_heartbeat,
    write_status,
)
from diffmoe_ds.errors import DiffMoEError, RankLostError

MAX_BEAT_S = 1.0
"""Longest time between two heartbeats."""
JOIN_S = 1.0
"""Seconds that the threads have to end; a thread that is blocked on the store is abandoned."""
LEAVE_S = 5.0
"""Seconds to print and to tell the others before a process exits in any case."""


class Watchdog:
    """Context manager that watches the ranks while `watching` is active; with one rank it does nothing."""

    def __init__(
        self,
        rank: int,
        world: int,
        timeout_s: float,
        hosts: Sequence[str] = (),
        store: dist.Store | None = None,
        startup_s: float = 0.0,
        trains: bool = True,
    ) -> None:
        """Configure the watchdog.

        Args:
            rank: this rank.
            world: number of ranks.
            timeout_s: seconds that a rank may go without heartbeats, or all ranks without progress.
            hosts: the host of every rank.
            store: the rendezvous store, after the ranks have joined.
            startup_s: seconds that ranks wait for others during startup, if that is longer than `timeout_s`.
            trains: whether the ranks train; if not, they do not `tick`, and messages name no step.
        """
        self._rank, self._world, self._timeout, self._startup = rank, world, timeout_s, startup_s
        self._hosts, self._shared = hosts, store
        self._beat_s = min(MAX_BEAT_S, timeout_s / 5)
        self._step, self._ticks, self._waits = 0 if trains else -1, 0, 0
        self._state, self._is_reading = WATCHING, False
        self._is_waiting, self._looked_at = False, -math.inf
        self._status, self._status_at = Status(), time.monotonic()
        self._lost: Sequence[int] = ()
        self._answered = time.monotonic()
        self._failed_at = self._suspended_s = 0.0
        self._closing_at: float | None = None
        self._exit_code = RankLostError.exit_code
        self._concluded, self._leaving, self._ended = threading.Event(), threading.Event(), threading.Event()
        self._concluding = threading.Lock()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Watchdog:
        if self._world == 1:
            return self
        assert self._shared is not None, "several ranks share a store"
        watch, guard = (threading.Thread(target=f, name="watchdog", daemon=True) for f in (self._watch, self._guard))
        self._answered = self._status_at = time.monotonic()
        guard.start()  # first: connecting to a frozen server may block
        self._shared.set_timeout(timedelta(seconds=self._timeout))
        try:
            self._store: dist.Store = self._shared.clone()  # type: ignore[attr-defined]
        except RuntimeError:
            self._ended.set()
            raise RankLostError(f"{self._names([0])} {self._heartbeat().died}; the other ranks exit.") from None
        self._answered = self._status_at = time.monotonic()
        watch.start()
        self._threads = [watch, guard]
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving.set()
        self._ended.set()
        for thread in self._threads:  # the interpreter must not finalize while they are inside the store
            thread.join(JOIN_S)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the ranks within the context; the time that this rank needs to close afterwards is limited.

        Raises:
            RankLostError: instead of the error of a collective that failed because a rank was lost.
        """
        try:
            yield
        except (RuntimeError, RankLostError) as error:
            lost = self.find_lost()
            self._leave_group(error if lost is None else lost)
            if lost is None:
                raise
            raise lost from error
        except BaseException as error:
            self._leave_group(error)
            raise
        self._leave_group(None)

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

    @contextmanager
    def reading(self) -> Iterator[Callable[[], None]]:
        """Limit the time without progress within the context, also during startup.

        Yields:
            A function to call whenever this rank has read or written more. It must not wait for other ranks in
            between.
        """
        self._is_reading = True
        try:
            yield self.alive
        finally:
            self._is_reading = False
            self.alive()

    def find_lost(self) -> RankLostError | None:
        """Return an error that names the lost rank, after a collective failed; None if all ranks respond."""
        if not self._threads:
            return None
        self._failed_at, self._state = time.monotonic(), FAILED
        self._concluded.wait()  # `_guard` ends it if the store does not answer
        return RankLostError(f"{self._status.why}; the other ranks exit.") if self._status.why else None

    def _leave_group(self, error: BaseException | None) -> None:
        """Tell the others that this rank leaves; errors of ours are raised on all ranks, any other ends the run."""
        if not self._threads:
            return
        self._exit_code = RankLostError.exit_code if error is None else getattr(error, "exit_code", 1)
        self._state = LEFT if error is None or isinstance(error, DiffMoEError) else BROKEN
        self._leaving.set()
        self._threads[0].join(JOIN_S + (self._timeout + LEAVE_S if self._rank == 0 else 0))
        self._closing_at = time.monotonic()

    def _heartbeat(self) -> Heartbeat:
        now = time.monotonic()
        if now >= self._looked_at + self._timeout / 10:  # rarely: it takes long in a process of many threads
            self._is_waiting, self._looked_at = main_thread.waits_for_others(), now
        flags = int(self._is_reading), int(self._is_waiting)
        return Heartbeat(time.monotonic_ns(), self._step, self._ticks, self._waits, self._state, *flags)

    def _names(self, ranks: Sequence[int]) -> str:
        names = ", ".join(f"rank {rank} on {self._hosts[rank]}" for rank in ranks[:8])
        return names + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")

    def _watch(self) -> None:
        """Run the thread that uses the store, on which it may block forever."""
        checked = time.monotonic()
        judge = Judge(self._world, self._timeout, self._beat_s, checked, self._startup)
        try:
            while not (self._leaving.wait(self._beat_s) or self._status.why or self._status.has_left):
                before, checked = checked, time.monotonic()
                was_suspended = checked - before > self._timeout
                if was_suspended:
                    self._suspended_s, self._status_at = checked - before, checked
                    judge.resume(checked)
                with suppress(dist.DistStoreError):  # a timeout: `_guard` decides
                    write_heartbeat(self._store, self._rank, self._heartbeat())
                    has_heard = self._lead(judge) if self._rank == 0 else self._follow()
                    if has_heard and not was_suspended:  # else what was heard may be from before
                        self._suspended_s = 0.0
                checked = time.monotonic()  # not earlier: the store may be slow
            if not self._status.has_left:
                self._say_goodbye()
        except dist.DistNetworkError:
            self._conclude(f"{self._names([0])} {self._heartbeat().died}", is_connected=False)

    def _lead(self, judge: Judge) -> bool:
        """Judge all ranks and publish the result, on rank 0; return whether others have written heartbeats."""
        beats = read_heartbeats(self._store, self._world)
        self._answered = time.monotonic()
        verdict = judge.judge(beats, self._answered)
        if verdict is None:
            write_status(self._store, Status(time.monotonic_ns(), cleared=judge.cleared))
            if self._rank in judge.cleared:
                self._concluded.set()
        else:
            if verdict.is_stuck:
                self._conclude(f"{self._names(verdict.ranks)} {verdict.what}", stuck=verdict.ranks)
            else:
                self._lost = verdict.ranks
                self._conclude(f"{self._names(verdict.ranks)} {verdict.what}")
        return judge.has_heard_others

    def _follow(self) -> bool:
        """Read what rank 0 has published and act on it, on the other ranks; return whether it is new."""
        status = read_status(self._store)
        self._answered = time.monotonic()
        is_new = status.time != self._status.time
        if is_new:
            self._status_at = self._answered
        self._status = status
        silent_s = self._answered - self._status_at
        me = self._heartbeat()
        if status.why:
            self._conclude(status.why, status.stuck)
        elif status.has_left:
            self._closing_at = self._answered  # from here on, `_guard` limits the time that this rank needs to leave
            if self._failed_at:
                self._conclude(f"{self._names([0])} {me.placed('has left', ' in ')}", is_connected=False)
        elif silent_s > self._timeout:
            self._conclude(f"{self._names([0])} {me.placed(f'has not answered for {silent_s:.0f} s', ', since ')}")
        elif self._failed_at and self._rank in status.cleared:
            self._concluded.set()
        return is_new

    def _guard(self) -> None:
        """Run the thread that only checks the clock."""
        checked = time.monotonic()
        while not self._ended.wait(self._beat_s):
            before, checked = checked, time.monotonic()
            silent_s = checked - self._answered
            if checked - before > self._timeout:
                self._suspended_s, self._answered = checked - before, checked
                self._closing_at = None if self._closing_at is None else checked
            elif self._closing_at is not None:
                if checked - self._closing_at > self._timeout:
                    why = f"{self._names([self._rank])} has been stuck for {self._timeout:.0f} s while the run ended"
                    self._exit(why, self._exit_code, is_stuck=True, is_connected=False)
            elif silent_s > self._timeout + 2 * self._beat_s:
                what = self._heartbeat().placed(f"has not answered for {silent_s:.0f} s", ", since ")
                self._conclude(f"{self._names([0])} {what}", is_connected=False)

    def _conclude(self, why: str, stuck: Sequence[int] = (), is_connected: bool = True) -> None:
        """End this rank: by an error of its main thread if that waits for one, else at once.

        Args:
            why: the reason, which names the ranks to blame.
            stuck: ranks that are alive but make no progress.
            is_connected: whether the store answers, and this is the thread that uses it.
        """
        if self._leaving.is_set() or not self._concluding.acquire(blocking=False):
            return
        if self._suspended_s:
            seconds = f"{self._suspended_s:.0f} s"
            why = f"{self._names([self._rank])} was suspended for {seconds}, and the other ranks have left"
        self._status = Status(time.monotonic_ns(), why, stuck)
        if self._failed_at:
            self._state = LEFT
            self._concluded.set()
            return
        self._state = LEFT
        self._exit(why, RankLostError.exit_code, self._rank in stuck, is_connected)

    def _say_goodbye(self) -> None:
        """Tell the others that this rank leaves; rank 0, which serves the store, waits for those that still respond."""
        write_heartbeat(self._store, self._rank, self._heartbeat())
        if self._rank:
            return
        if self._state == BROKEN and not self._status.why:
            self._status.why = f"{self._names([0])} {self._heartbeat().failed}"
        self._status.time, self._status.has_left = time.monotonic_ns(), True
        write_status(self._store, self._status)
        others = set(range(1, self._world)) - set(self._lost)
        start = heard = time.monotonic()
        before: list[Heartbeat] = []
        while time.monotonic() < min(start + self._timeout, heard + LEAVE_S):
            beats = read_heartbeats(self._store, self._world)
            present = [beats[rank] for rank in others if beats[rank].state not in (BROKEN, LEFT)]
            if not present:
                return
            if present != before:
                before, heard = present, time.monotonic()
            time.sleep(0.02)

    def _exit(self, why: str, exit_code: int, is_stuck: bool, is_connected: bool) -> None:
        """Exit this process, whose main thread may be in a call that never returns.

        Args:
            why: the reason.
            exit_code: the exit code.
            is_stuck: whether the main thread makes no progress: print where it is, and end the loader's workers, one
                of which it may be waiting for.
            is_connected: whether to tell the other ranks first.
        """
        timer = threading.Timer(2 * LEAVE_S, _exit_now, (exit_code, is_stuck))
        timer.daemon = True
        timer.start()  # what follows may block, e.g. on the file system that the rank is stuck on
        try:
            if is_connected:
                with suppress(RuntimeError):
                    self._say_goodbye()
            collectives = flight_recorder.path(self._rank)
            hint = f" (its last collectives: {collectives})" if collectives else ""
            print(f"diffmoe: error: {why}; rank {self._rank} exits{hint}.", file=sys.stderr, flush=True)
            if is_stuck:
                stack = main_thread.stack()
                print(f"rank {self._rank} is stuck here:\n{stack}", file=sys.stderr, end="", flush=True)
            sys.stdout.flush()
            flight_recorder.dump(self._rank)
        finally:
            _exit_now(exit_code, is_stuck)


def _exit_now(exit_code: int, with_workers: bool) -> None:
    """Exit immediately; with the loader's workers, because one that does not respond would outlive this process."""
    try:
        for worker in multiprocessing.active_children() if with_workers else ():
            worker.kill()
    finally:
        os._exit(exit_code)
