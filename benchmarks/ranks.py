"""Benchmarks on several ranks: start them on this machine, join them, measure, count what they send."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.compare import print_cases, progress
from diffmoe_ds.distributed.launch import local_device, resolve_launch
from diffmoe_ds.distributed.quiet import quiet_deepspeed
from diffmoe_ds.distributed.shutdown import shutdown
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.planning.counting import Counter

TIMEOUT_S = 900.0
"""Seconds after which the processes of a number of ranks are killed."""

Measure = Callable[[int, argparse.Namespace, int, int, torch.device], dict[str, Any]]
"""Returns a case of a report from T, the command line, the rank, the number of ranks and the device."""


def report_on_ranks(name: str, args: argparse.Namespace, measure: Measure, alone: torch.device | None = None) -> None:
    """Measure each of ``--tokens`` on each number of ``--ranks`` and print the report.

    A process that is a rank itself measures on the ranks that it was started with, and prints if it is the first.

    Args:
        name: the benchmark's module.
        args: its command line.
        measure: called on every rank.
        alone: the device on which this process measures a single rank, without a process group; if None, one rank is
            started like several.
    """
    cases = []
    if is_rank():
        with joined_ranks() as (rank, world, device):
            cases = [measure(tokens, args, rank, world, device) for tokens in args.tokens]
        if rank:
            return
    else:
        for ranks in args.ranks:
            progress(f"{name.rpartition('.')[2]}: {ranks} rank(s)")
            if ranks == 1 and alone is not None:
                cases += [measure(tokens, args, 0, 1, alone) for tokens in args.tokens]
            else:
                cases += run_on_ranks(name, args.argv, ranks)
    print_cases(name, args, cases)


def is_rank() -> bool:
    """Return whether this process is a rank that `run_on_ranks` or a launcher started."""
    return "RANK" in os.environ


def run_on_ranks(module: str, arguments: Sequence[str], ranks: int) -> list[dict[str, Any]]:
    """Run a benchmark on ranks of this machine and return its cases.

    Args:
        module: the benchmark.
        arguments: its command line, without ``--json``.
        ranks: number of processes.

    Raises:
        ConfigError: a rank failed or did not finish in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = str(max(1, torch.get_num_threads() // ranks))
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": threads,
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    with ExitStack() as stack, tempfile.TemporaryFile("w+") as output:
        processes = []
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            out = output if rank == 0 else subprocess.DEVNULL
            command = [sys.executable, "-m", module, *arguments, "--json"]
            processes.append(subprocess.Popen(command, env={**os.environ, **common, **own}, stdout=out))
            stack.callback(_kill, processes[-1])
        if (problem := _wait(processes, time.monotonic() + TIMEOUT_S)) is not None:
            raise ConfigError(f"{module} on {ranks} ranks: {problem}")
        output.seek(0)
        cases: list[dict[str, Any]] = json.loads(output.read().splitlines()[-1])["cases"]
        return cases


def _wait(processes: Sequence[subprocess.Popen[bytes]], deadline: float) -> str | None:
    """Wait until all processes have succeeded; return what went wrong."""
    while (codes := [process.poll() for process in processes]) != [0] * len(processes):
        failed = next((code for code in codes if code), None)
        if failed is not None:
            return f"rank {codes.index(failed)} failed with exit code {failed}."
        if time.monotonic() > deadline:
            return f"the processes did not finish within {TIMEOUT_S:.0f} s."
        time.sleep(0.05)
    return None


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()


@contextmanager
def joined_ranks() -> Iterator[tuple[int, int, torch.device]]:
    """Join the ranks, over NCCL if each has a GPU and over gloo otherwise; yield rank, number of ranks and device."""
    launch = resolve_launch()
    quiet_deepspeed()  # and torch's warnings about names of collectives
    has_gpu = torch.cuda.device_count() >= launch.local_world
    device = local_device(launch) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if has_gpu else "gloo")
    try:
        yield launch.rank, launch.world, device
    finally:
        shutdown()


def count_collectives(run: Callable[[], object]) -> dict[str, Any]:
    """Return the number and bytes of the collectives of a call on this rank, in total and by collective.

    Bytes are those of `diffmoe plan`: what a rank passes to a collective; of an all-gather, what it gets.
    """
    with Counter() as counter:
        run()
    traffic = counter.collectives
    return {
        "collectives": sum(found.calls for found in traffic.values()),
        "bytes": sum(found.bytes for found in traffic.values()),
        "by": {kind: {"calls": found.calls, "bytes": found.bytes} for kind, found in traffic.items()},
    }
