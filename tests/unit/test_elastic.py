"""Elastic launches: the number of ranks that a run can use, a store per attempt, surplus ranks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from argparse import Namespace
from dataclasses import replace

import pytest
import torch.distributed as dist

from diffmoe_ds.cli import main, run_command
from diffmoe_ds.distributed import agent_store, elastic, rendezvous, signals, surplus
from diffmoe_ds.distributed import store as store_module
from diffmoe_ds.distributed.agent_store import ADDRESS, move_to_own_store
from diffmoe_ds.distributed.launch import AGENT_STORE, EXPORTED, Launch
from diffmoe_ds.distributed.store import open_store
from diffmoe_ds.errors import AlreadyReportedError, ConfigError, DataError, LaunchError
from tests.helpers.processes import clean_environment, free_port
from tests.helpers.training import training_arguments, write_json

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}  # fmt: skip


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Variables that the tests or the code set are removed afterwards; attempts to connect are short."""
    monkeypatch.setattr(agent_store, "CONNECT_S", 0.5)
    for name in ("PET_NNODES", "TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE", *EXPORTED):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def server(port: int = 0) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, multi_tenant=True)


def in_thread(action) -> tuple[threading.Thread, list]:
    """Run an action in a thread; the list gets its result or its exception."""
    results: list = []

    def run():
        try:
            results.append(action())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, results


@pytest.mark.parametrize(("nodes", "code"), (("1:4", 0), ("3", 2), ("3:3", 2)))
def test_a_run_takes_as_many_ranks_as_its_batch_allows(tmp_path, monkeypatch, capsys, nodes, code):
    """16 images do not divide among 3 ranks, which is an error unless the launch is elastic."""
    config = write_json(tmp_path / "ds.json", ep=1, zero=2)
    for name, value in {**TORCHRUN, "WORLD_SIZE": "3", "PET_NNODES": nodes}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", *training_arguments(config, tmp_path / "run", options=["--dry-run"])]) == code
    printed = capsys.readouterr()
    if code:
        assert "x ranks (3) = 15, got 16" in printed.err
    else:
        assert "2 of 3 ranks, the others wait (torchrun's RANK)" in printed.out


@pytest.mark.parametrize(("ranks", "expected"), ((8, 8), (7, 4), (3, 2), (1, 1)))
def test_the_largest_valid_number_of_ranks_is_used(monkeypatch, ranks, expected):
    monkeypatch.setattr(elastic, "is_elastic", lambda: True)

    def resolve(launch: Launch) -> int:
        if 16 % launch.world:
            raise ConfigError("batch")
        return launch.world

    launch, found = elastic.fit_ranks(Launch(ranks - 1, ranks, 0, 1, "torchrun's RANK"), resolve)
    assert (launch.world, found) == (expected, expected)
    assert launch.surplus == ranks - expected and launch.is_surplus == (expected < ranks)


def test_a_configuration_that_suits_no_number_of_ranks_is_the_error_for_all(monkeypatch):
    monkeypatch.setattr(elastic, "is_elastic", lambda: True)

    def resolve(launch: Launch) -> None:
        raise ConfigError(f"wrong on {launch.world}")

    with pytest.raises(ConfigError, match="wrong on 4"):
        elastic.fit_ranks(Launch(0, 4, 0, 1, "torchrun's RANK"), resolve)


@pytest.mark.parametrize(("world", "local_world"), ((16, 8), (20, 4), (6, 6), (8, 8), (15, 1)))
def test_ranks_per_host_are_equal_on_all_ranks(world, local_world):
    fewer = elastic.with_ranks(Launch(23, 24, 7, 8, "torchrun's RANK"), world)
    assert (fewer.world, fewer.local_world, fewer.surplus, fewer.is_surplus) == (world, local_world, 24 - world, True)


