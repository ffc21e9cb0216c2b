"""``diffmoe doctor`` on several ranks, one of which is stuck."""

from __future__ import annotations

import socket
import sys

import pytest

from tests.helpers.processes import free_port, rank_environment, run_processes


@pytest.mark.slow
@pytest.mark.parametrize("stuck", (0, 1))
def test_rank_that_stops_answering_is_named(tmp_path, stuck):
    """As on a hung file system."""
    sleeper = (
        "import time; from diffmoe_ds.distributed.launch import resolve_launch; "
        "from diffmoe_ds.distributed.rendezvous import join_ranks; _ = join_ranks(resolve_launch()); time.sleep(20)"
    )
    port, commands = free_port(), []
    for rank in range(2):
        doctor = ["-m", "diffmoe_ds.cli", "doctor", "--run-dir", str(tmp_path), "--timeout", "4"]
        arguments = ["-c", sleeper] if rank == stuck else doctor
        commands.append(([sys.executable, *arguments], rank_environment(rank, 2, port)))
    finished = run_processes(commands, timeout=60)
    assert finished.code == 1 and "Traceback" not in finished.output, finished.output
    assert f"rank {stuck} on {socket.gethostname()}: no answer for {4 if stuck else 8} s" in finished.output
    assert list(tmp_path.iterdir()) == []
