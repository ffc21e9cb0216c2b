"""Problems to fix, as pure functions of the report of `diffmoe doctor`."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

FREE_GB = 5.0
"""Minimum free disk space, enough for a few checkpoints."""
CLOCK_S = 1.0
"""Maximum clock skew in seconds; more scrambles the order of logs and TensorBoard files."""
SHM_GB = 0.5
"""Free shared memory that NCCL and data loader processes need."""


def to_fix(report: dict[str, Any]) -> list[str]:
    """Return one sentence for each problem, the most severe first; empty if there are none."""
    ranks = report["ranks"]
    return [
        *_differences(ranks),
        *_devices(ranks),
        *_directory(ranks),
        *_network(report),
        *_clocks(report),
        *_processors(ranks),
    ]


def _on(ranks: list[dict[str, Any]]) -> str:
    """Return the distinct hosts of some ranks as text."""
    hosts = list(dict.fromkeys(rank["host"] for rank in ranks))
    return ", ".join(hosts[:8]) + (f" and {len(hosts) - 8} more" if len(hosts) > 8 else "")


def _differences(ranks: list[dict[str, Any]]) -> list[str]:
    found = []
    for package, expected in ranks[0]["versions"].items():
        others = [rank for rank in ranks if rank["versions"].get(package) != expected]
        if others:
            theirs = others[0]["versions"].get(package, "missing")
            found.append(
                f"{_on(others)}: {package} is {theirs}, but {expected} on {ranks[0]['host']}; install the same version."
            )
    for key, what in (("python", "Python"), ("package", "the package folder")):
        others = [rank for rank in ranks if rank[key] != ranks[0][key]]
        if others:
            found.append(f"{_on(others)}: {what} is {others[0][key]}, but {ranks[0][key]} on {ranks[0]['host']}.")
    return found


def _devices(ranks: list[dict[str, Any]]) -> list[str]:
    found = []
    kinds = {rank["device"]["name"] for rank in ranks}
    if len(kinds) > 1:
        without = [rank for rank in ranks if rank["device"]["kind"] == "cpu"]
        if without and len(without) < len(ranks):
            found.append(f"{_on(without)}: no GPU visible, unlike on other hosts; check the driver.")
        else:
            found.append(f"different devices ({', '.join(sorted(kinds))}): the slowest device limits the speed.")
    crowded = [r for r in ranks if r["device"]["kind"] == "cuda" and r["local_rank"] >= r["device"]["count"]]
    if crowded:
        found.append(f"{_on(crowded)}: more ranks than the {crowded[0]['device']['count']} visible GPU(s).")
    small = [rank for rank in ranks if rank["shm_free_gb"] < SHM_GB]
    if small:
        found.append(f"{_on(small)}: only {small[0]['shm_free_gb']} GB free in /dev/shm (containers: --shm-size).")
    return found


def _directory(ranks: list[dict[str, Any]]) -> list[str]:
    found = []
    path = ranks[0]["disk"]["path"]
    blind = [rank for rank in ranks if not rank["shared"]["reads"]]
    if blind:
        found.append(f"{_on(blind)}: does not see {path} of {ranks[0]['host']}; runs need a shared file system.")
    silent = [rank for rank in ranks if rank["shared"]["reads"] and not rank["shared"]["writes"]]
    if silent:
        found.append(f"{_on(silent)}: cannot write to {path}; check permissions, quota and free space.")
    full = [rank for rank in ranks if rank["disk"]["free_gb"] < FREE_GB or rank["disk"]["free_files"] == 0]
    if full:
        disk = full[0]["disk"]
        left = "no free file entry" if disk["free_files"] == 0 else f"{disk['free_gb']} GB free"
        found.append(f"{_on(full)}: {left} in {disk['path']}; free up space for checkpoints.")
    return found


def _network(report: dict[str, Any]) -> list[str]:
    found = []
    ranks = report["ranks"]
    if len({rank["host"] for rank in ranks}) > 1:
        lost = [rank for rank in ranks if rank["interface"] == "none"]
        if lost:
            found.append(f"{_on(lost)}: no route to {report['meeting_point']}: {lost[0]['address']}.")
        loopback = [
            rank
            for rank in ranks
            if rank["own_name_is"].startswith("127.") and "GLOO_SOCKET_IFNAME" not in rank["environment"]
        ]
        if loopback:
            found.append(
                f"{_on(loopback)}: the host's name resolves to {loopback[0]['own_name_is']}, unreachable for others; "
                f"set GLOO_SOCKET_IFNAME={loopback[0]['interface']} or fix /etc/hosts."
            )
    if report["collectives_failed"]:
        found.append(f"collectives fail: {report['collectives_failed']}; check firewalls and *_SOCKET_IFNAME.")
    return found


def _clocks(report: dict[str, Any]) -> list[str]:
    apart = {host: offset for host, offset in report["clock_ahead_s"].items() if abs(offset) > CLOCK_S}
    hosts = ", ".join(f"{host} by {offset:+.1f} s" for host, offset in apart.items())
    return [f"clocks differ from {report['ranks'][0]['host']}'s: {hosts}; run a time service."] if apart else []


def _processors(ranks: list[dict[str, Any]]) -> list[str]:
    by_host = defaultdict(list)
    for rank in ranks:
        by_host[rank["host"]].append(rank)
    crowded = [
        rank
        for members in by_host.values()
        for rank in members[:1]
        if len(members) > 1 and rank["device"]["kind"] == "cpu" and "OMP_NUM_THREADS" not in rank["environment"]
    ]
    if crowded:
        return [f"{_on(crowded)}: every rank uses all {crowded[0]['cpus']} cores; set OMP_NUM_THREADS."]
    return []
