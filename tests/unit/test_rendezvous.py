"""The rendezvous of many ranks, and its limits."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from diffmoe_ds.distributed import agent_store, rendezvous, shutdown, store
from diffmoe_ds.distributed.launch import EXPORTED, Launch, export_launch
from diffmoe_ds.distributed.reports import Report, write_report
from diffmoe_ds.errors import DataError, LaunchError, RankLostError, TopologyError
from tests.helpers.processes import free_port, run_ranks


@pytest.mark.slow
def test_many_ranks_join_with_two_connections_each():
    """64 ranks in one process, whose soft limit of open files is too low for them."""
    finished = run_ranks(1, ["-m", "tests.distributed.workers.many_ranks", "64", str(free_port())], timeout=120)
    assert finished.code == 0, finished.output
    found = json.loads(finished.output.splitlines()[-1])
    assert 2 * 64 <= found["connections"] < 3 * 64  # torch may connect again if the server is slow
    assert found["limit_before"] < found["open_files"] < found["limit_after"]


@pytest.mark.long
def test_a_thousand_ranks_join_within_a_minute():
    finished = run_ranks(1, ["-m", "benchmarks.rendezvous", "--json"], timeout=300, PYTHONUNBUFFERED="1")
    assert finished.code == 0, finished.output
    found = json.loads(finished.output.splitlines()[-1])
    assert found["agreed"] < 60 and found["connections"] >= 2 * 1024, found


def test_too_few_open_files_are_an_error(monkeypatch):
    limits = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, values: limits.append(values))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    store.raise_file_limit(1000, 100)
    assert limits == []
    store.raise_file_limit(2560, 1024)
    assert limits == [(4096, 4096)]
    with pytest.raises(LaunchError, match="may open only 4096 files, but needs 8704 to serve 4096 ranks"):
        store.raise_file_limit(8704, 4096)


def test_a_second_process_of_a_rank_is_an_error():
    shared = dist.HashStore()
    write_report(shared, 1, Report("node1", "", "", process=7), 60)
    with pytest.raises(LaunchError, match="rank 1 on node2: process 7 on node1 has already joined as this rank"):
        write_report(shared, 1, Report("node2", "", "", process=8), 60)
    assert json.loads(shared.get("rank/1"))["process"] == 7


@pytest.fixture
def environment(monkeypatch):
    """The variables that a launch exports are restored."""
    for name in EXPORTED:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize("worlds", ((2, 2, 4), (2, 4), (3, 2, 3)))
def test_ranks_that_disagree_about_their_number_are_named(environment, worlds: Sequence[int]):
    """Rank 0 does not know of a rank beyond its own number, which would join, wait, and take rank 0 for dead."""
    port, odd = free_port(), next(rank for rank, world in enumerate(worlds) if world != worlds[0])
    launches = [Launch(rank, world, 0, 1, "test", "127.0.0.1", port) for rank, world in enumerate(worlds)]
    with ThreadPoolExecutor(len(worlds)) as pool:
        joining = [pool.submit(rendezvous.join_ranks, launch, "", 60) for launch in launches]
        errors = [future.exception() for future in joining]
    if odd >= worlds[0]:
        assert errors[:odd] == [None] * odd
    told = errors[odd if odd >= worlds[0] else 0]
    assert isinstance(told, LaunchError), errors
    start = f"rank {odd} on {socket.gethostname()} was started as one of {worlds[odd]} ranks, but rank 0"
    assert str(told).startswith(start) and f"as one of {worlds[0]};" in str(told)


def test_ranks_without_an_address_that_mpi_cannot_provide_are_an_error(environment, monkeypatch):
    """mpirun did not start them: for MPI, each is rank 0 of 1. An error of their own is more specific."""
    alone = SimpleNamespace(MPI=SimpleNamespace(COMM_WORLD=SimpleNamespace(rank=0, size=1)))
    monkeypatch.setitem(sys.modules, "mpi4py", alone)
    for rank in range(2):
        launch = Launch(rank, 2, 0, 1, "the variable RANK")
        with pytest.raises(TopologyError, match=f"rank {rank} of 2, but rank 0 of 1 for MPI.*set MASTER_ADDR"):
            export_launch(launch)
        with pytest.raises(DataError, match="no images"):
            rendezvous.fail_together(launch, DataError("no images"))


def test_a_process_whose_store_has_not_answered_exits_without_finalizing(monkeypatch):
    """If the call returned meanwhile, its thread would end inside C++, and the process with SIGABRT."""
    codes, answer = [], threading.Event()
    monkeypatch.setattr(shutdown, "leave", codes.append)
    with pytest.raises(TimeoutError):
        store.answer_within(0.01, answer.wait)
    shutdown.shutdown(1)
    answer.set()
    assert codes == [1]


def test_a_library_that_cannot_clean_up_does_not_change_the_exit_code(monkeypatch):
    def fail() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(shutdown, "_destroy_groups", fail)
    monkeypatch.setattr(shutdown, "leave", sys.exit)
    with pytest.raises(SystemExit, match=r"^5$"):
        shutdown.shutdown(5)
    with pytest.raises(OSError, match="Too many open files"):
        shutdown.shutdown(None)


def launch_of(rank: int, port: int) -> Launch:
    return Launch(rank, 3, 0, 1, "test", "127.0.0.1", port, "test")


@pytest.fixture
def deaf() -> Iterator[int]:
    """The port of a process that was frozen after it had begun to listen: the kernel accepts connections for it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_a_rank_0_that_is_frozen_before_the_others_connect_is_an_error(deaf, monkeypatch):
    """torch waits without limit for the first answer of a store."""
    message = f"rank 1 on .* cannot reach rank 0 at 127.0.0.1:{deaf} within 0.1 s"
    with pytest.raises(LaunchError, match=message):
        store.open_store(launch_of(1, deaf), 0.1)
    monkeypatch.setattr(agent_store, "CONNECT_S", 0.1)
    agent = dist.HashStore()
    agent.set(agent_store.ADDRESS, f"127.0.0.1 {deaf}")
    with pytest.raises(RuntimeError, match="rank 0 does not answer"):
        agent_store._find_rank_0(agent, 1, 0.1)


