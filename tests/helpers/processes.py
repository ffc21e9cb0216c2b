"""Start processes that cannot outlive a test, and collect their exit codes and output."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
WORKERS = REPOSITORY / "tests" / "distributed" / "workers"
LAUNCH_TIMEOUT = 240
"""Seconds after which a launch counts as hung."""
GRACE = 10
"""Seconds that the other processes have to end after one has failed."""


@dataclass(frozen=True)
class Finished:
    """Outcome of a launch."""

    code: int
    """The first exit code that is not 0, negative for a signal, or 0; processes killed here do not count."""
    output: str
    """stdout and stderr of all processes."""


def free_port() -> int:
    """Return a TCP port that is free on the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def clean_environment(**extra: str) -> dict[str, str]:
    """Return this process's environment without any launcher's variables, with one thread per process."""
    prefixes = ("SLURM_", "OMPI_", "PMI", "TORCHELASTIC")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(prefixes) and k not in names}
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **extra}


def rank_environment(rank: int, world: int, port: int, **extra: str) -> dict[str, str]:
    """Return the environment of one rank of this machine, as torchrun would set it."""
    return clean_environment(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **extra,
    )  # fmt: skip


def first_failure(codes: Sequence[int]) -> int:
    """Return the first exit code that is not 0, or 0; a death by a signal (negative) is a failure."""
    return next((code for code in codes if code != 0), 0)


def run_processes(commands: list[tuple[list[str], dict[str, str]]], timeout: float = LAUNCH_TIMEOUT) -> Finished:
    """Run commands together until all have ended.

    When one fails the others have ``GRACE`` seconds left, and when time is up they have none; what still runs is
    killed, by process group.  A launch that is killed although no process has failed fails the test.

    Args:
        commands: arguments and environment of each process.
        timeout: seconds for the whole launch.
    """
    deadline = time.monotonic() + timeout
    # not pipes, which a process could fill and block on
    files = [tempfile.TemporaryFile("w+") for _ in commands]  # noqa: SIM115 - closed below
    processes = [
        subprocess.Popen(
            command, env=environment, cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        for (command, environment), file in zip(commands, files, strict=True)
    ]
    failed_since = None
    try:
        while any(p.poll() is None for p in processes):
            now = time.monotonic()
            if failed_since is None and any(p.poll() for p in processes):
                failed_since = now
            if now > deadline or (failed_since is not None and now > failed_since + GRACE):
                break
            time.sleep(0.02)
    finally:
        late = [p for p in processes if p.poll() is None]
        for process in late:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    outputs = []
    for file in files:
        with file:
            file.seek(0)
            outputs.append(file.read())
    text = "".join(outputs)
    code = first_failure([p.returncode for p in processes if p not in late])
    if late and code == 0:
        pytest.fail(f"hung for {timeout} s:\n{text[-5000:]}")
    return Finished(code, text)


def run_ranks(world: int, arguments: list[str], timeout: float = LAUNCH_TIMEOUT, **extra: str) -> Finished:
    """Run a Python script or module on ``world`` ranks of this machine; ``extra`` are environment variables."""
    port = free_port()
    environments = [rank_environment(rank, world, port, **extra) for rank in range(world)]
    return run_processes([([sys.executable, *arguments], environment) for environment in environments], timeout)
