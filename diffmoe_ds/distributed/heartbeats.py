"""Heartbeats: what the ranks tell each other about their progress, and rank 0's rules for whom to blame.

The rules need no process, store or clock, so that they can be tested alone. `diffmoe_ds.distributed.watchdog` applies
them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch.distributed as dist

MISSED_BEATS = 4
"""After a collective failed, a rank that misses this many heartbeats is the lost one."""
LATER_BEATS = 2
"""Heartbeats for which the verdict on a rank that does not answer waits, for others that were lost with it."""
STATUS = "watchdog/status"
"""Key under which rank 0 writes its `Status`."""
WATCHING, FAILED, BROKEN, LEFT = range(4)
"""States of a rank: all is well; a collective failed; it exits with an error of its own; it has finished, or knows why
all ranks exit."""


class Heartbeat(NamedTuple):
    """What a rank writes about itself at each beat."""

    time: int
    """Differs between any two heartbeats of a rank."""
    step: int
    """Optimizer steps finished; -1 for a command that does not train."""
    ticks: int
    """Calls of `Watchdog.tick`; 0 during startup."""
    waits: int
    """Calls of `Watchdog.alive`."""
    state: int
    """`WATCHING`, `FAILED`, `BROKEN` or `LEFT`."""
    is_reading: int = 0
    """1 within `Watchdog.reading`."""
    is_waiting: int = 0
    """1 while its main thread waits for other ranks."""

    @property
    def place(self) -> str:
        """Where the rank is, for messages."""
        return f"step {self.step + 1}" if self.ticks else "startup"

    @property
    def died(self) -> str:
        """That the rank died here, for messages."""
        if self.step < 0:
            return "died"
        return f"died in step {self.step + 1}" if self.ticks else "died during startup"

    @property
    def failed(self) -> str:
        """That the rank exits here with an error of its own, for messages."""
        if self.step < 0:
            return "failed"
        return f"failed in step {self.step + 1}" if self.ticks else "failed during startup"

    def placed(self, what: str, preposition: str) -> str:
        """Return what happened to the rank and, if it trains, where, for messages."""
        return what if self.step < 0 else f"{what}{preposition}{self.place}"


@dataclass
class Status:
    """What rank 0 writes for the other ranks at each beat."""

    time: int = 0
    """Differs between any two beats."""
    why: str = ""
    """Why all ranks exit, naming the ranks to blame; empty while all is well."""
    stuck: Sequence[int] = ()
    """Ranks that are alive but make no progress; each prints where its main thread is."""
    cleared: Sequence[int] = ()
    """Ranks with a failed collective although no rank is lost."""
    has_left: bool = False
    """Whether rank 0 has finished."""


class Verdict(NamedTuple):
    """Whom to blame."""

    ranks: Sequence[int]
    """The ranks."""
    what: str
    """What happened to them."""
    is_stuck: bool = False
    """Whether they are alive but make no progress."""


def write_first(store: dist.Store, rank: int) -> None:
    """Write a rank's first heartbeat, before the rank joins: from then on the others expect more of them."""
    if rank == 0:
        write_status(store, Status())
    write_heartbeat(store, rank, Heartbeat(0, 0, 0, 0, WATCHING))


def write_heartbeat(store: dist.Store, rank: int, beat: Heartbeat) -> None:
    """Write a rank's heartbeat into the store."""
    store.set(f"watchdog/beat/{rank}", " ".join(map(str, beat)))


def read_heartbeats(store: dist.Store, world: int) -> list[Heartbeat]:
    """Return the heartbeats of all ranks, in one round trip."""
    texts = store.multi_get([f"watchdog/beat/{rank}" for rank in range(world)])
    return [Heartbeat(*map(int, text.split())) for text in texts]


def write_status(store: dist.Store, status: Status) -> None:
    """Write rank 0's status into the store."""
    store.set(STATUS, json.dumps(asdict(status)))


def read_status(store: dist.Store) -> Status:
    """Return rank 0's status."""
    return Status(**json.loads(store.get(STATUS)))