SERVE = """
import time, torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(300)
"""


READ = """
import sys, torch.distributed as dist
from diffmoe_ds.distributed.store import read_from_rank_0
store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False)
store.set("connected", "")
print(read_from_rank_0(store, "key", "rank 0", 2, 0.5).decode(), flush=True)
"""


def test_a_rank_that_was_suspended_during_startup_does_not_blame_rank_0():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    command = [sys.executable, "-c", READ, str(server.port)]
    waiting = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        server.wait(["connected"], timedelta(seconds=60))
        time.sleep(0.3)
        os.kill(waiting.pid, signal.SIGSTOP)
        time.sleep(3)
        os.kill(waiting.pid, signal.SIGCONT)
        time.sleep(0.2)
        server.set("key", "value")
        assert waiting.communicate(timeout=60)[0] == "value\n" and waiting.returncode == 0
    finally:
        waiting.kill()
        waiting.wait()


def test_a_rank_0_that_is_frozen_after_the_others_have_connected_is_named(monkeypatch):
    """Also by a rank that has not reported yet; and nobody waits for it before exiting with another error."""
    server = subprocess.Popen([sys.executable, "-c", SERVE], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        first = launch_of(1, int(server.stdout.readline()))
        stores = [store.open_store(first, 60) for _ in range(3)]
        os.kill(server.pid, signal.SIGSTOP)
        report, name = Report("node", "", "", 7), f"rank 0 at 127.0.0.1:{first.master_port} has not answered for"
        for rank, is_told in ((1, True), (2, False)):
            launch = launch_of(rank, first.master_port)
            with pytest.raises(RankLostError, match=rf"{name} [1-9][0-9]* s, since startup") as lost:
                rendezvous.exchange_reports(stores[rank], launch, report, 60, silence_s=1)
            assert lost.value.same_on_all_ranks != is_told
        monkeypatch.setattr(store, "LINGER_S", 0.2)
        store.let_others_read(stores[0], first)
    finally:
        server.kill()
        server.wait()
