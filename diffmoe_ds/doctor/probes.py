"""Checks that need all ranks: shared disk, clock skew and network throughput.

Messages go through the rendezvous store, so that they arrive even if collectives fail.
"""

from __future__ import annotations

import json
import os
import secrets
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from diffmoe_ds.distributed.collectives import all_reduce, all_to_all, barrier, get_world_size
from diffmoe_ds.distributed.rendezvous import Rendezvous
from diffmoe_ds.doctor.facts import existing, interface_bytes
from diffmoe_ds.errors import AlreadyReportedError, LaunchError
from diffmoe_ds.files import remove_tree

SEEN_WITHIN_S = 5.0
"""Seconds within which a file written on one host must appear on the others; NFS caches directories."""
PINGS = 5
"""Round trips per clock measurement; the fastest is used."""
REPEATS = 5
"""Runs of each timed collective; the median is used."""
BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
"""Size of the timed tensors per rank."""


def gather_facts(rendezvous: Rendezvous, name: str, mine: Any, timeout_s: float) -> list[Any] | None:
    """Gather plain data of all ranks on rank 0; return None on the other ranks."""
    if rendezvous.store is None:
        return [mine]
    rendezvous.store.set(f"{name}/{rendezvous.launch.rank}", json.dumps(mine))
    if rendezvous.launch.rank:
        return None
    keys = {f"{name}/{rank}": rank for rank in range(rendezvous.launch.world)}
    return [json.loads(text) for text in _hear(rendezvous, keys, timeout_s)]


def _hear(rendezvous: Rendezvous, keys: dict[str, int], timeout_s: float) -> list[str]:
    """Return the values that ranks wrote under keys of the store.

    Args:
        rendezvous: the ranks.
        keys: the rank that writes each key.
        timeout_s: seconds that rank 0 waits; the others wait twice as long.

    Raises:
        LaunchError: a rank did not write its key in time.
        AlreadyReportedError: rank 0 is gone and has reported the reason.
    """
    store = rendezvous.store
    assert store is not None, "a single process has no store"
    patience = timeout_s if rendezvous.launch.rank == 0 else 2 * timeout_s  # rank 0 names who is silent
    try:
        store.wait(list(keys), timedelta(seconds=patience))
        return [store.get(key).decode() for key in keys]
    except RuntimeError:
        try:
            silent = [rank for key, rank in keys.items() if not store.check([key])]
        except RuntimeError:
            raise AlreadyReportedError(LaunchError.exit_code) from None
    names = ", ".join(f"rank {rank} on {rendezvous.hosts[rank]}" for rank in silent)
    raise LaunchError(
        f"{names}: no answer for {patience:g} s after the ranks joined; check those hosts for a hung file system or a "
        "dead process."
    )


def shared_directory(rendezvous: Rendezvous, directory: Path, timeout_s: float) -> dict[str, Any]:
    """Return whether this rank sees what rank 0 writes (``reads``), and rank 0 what this rank writes (``writes``)."""
    path, store, rank = existing(directory), rendezvous.store, rendezvous.launch.rank
    if store is None:
        return {"reads": True, "writes": path.is_dir() and os.access(path, os.W_OK)}
    if rank == 0:
        folder = path / f".diffmoe-doctor-{secrets.token_hex(4)}"
        _try(folder.mkdir)
        store.set("folder", str(folder))
    folder = Path(_hear(rendezvous, {"folder": 0}, timeout_s)[0])
    reads = _soon(folder.is_dir)
    writes = reads and _try(lambda: (folder / str(rank)).write_text(rendezvous.hosts[rank]))
    try:
        gather_facts(rendezvous, "written", writes, timeout_s)
        if rank == 0:
            others = range(1, rendezvous.launch.world)
            store.set("seen", json.dumps({r: _soon((folder / str(r)).is_file) for r in others} | {0: writes}))
    finally:
        if rank == 0:
            remove_tree(folder, ignore_errors=True)
    return {"reads": reads, "writes": json.loads(_hear(rendezvous, {"seen": 0}, timeout_s)[0])[str(rank)]}


def clock_offsets(rendezvous: Rendezvous, timeout_s: float) -> dict[str, float]:
    """Return the seconds by which each host's clock is ahead of rank 0's, on rank 0; empty on the other ranks."""
    store, rank = rendezvous.store, rendezvous.launch.rank
    first = {host: rendezvous.hosts.index(host) for host in dict.fromkeys(rendezvous.hosts)}
    offsets = {}
    for host, leader in first.items():
        if leader == 0 or rank not in (0, leader):
            continue
        assert store is not None, "several hosts imply a store"
        best = float("inf")
        for ping in range(PINGS):
            asked, answered = f"asked/{leader}/{ping}", f"answered/{leader}/{ping}"
            if rank == leader:
                _hear(rendezvous, {asked: 0}, timeout_s)
                store.set(answered, str(time.time()))
            else:
                begun, wall = time.perf_counter(), time.time()
                store.set(asked, "")
                theirs = float(_hear(rendezvous, {answered: leader}, timeout_s)[0])
                took = time.perf_counter() - begun
                if took < best:
                    best, offsets[host] = took, round(theirs - wall - took / 2, 6)
    return offsets


def timed_collectives(device: torch.device) -> dict[str, Any]:
    """Measure an all-reduce and an all-to-all over all ranks; needs the process group.

    Returns:
        ``all_reduce`` and ``all_to_all``, each with ``mb`` per rank, ``ms``, and ``gb_per_s``, the rate at which each
        rank sends (the bus bandwidth of nccl-tests); ``sent_mb``, by interface of this host while they ran.
    """
    world = get_world_size()
    numel = BYTES[device.type] // 4 // world * world
    data = torch.ones(numel, device=device)
    before = interface_bytes()
    result: dict[str, Any] = {}
    for name, run, share in (
        ("all_reduce", lambda: all_reduce(data, "max"), 2 * (world - 1) / world),
        ("all_to_all", lambda: all_to_all(data), (world - 1) / world),
    ):
        seconds = [_timed(run, device) for _ in range(REPEATS + 1)][1:]  # the first run connects
        median = statistics.median(seconds)
        result[name] = {
            "mb": round(4 * numel / 1e6, 1),
            "ms": round(1000 * median, 2),
            "gb_per_s": round(4 * numel * share / median / 1e9, 3),
        }
    sent = {name: (count - before.get(name, 0)) / 1e6 for name, count in interface_bytes().items()}
    return {**result, "sent_mb": {name: round(mb, 1) for name, mb in sent.items() if mb >= 0.1}}


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    barrier()
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def _soon(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + SEEN_WITHIN_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _try(action: Callable[[], Any]) -> bool:
    try:
        action()
        return True
    except OSError:
        return False