@pytest.mark.parametrize(
    ("words", "expected"),
    ((["--nnodes", "1:4"], True), (["--nnodes=2:8"], True), (["--nnodes=4"], False), (["--nnodes", "3:3"], False),
     (["x"], False)),
)  # fmt: skip
def test_the_range_of_nodes_is_read_from_the_agents_command_line(words, expected):
    """Also through a shell script in between."""
    child = "from diffmoe_ds.distributed.elastic import is_elastic; print(is_elastic())"
    agent = f"import subprocess, sys; subprocess.run(['sh', '-c', '$0 -c \"$1\"; true', sys.executable, {child!r}])"
    done = subprocess.run(
        [sys.executable, "-c", agent, *words], env=clean_environment(TORCHELASTIC_RUN_ID="x"), capture_output=True,
        text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == str(expected), done.stderr


@pytest.mark.slow
def test_ranks_find_the_store_of_their_own_attempt(monkeypatch):
    """torchrun's store still has the addresses of earlier attempts: one is gone, one still answers."""
    monkeypatch.setenv(AGENT_STORE, "True")
    agent, earlier = server(), server()
    earlier.add("found/1", 1)  # rank 1 of the earlier attempt was there
    launch = Launch(0, 2, 0, 1, "torchrun's RANK", "127.0.0.1", agent.port)
    for stale in (free_port(), earlier.port):
        agent.set(ADDRESS, f"127.0.0.1 {stale}")
        thread, found = in_thread(lambda: move_to_own_store(replace(launch, rank=1), 60))
        thread.join(1)
        assert not found, "it waits for rank 0"
        first = move_to_own_store(launch, 60)
        assert os.environ[AGENT_STORE] == "False", "torch's env:// uses rank 0's store, too"
        assert first.address not in (f"127.0.0.1:{stale}", launch.address)
        store = server(first.master_port)
        thread.join(60)
        assert found[0].address == first.address, found
        monkeypatch.setenv(AGENT_STORE, "True")
        del store


@pytest.mark.parametrize("port", (None, "", "x"))
def test_a_rank_without_rank_0_reports_it(monkeypatch, port):
    monkeypatch.setenv(AGENT_STORE, "True")
    agent = server()
    agent.set(ADDRESS, f"127.0.0.1 {free_port() if port is None else port}")
    launch = Launch(1, 2, 0, 1, "torchrun's RANK", "127.0.0.1", agent.port)
    with pytest.raises(LaunchError, match=r"rank 1 on \S+ cannot reach rank 0 through torchrun's store at 127.*within"):
        move_to_own_store(launch, 0.5)


SURPLUS = Launch(1, 1, 0, 1, "torchrun's RANK", "127.0.0.1", 1, surplus=1)


def test_a_surplus_rank_waits_until_the_run_is_complete(capsys):
    launch = replace(SURPLUS, rank=0, master_port=free_port())
    store = open_store(launch, 60)
    thread, result = in_thread(lambda: surplus.wait_for_run(replace(launch, rank=1), 60, 60))
    thread.join(1.5)
    assert not result
    surplus.release_surplus(launch, store, lambda: None)
    thread.join(60)
    assert result == [None] and store.add(surplus.SEEN, 0) == 1
    assert "waiting  rank 1, until the run ends" in capsys.readouterr().err


def test_rank_0_is_alive_while_it_waits_for_surplus_ranks_that_are_lost(monkeypatch):
    """Otherwise its watchdog ends a run that is complete, if `run.rank_timeout_s` is shorter than the wait."""
    monkeypatch.setattr(surplus, "LINGER_S", 1.0)
    launch, calls = replace(SURPLUS, rank=0, master_port=free_port()), []
    surplus.release_surplus(launch, open_store(launch, 60), lambda: calls.append(time.monotonic()))
    assert max(map(float.__sub__, calls[1:], calls)) < 0.9 and calls[-1] - calls[0] > 0.5


def test_an_error_of_rank_0_before_it_knows_of_surplus_ranks_is_reported_at_once(monkeypatch):
    """It waits for the reports of all ranks, of which the surplus ones do not take part in the run."""
    monkeypatch.setattr(rendezvous, "LINGER_S", 0.1)
    monkeypatch.setattr(store_module, "LINGER_S", 0.1)
    launch = replace(SURPLUS, rank=0, world=2, surplus=0, master_port=free_port())
    thread, result = in_thread(lambda: rendezvous.fail_together(launch, DataError("no images on this host")))
    _, waiting = in_thread(lambda: surplus.wait_for_run(replace(launch, rank=1, world=1, surplus=1), 60, 60))
    thread.join(30)
    assert not thread.is_alive() and isinstance(result[0], DataError), (result, waiting)


class Store:
    """A store whose server is gone: at once, or without a sign."""

    def __init__(self, silent: bool) -> None:
        self.silent = silent

    def compare_set(self, key, expected, value):
        return value.encode()

    def check(self, keys):
        if self.silent:
            time.sleep(600)
        raise dist.DistNetworkError("Connection was likely closed")


@pytest.mark.parametrize(
    ("silent", "message"),
    (
        (False, r"the run has ended before it was complete \(the store at 127.0.0.1:1 is closed\)"),
        (True, r"rank 0 at 127.0.0.1:1 has not answered for \d+ s"),
    ),
)
def test_surplus_ranks_exit_with_rank_0(monkeypatch, capsys, silent, message):
    """One of them reports it; it names rank 0 only if that is silent, because any rank may have ended the run."""
    monkeypatch.setattr(surplus, "open_store", lambda launch, timeout: Store(silent))
    for rank, reports in ((1, True), (2, False)):
        launch = replace(SURPLUS, rank=rank, surplus=2)
        args = Namespace(run=lambda _, launch=launch: surplus.wait_for_run(launch, 1, 0.5 if silent else 60))
        assert run_command(args) == 85
        printed = capsys.readouterr().err
        assert bool(re.search(f"diffmoe: error: {message}; the surplus ranks exit", printed)) == reports, printed


def test_a_surplus_rank_exits_when_torchrun_restarts_the_ranks(monkeypatch):
    monkeypatch.setattr(surplus, "open_store", lambda launch, timeout: Store(silent=True))
    monkeypatch.setattr(signals, "received", lambda: "SIGTERM")
    with pytest.raises(AlreadyReportedError) as raised:
        surplus.wait_for_run(SURPLUS, 1, 60)
    assert raised.value.exit_code == 85
