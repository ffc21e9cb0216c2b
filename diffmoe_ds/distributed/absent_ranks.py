"""Name the ranks that have not joined, and the hosts from which none has joined."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist


def absent_ranks(store: dist.Store, keys: Sequence[str]) -> str:
    """Name the ranks that have not set their key, and the silent hosts as far as the launcher lists its hosts."""
    missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
    if not missing:
        return ""
    joined = [keys[rank] for rank in sorted(set(range(len(keys))) - set(missing))]
    hosts = {json.loads(text)["host"].partition(".")[0] for text in store.multi_get(joined)}
    silent = [host for host in expected_hosts() if host.partition(".")[0] not in hosts]
    where = f" (nothing from {', '.join(silent)})" if silent else ""
    ranks = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
    return f"rank(s) {ranks}{where} of {len(keys)}"


def expected_hosts() -> list[str]:
    """Return the hosts that the launcher was told to use; empty if unknown."""
    if "SLURM_STEP_NODELIST" in os.environ:
        command = ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()
        except (OSError, subprocess.SubprocessError):
            return []
    if "CROSS_SIZE" in os.environ:  # deepspeed's launcher is the parent process and has the list in its arguments
        try:
            arguments = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode().split("\0")
            encoded = next(text for text in arguments if text.startswith("--world_info="))
            return list(json.loads(base64.urlsafe_b64decode(encoded.partition("=")[2])))
        except (OSError, StopIteration, ValueError):
            return []
    return []
