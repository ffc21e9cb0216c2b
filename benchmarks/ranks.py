"""Benchmarks on several ranks: start them on this machine, join them, count what they send."""

from __future__ import annotations

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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffmoe_ds.distributed.launch import local_device, resolve_launch
from diffmoe_ds.distributed.quiet import quiet_deepspeed
from diffmoe_ds.distributed.shutdown import shutdown
from diffmoe_ds.errors import ConfigError

SENT = {"alltoall_base_": 1, "_allgather_base_": 1, "allgather_": 1, "_reduce_scatter_base_": 1, "reduce_scatter_": 1}
"""Position of the input of the operators of ``torch.ops.c10d`` that take their output first."""
UNCOUNTED = ("barrier", "wait_tensor")


def is_rank() -> bool:
    """Return whether this process is a rank that `run_on_ranks` or a launcher started."""
    return "RANK" in os.environ


def run_on_ranks(module: str, arguments: Sequence[str], ranks: int, timeout_s: float) -> list[dict[str, Any]]:
    """Run a benchmark on ranks of this machine and return its cases.

    Args:
        module: the benchmark.
        arguments: its command line, without ``--json``.
        ranks: number of processes.
        timeout_s: seconds after which the processes are killed.

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
        if (problem := _wait(processes, time.monotonic() + timeout_s)) is not None:
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
            return "they did not finish in time."
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


class CountCollectives(TorchDispatchMode):
    """Counts the collectives of this rank and the bytes that it passes to them, by operator."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: dict[str, int] = {}
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator; count it if it communicates."""
        name = func._schema.name.rpartition("::")[2]
        if func.namespace in ("c10d", "_c10d_functional") and name not in UNCOUNTED:
            sent = args[SENT.get(name, 0)]
            size = sum(t.numel() * t.element_size() for t in tree_leaves(sent) if isinstance(t, torch.Tensor))
            self.calls[name] = self.calls.get(name, 0) + 1
            self.bytes[name] = self.bytes.get(name, 0) + size
        return func(*args, **(kwargs or {}))


def count_collectives(run: Callable[[], object]) -> dict[str, Any]:
    """Return the number of collectives of a call and the bytes of their inputs on this rank, also by operator."""
    counted = CountCollectives()
    with counted:
        run()
    by_operator = {name: {"calls": counted.calls[name], "bytes": counted.bytes[name]} for name in counted.calls}
    return {"collectives": sum(counted.calls.values()), "bytes": sum(counted.bytes.values()), "by": by_operator}