class Judge:
    """Decides from the heartbeats whether a rank is lost, and which."""

    def __init__(
        self, world: int, timeout_s: float, beat_s: float, now: float, startup_s: float = 0.0
    ) -> None:  # fmt: skip
        """Start at a time at which all ranks respond.

        Args:
            world: number of ranks.
            timeout_s: seconds that a rank may go without heartbeats, or all ranks without progress.
            beat_s: seconds between two heartbeats.
            now: the time in seconds, on any clock that never goes back.
            startup_s: seconds that ranks wait for others during startup, if that is longer than `timeout_s`.
        """
        self._timeout, self._patience, self._spread = timeout_s, MISSED_BEATS * beat_s, LATER_BEATS * beat_s
        self._startup = max(timeout_s, startup_s)
        self._last = [-1] * world
        self._seen = [now] * world
        self._reads = [(-1, now)] * world
        """By rank, the number of reads so far, and since when it is the same."""
        self._progress: list[tuple[int, int, int, int]] = []
        self._progress_at = now
        self._suspected_at: float | None = None
        self.cleared: Sequence[int] = ()
        """Ranks with a failed collective although no rank is lost."""
        self.has_heard_others = False
        """Whether other ranks than rank 0 have written heartbeats since the last call of `judge`."""

    def resume(self, now: float) -> None:
        """Forget how long the ranks have been silent, because this process was suspended."""
        self._seen = [now] * len(self._seen)
        self._reads = [(reads, now) for reads, _ in self._reads]
        self._progress_at = now

    def judge(self, beats: Sequence[Heartbeat], now: float) -> Verdict | None:
        """Return whom to blame, if any rank.

        Args:
            beats: the heartbeats of all ranks.
            now: when they were read.
        """
        new = [rank for rank, beat in enumerate(beats) if beat.time != self._last[rank]]
        for rank in new:
            self._last[rank], self._seen[rank] = beats[rank].time, now
        self.has_heard_others = any(rank > 0 for rank in new)
        present = [rank for rank, beat in enumerate(beats) if beat.state != LEFT]
        if broken := [rank for rank in present if beats[rank].state == BROKEN]:
            return Verdict(broken, beats[broken[0]].failed)
        if silent := [rank for rank in present if now - self._seen[rank] > self._timeout]:
            what = beats[silent[0]].placed(f"has not answered for {self._timeout:.0f} s", ", since ")
            # the last heartbeats of ranks that were lost together, for example with their host, differ by up to one
            is_complete = now - min(self._seen[rank] for rank in silent) > self._timeout + self._spread
            return Verdict(silent, what) if is_complete else None
        return (
            self._judge_failures(beats, present, now)
            or self._judge_reads(beats, present, now)
            or self._judge_progress(beats, present, now)
        )

    def _judge_failures(self, beats: Sequence[Heartbeat], present: Sequence[int], now: float) -> Verdict | None:
        """After a collective failed on a rank, find the rank that has been silent since, or has left."""
        failed = [rank for rank in present if beats[rank].state == FAILED]
        if not failed:
            self._suspected_at = None
            return None
        if self._suspected_at is None:
            self._suspected_at = now
        if now - self._suspected_at < self._patience:
            return None
        lost = [rank for rank in present if self._seen[rank] <= self._suspected_at]
        lost = lost or [rank for rank, beat in enumerate(beats) if beat.state == LEFT]
        if lost:
            return Verdict(lost, beats[lost[0]].died)
        self.cleared = failed
        return None

    def _judge_reads(self, beats: Sequence[Heartbeat], present: Sequence[int], now: float) -> Verdict | None:
        """Find the ranks that wait for a disk."""
        for rank in present:
            if not beats[rank].is_reading or beats[rank].waits != self._reads[rank][0]:
                self._reads[rank] = beats[rank].waits, now
        stuck = [rank for rank in present if now - self._reads[rank][1] > self._timeout]
        return self._stuck(stuck, beats, self._timeout) if stuck else None

    def _judge_progress(self, beats: Sequence[Heartbeat], present: Sequence[int], now: float) -> Verdict | None:
        """Find the ranks that hold up the others; startup may take long, unless other ranks wait or have left."""
        fewest = min((beats[rank].ticks for rank in present), default=0)
        is_startup = fewest == 0 and len(present) == len(beats)
        progress = [
            (rank, beats[rank].ticks, beats[rank].waits, is_startup and beats[rank].is_waiting)  # no ticks at startup
            for rank in present
        ]
        limit_s = self._startup if is_startup else self._timeout
        if progress != self._progress:
            self._progress, self._progress_at = progress, now
        elif now - self._progress_at > limit_s:
            behind = [rank for rank in present if beats[rank].ticks == fewest]
            working = [rank for rank in behind if not beats[rank].is_waiting]
            if not is_startup or 0 < len(working) < len(present):
                return self._stuck(working or behind, beats, limit_s)
        return None

    def _stuck(self, ranks: Sequence[int], beats: Sequence[Heartbeat], seconds: float) -> Verdict:
        return Verdict(ranks, beats[ranks[0]].placed(f"has been stuck for {seconds:.0f} s", " in "), is_stuck=True)
