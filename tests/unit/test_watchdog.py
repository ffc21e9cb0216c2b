"""Whom the watchdog blames, without processes."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from diffmoe_ds.distributed import heartbeats, main_thread
from diffmoe_ds.distributed.heartbeats import BROKEN, FAILED, LEFT, WATCHING, Heartbeat, Judge, Status, Verdict
from diffmoe_ds.distributed.store import read_from_rank_0
from diffmoe_ds.distributed.watchdog import Watchdog
from diffmoe_ds.errors import RankLostError

TIMEOUT_S, BEAT_S, STARTUP_S = 60.0, 1.0, 90.0
HOSTS = ("a", "b", "c")


class Clock:
    """Three ranks that beat once a second."""

    def __init__(self) -> None:
        self.now = 0.0
        self.judge = Judge(3, TIMEOUT_S, BEAT_S, self.now, STARTUP_S)
        self.beats = [Heartbeat(0, 4, 5, 0, WATCHING)] * 3

    def pass_seconds(self, seconds: int, silent: tuple[int, ...] = (), ticking: bool = True) -> Verdict | None:
        """Return the verdict after some seconds, or the first one before."""
        for _ in range(seconds):
            self.now += 1
            for rank in set(range(3)) - set(silent):
                beat = self.beats[rank]
                self.beats[rank] = beat._replace(time=beat.time + 1, ticks=beat.ticks + ticking)
            if (verdict := self.judge.judge(self.beats, self.now)) is not None:
                return verdict
        return None

    def change(self, rank: int, **fields: int) -> None:
        self.beats[rank] = self.beats[rank]._replace(**fields)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.mark.parametrize("rank", (0, 1, 2))
def test_a_silent_rank_is_lost_after_the_timeout(clock, rank):
    assert clock.pass_seconds(100) is None
    assert clock.pass_seconds(62, silent=(rank,)) is None
    assert clock.pass_seconds(1, silent=(rank,)) == ([rank], "has not answered for 60 s, since step 5", False)


def test_ranks_of_a_lost_host_are_named_together(clock):
    """Their last heartbeats were not read at the same time."""
    clock.pass_seconds(1)
    clock.pass_seconds(1, silent=(1,))
    assert clock.pass_seconds(100, silent=(1, 2)) == ([1, 2], "has not answered for 60 s, since step 5", False)
    assert clock.now == 64


def test_messages_name_no_step_if_the_ranks_do_not_train(clock):
    for rank in range(3):
        clock.change(rank, step=-1, ticks=0)
    assert clock.pass_seconds(1, ticking=False) is None
    assert clock.pass_seconds(63, (1,), ticking=False) == ([1], "has not answered for 60 s", False)
    assert clock.beats[1].died == "died" and clock.beats[1].failed == "failed"
    clock.change(0, is_waiting=1)
    clock.change(1, is_waiting=1)
    assert clock.pass_seconds(92, ticking=False) == ([2], "has been stuck for 90 s", True)


def test_after_a_failed_collective_a_silent_rank_is_lost_soon(clock):
    clock.pass_seconds(1)
    clock.change(0, state=FAILED)
    assert clock.pass_seconds(4, silent=(2,)) is None
    assert clock.pass_seconds(1, silent=(2,)) == ([2], "died in step 5", False)
    assert clock.judge.cleared == ()


def test_a_failed_collective_is_cleared_while_all_respond(clock):
    """Also if a rank was slow before: it is not the one that is lost."""
    clock.pass_seconds(1)
    clock.pass_seconds(30, silent=(1,))
    clock.change(2, state=FAILED)
    assert clock.pass_seconds(10) is None
    assert clock.judge.cleared == [2]
    clock.change(2, state=BROKEN)
    assert clock.pass_seconds(1) == ([2], "failed in step 5", False)


def test_a_rank_that_left_alone_is_to_blame(clock):
    clock.pass_seconds(1)
    clock.change(1, state=LEFT)
    clock.change(0, state=FAILED)
    assert clock.pass_seconds(5, silent=(1,)) == ([1], "died in step 5", False)


def test_the_rank_with_the_fewest_ticks_is_stuck(clock):
    clock.pass_seconds(1)
    clock.change(1, ticks=3)
    assert clock.pass_seconds(61, ticking=False) is None
    assert clock.pass_seconds(1, ticking=False) == ([1], "has been stuck for 60 s in step 5", True)


def test_startup_may_take_long_until_another_rank_leaves(clock):
    for rank in range(3):
        clock.change(rank, ticks=0)
    assert clock.pass_seconds(1000, ticking=False) is None
    clock.change(1, state=LEFT)
    clock.change(2, state=LEFT)
    assert clock.pass_seconds(61, silent=(1, 2), ticking=False) is None
    verdict = clock.pass_seconds(1, silent=(1, 2), ticking=False)
    assert verdict == ([0], "has been stuck for 60 s in startup", True)


def test_a_read_that_hangs_is_stuck_also_during_startup(clock):
    """But not one that gets more bytes, nor a rank that waits for it."""
    for rank in range(3):
        clock.change(rank, ticks=0)
    clock.change(2, is_reading=1)
    for number in range(5):
        clock.change(2, waits=number)
        assert clock.pass_seconds(50, ticking=False) is None
    assert clock.pass_seconds(10, ticking=False) is None
    assert clock.pass_seconds(2, ticking=False) == ([2], "has been stuck for 60 s in startup", True)


def test_a_rank_that_waits_for_others_is_not_the_stuck_one(clock):
    clock.pass_seconds(1)
    for rank in (0, 2):
        clock.change(rank, is_waiting=1)
    assert clock.pass_seconds(60, ticking=False) is None
    assert clock.pass_seconds(1, ticking=False) == ([1], "has been stuck for 60 s in step 5", True)


def test_during_startup_a_rank_is_stuck_if_others_wait_for_it(clock):
    """But not while they also work, as long as that takes."""
    for rank in range(3):
        clock.change(rank, ticks=0)
    assert clock.pass_seconds(1000, ticking=False) is None
    for rank in (0, 1):
        clock.change(rank, is_waiting=1)
        assert clock.pass_seconds(80, ticking=False) is None
    assert clock.pass_seconds(12, ticking=False) == ([2], "has been stuck for 90 s in startup", True)


def test_a_suspended_judge_waits_for_the_others_again(clock):
    clock.pass_seconds(1)
    clock.now += 1000
    clock.judge.resume(clock.now)
    assert clock.judge.judge(clock.beats, clock.now) is None and not clock.judge.has_heard_others
    assert clock.pass_seconds(100) is None and clock.judge.has_heard_others


def test_a_rank_that_waits_for_rank_0_is_seen_by_its_other_threads():
    found = []

    class Store:
        def wait(self, keys: list[str], timeout: object) -> None:
            found.append(main_thread.waits_for_others())

        def get(self, key: str) -> bytes:
            return b""

    read_from_rank_0(Store(), "key", "rank 0", 60, 60)
    assert found == [True] and not main_thread.waits_for_others()


class Shared:
    """A store of this process, whose answers may take a while."""

    def __init__(self) -> None:
        self.store, self.delay_s = dist.HashStore(), 0.0

    def clone(self) -> Shared:
        return self

    def set_timeout(self, timeout: object) -> None: ...

    def set(self, key: str, value: str) -> None:
        self.store.set(key, value)

    def get(self, key: str) -> bytes:
        time.sleep(self.delay_s)
        return self.store.get(key)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        time.sleep(self.delay_s)
        return [self.store.get(key) for key in keys]


def test_all_ranks_name_the_one_that_died():
    """Rank 0 serves the store until the others have read its verdict."""
    store = Shared()
    for rank in range(3):
        heartbeats.write_first(store, rank)

    def fail(rank: int) -> str:
        with (
            Watchdog(rank, 3, 1.0, HOSTS, store) as watchdog,
            pytest.raises(RankLostError) as raised,
            watchdog.watching(),
        ):
            raise RuntimeError("connection closed by peer")
        return str(raised.value)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(fail, (0, 1)))
    assert found == ["rank 2 on c died during startup; the other ranks exit."] * 2


@pytest.mark.slow
def test_a_busy_store_does_not_mean_that_rank_0_died():
    """Its answers take longer than a dead rank's heartbeats may be missing."""
    store = Shared()
    for rank in range(2):
        heartbeats.write_first(store, rank)
    with Watchdog(1, 2, 5.0, HOSTS, store) as watchdog:
        store.delay_s = 4.5
        begun = time.monotonic()
        clear = threading.Timer(1.0, heartbeats.write_status, (store, Status(1, cleared=[1])))
        clear.start()
        assert watchdog.find_lost() is None
        assert time.monotonic() - begun > store.delay_s
        store.delay_s = 0.0
    clear.join()
