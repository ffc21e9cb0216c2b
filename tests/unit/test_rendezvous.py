"""The rendezvous of many ranks, and its limits."""

from __future__ import annotations

import json
import resource

import pytest
import torch.distributed as dist

from diffmoe_ds.distributed import store
from diffmoe_ds.distributed.reports import Report, write_report
from diffmoe_ds.errors import LaunchError
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
    write_report(shared, 1, Report("node1", "", "", process=7))
    with pytest.raises(LaunchError, match="rank 1 on node2: process 7 on node1 has already joined as this rank"):
        write_report(shared, 1, Report("node2", "", "", process=8))
    assert json.loads(shared.get("rank/1"))["process"] == 7
