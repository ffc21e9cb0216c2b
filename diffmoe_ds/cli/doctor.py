"""``diffmoe doctor``: find host and cluster problems before a run does."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from diffmoe_ds.distributed.collectives import init_process_group
from diffmoe_ds.distributed.launch import local_device, resolve_launch
from diffmoe_ds.distributed.rendezvous import Rendezvous, join_ranks
from diffmoe_ds.doctor.facts import OPS, rank_facts
from diffmoe_ds.doctor.findings import to_fix
from diffmoe_ds.doctor.hosts import check_hosts, read_hostfile
from diffmoe_ds.doctor.probes import clock_offsets, gather_facts, shared_directory, timed_collectives
from diffmoe_ds.errors import ConfigError, LaunchError

MAX_TIMEOUT_S = 1e6
EXAMPLES = """examples:
  diffmoe doctor
  diffmoe doctor --hostfile /job/hostfile
  torchrun --nproc_per_node 8 -m diffmoe_ds.cli doctor --json
  deepspeed --num_nodes 4 --module diffmoe_ds.cli doctor
  srun --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 python -m diffmoe_ds.cli doctor --run-dir runs
"""


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``diffmoe doctor``."""
    add = parser.add_argument
    add(
        "--run-dir",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="where runs are written (default: %(default)s)",
    )
    add("--timeout", type=float, default=60.0, metavar="S", help="seconds to wait for a rank (default: %(default)g)")
    add("--json", action="store_true", help="print one JSON object instead of text")
    add(
        "--hostfile",
        type=Path,
        metavar="FILE",
        help="check the hosts in this file over ssh; needs no launcher",
    )
    add("--nodes", type=int, metavar="N", help="check only the first N hosts of the hostfile")
    add("--quiet", action="store_true", help="print only problems")


def doctor_command(args: argparse.Namespace) -> None:
    """Run ``diffmoe doctor``.

    Raises:
        ConfigError: an option is out of range.
        LaunchError: problems were found and printed.
    """
    if not 0 < args.timeout <= MAX_TIMEOUT_S:  # also refuses NaN
        raise ConfigError(f"--timeout must be positive and at most {MAX_TIMEOUT_S:g}, got {args.timeout:g}.")
    if args.hostfile is not None:
        _ask_hosts(args)
        return
    rendezvous = join_ranks(resolve_launch(), timeout_s=args.timeout)
    report = _examine(rendezvous, args)
    if report is None:
        return
    report["to_fix"] = to_fix(report)
    if args.json:
        print(json.dumps(report), flush=True)
    else:
        print(_text(report, quiet=args.quiet), flush=True)
    if report["to_fix"]:
        raise LaunchError(f"{len(report['to_fix'])} problem(s) found, see above.")


def _ask_hosts(args: argparse.Namespace) -> None:
    if args.nodes is not None and args.nodes < 1:
        raise ConfigError(f"--nodes must be positive, got {args.nodes}.")
    hosts = list(read_hostfile(args.hostfile))
    if args.nodes is not None and args.nodes > len(hosts):  # deepspeed would start on fewer
        raise ConfigError(f"--nodes must be at most {len(hosts)}, the hosts in {args.hostfile}, got {args.nodes}.")
    hosts = hosts[: args.nodes]
    found = check_hosts(hosts)
    if args.json:
        print(json.dumps({"hosts": hosts, "to_fix": found}))
    if found:
        raise LaunchError(" ".join(found))
    if not args.quiet and not args.json:
        print(f"{len(hosts)} host(s) are reachable and have the same software: {', '.join(hosts)}")


def _examine(rendezvous: Rendezvous, args: argparse.Namespace) -> dict[str, Any] | None:
    """Return the report on rank 0; None on the other ranks."""
    launch = rendezvous.launch
    facts = rank_facts(launch, args.run_dir)
    facts["shared"] = shared_directory(rendezvous, args.run_dir, args.timeout)
    ranks = gather_facts(rendezvous, "facts", facts, args.timeout)
    offsets = clock_offsets(rendezvous, args.timeout)
    failed = ""
    timed: dict[str, Any] = {}
    if launch.world > 1:
        try:
            timed = _collectives(rendezvous, args.timeout)
        except RuntimeError as error:  # gloo and NCCL raise many kinds of errors
            failed = f"rank {launch.rank} on {facts['host']}: {str(error).splitlines()[0][:200]}"
    every = gather_facts(rendezvous, "timed", [failed, timed], args.timeout)
    if ranks is None or every is None:
        return None
    return {
        "launch": launch.describe(),
        "world": launch.world,
        "meeting_point": launch.address,
        "hosts": {host: [r for r, name in enumerate(rendezvous.hosts) if name == host] for host in rendezvous.hosts},
        "clock_ahead_s": offsets,
        "collectives_failed": next((text for text, _ in every if text), ""),
        "all_reduce": timed.get("all_reduce"),
        "all_to_all": timed.get("all_to_all"),
        "sent_mb": {rank["host"]: found["sent_mb"] for rank, (_, found) in zip(ranks, every, strict=True) if found},
        "ranks": ranks,
    }


def _collectives(rendezvous: Rendezvous, timeout_s: float) -> dict[str, Any]:
    device = local_device(rendezvous.launch)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    init_process_group(backend, rendezvous.init_method(), timeout_s)
    return timed_collectives(device)


def _text(report: dict[str, Any], quiet: bool) -> str:
    """Return the report as text; it ends with what to fix."""
    lines: list[tuple[str, str]] = []
    if not quiet:
        first = report["ranks"][0]
        device, disk = first["device"], first["disk"]
        memory = f", {device['memory_gb']} GB" if "memory_gb" in device else ""
        lines += [
            ("launch", report["launch"]),
            ("versions", ", ".join(f"{name} {number}" for name, number in first["versions"].items())),
            ("python", first["python"]),
            ("device", f"{device['name']}{memory}; {first['cpus']} CPU core(s), {first['memory_free_gb']} GB free"),
        ]
        for host, members in report["hosts"].items():
            rank = report["ranks"][members[0]]
            sent = report["sent_mb"].get(host, {})
            carried = ", ".join(f"{name} sent {mb} MB" for name, mb in sorted(sent.items(), key=lambda x: -x[1]))
            ahead = f", clock {report['clock_ahead_s'][host] * 1000:+.1f} ms" if host in report["clock_ahead_s"] else ""
            span = f"rank {members[0]}" if len(members) == 1 else f"ranks {members[0]} to {members[-1]}"
            lines.append(("host", f"{host}: {span}; {rank['address']} on {rank['interface']}; {carried}{ahead}"))
        lines.append(
            ("disk", f"{disk['path']} ({disk['file_system']}): {disk['free_gb']:,} of {disk['total_gb']:,} GB free"),
        )
        for name in ("all_reduce", "all_to_all"):
            timed = report[name]
            if timed:
                text = f"{timed['mb']} MB per rank in {timed['ms']} ms, {timed['gb_per_s']} GB/s"
                lines.append((name.replace("_", "-"), text))
        lines += [("operator", f"{name}: {first['ops'][name]} (used {when})") for name, when in OPS.items()]
    lines += [("to fix", sentence) for sentence in report["to_fix"]]
    if not report["to_fix"]:
        lines.append(("to fix", "nothing"))
    return "\n".join(f"{name:>11}  {text}" for name, text in lines)
