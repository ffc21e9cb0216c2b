"""Benchmark of the rendezvous and the watchdog at the size of a cluster: thousands of real connections to one store.

Every rank is a thread with the connections of a real rank; rank 0, which serves the store, has a process of its own. On
one machine all of them share its cores, so that the times are upper bounds.

    python -m benchmarks.rendezvous --ranks 1024 --json
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from diffmoe_ds.cli import configure_torch, run_command
from diffmoe_ds.cli.arguments import require_positive
from diffmoe_ds.distributed.launch import Launch
from diffmoe_ds.errors import LaunchError

RANKS_PER_HOST = 8
TIMEOUT_S = 300.0
LOST_S = 60.0
"""Seconds after which the watchdog considers a rank as lost."""
READY = "ready"
"""What a process prints when it has imported everything."""


@dataclass(frozen=True)
class Times:
    """Seconds of one rank after the start."""

    joined: float
    """Until all ranks have joined."""
    agreed: float
    """Until all ranks have agreed on an error, of which there is none."""
    watched: float
    """Until the watchdog has connected and has watched for a while."""
    left: float
    """Until the watchdog has ended."""


def run_rank(rank: int, world: int, port: int, watch_s: float) -> Times:
    """Join the other ranks, agree, be watched for a while, and leave.

    Args:
        rank: this rank.
        world: number of ranks.
        port: of the rendezvous, on this machine.
        watch_s: seconds to be watched.
    """
    from diffmoe_ds.distributed.rendezvous import Rendezvous, exchange_reports
    from diffmoe_ds.distributed.reports import Report
    from diffmoe_ds.distributed.store import open_store
    from diffmoe_ds.distributed.watchdog import Watchdog

    start = time.monotonic()
    local = rank % RANKS_PER_HOST
    launch = Launch(rank, world, local, min(world, RANKS_PER_HOST), "a benchmark", "127.0.0.1", port)
    report = Report(f"host{rank // RANKS_PER_HOST:04d}", "the same configuration", f"GPU-{local}", rank)
    store = open_store(launch, TIMEOUT_S)
    error, hosts, _ = exchange_reports(store, launch, report, TIMEOUT_S, LOST_S)
    assert not error, "all reports are valid"
    joined = time.monotonic()
    rendezvous = Rendezvous(launch, hosts, store, TIMEOUT_S, LOST_S)
    rendezvous.raise_on_all_ranks("start", lambda: None)
    agreed = time.monotonic()
    with Watchdog(rank, world, LOST_S, hosts, store) as watchdog:
        with watchdog.watching():
            time.sleep(watch_s)
            rendezvous.raise_on_all_ranks("end", lambda: None)
            watched = time.monotonic()
        left = time.monotonic()
    return Times(joined - start, agreed - start, watched - start, left - start)


def run_ranks(ranks: range, world: int, port: int, watch_s: float) -> Times:
    """Run some of the ranks in threads of this process and return their longest times."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        found = list(pool.map(lambda rank: run_rank(rank, world, port, watch_s), ranks))
    columns = zip(*(asdict(times).values() for times in found), strict=True)
    return Times(*map(max, columns))


def count_connections(port: int) -> int:
    """Return the number of connections that this machine's processes have accepted on a port."""
    count = 0
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with open(table, encoding="utf-8") as lines:
            for line in list(lines)[1:]:
                address, state = line.split()[1], line.split()[3]
                count += address.endswith(f":{port:04X}") and state == "01"
    return count


def _member(args: argparse.Namespace) -> None:
    """Run in one of the processes; print the times and, on rank 0, the largest number of connections and files."""
    from diffmoe_ds.distributed import rendezvous, watchdog  # noqa: F401 - not measured

    first, last, port = args.member
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(args.soft_limit, soft), hard))
    print(READY, flush=True)
    sys.stdin.readline()
    result: dict[str, float] = {}
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_ranks, range(first, last), args.ranks, port, args.watch)
        while first == 0 and not running.done():
            time.sleep(0.5)
            result = {
                "connections": max(result.get("connections", 0), count_connections(port)),
                "open_files": max(result.get("open_files", 0), len(os.listdir("/proc/self/fd"))),
            }
        result |= asdict(running.result())
    print(json.dumps(result), flush=True)


def bench_rendezvous(args: argparse.Namespace) -> dict[str, float]:
    """Start the processes and return the longest times of any rank, and what rank 0 needed.

    Raises:
        LaunchError: a process failed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    bounds = [1 + (args.ranks - 1) * number // args.processes for number in range(args.processes + 1)]
    command = [sys.executable, "-m", "benchmarks.rendezvous", "--ranks", args.ranks, "--watch", args.watch]
    command += ["--soft-limit", args.soft_limit, "--member"]
    processes = [
        subprocess.Popen([*map(str, command), str(first), str(last), str(port)],
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for first, last in [(0, 1), *itertools.pairwise(bounds)] if last > first
    ]  # fmt: skip
    try:
        for process in processes:
            assert process.stdout is not None, "is a pipe"
            process.stdout.readline()
        for process in processes:
            assert process.stdin is not None, "is a pipe"
            process.stdin.write("go\n")
            process.stdin.flush()
        lines = [process.communicate(timeout=2 * TIMEOUT_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(process.returncode for process in processes):
        raise LaunchError(f"exit codes {[process.returncode for process in processes]}.")
    found = [json.loads(line) for line in lines]
    return {key: round(max(each.get(key, 0) for each in found), 3) for key in found[0]}


def main(args: argparse.Namespace) -> None:
    """Run the benchmark and print its result."""
    if args.member is not None:
        _member(args)
        return
    require_positive(args, "ranks", "processes")
    found = bench_rendezvous(args)
    print(json.dumps(found) if args.json else "\n".join(f"{key:>12}  {value:g}" for key, value in found.items()))


if __name__ == "__main__":
    configure_torch()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1024, help="number of ranks (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=4, help="for the ranks but rank 0 (default: %(default)s)")
    parser.add_argument("--watch", type=float, default=5.0, metavar="S", help="seconds to watch (default: %(default)s)")
    parser.add_argument(
        "--soft-limit", type=int, default=1024, metavar="N", help="soft limit of open files (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--member", type=int, nargs=3, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    parsed.run = main
    sys.exit(run_command(parsed))
