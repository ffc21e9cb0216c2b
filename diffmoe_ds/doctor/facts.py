"""Facts about one rank and its host, as plain data that ranks can exchange."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from diffmoe_ds.distributed.deepspeed_seam import operator_state
from diffmoe_ds.distributed.launch import Launch

PACKAGES = ("diffmoe_ds", "torch", "deepspeed", "numpy", "mpi4py")
ENVIRONMENT = ("NCCL_", "GLOO_", "MASTER_", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TORCH_EXTENSIONS_DIR")
"""Prefixes of the variables that control how ranks communicate and compute."""
OPS: dict[str, str] = {
    "fused_adam": 'on a GPU with "torch_adam": false',
    "cpu_adam": 'with offload_optimizer and "torch_adam": false',
    "fused_lion": 'on a GPU with "type": "Lion"',
    "cpu_lion": 'with offload_optimizer and "type": "Lion"',
}
"""DeepSpeed's compiled operators that a configuration of this project can use, and when it uses them."""


def rank_facts(launch: Launch, directory: Path) -> dict[str, Any]:
    """Collect the facts that require no communication.

    Args:
        launch: this process's place among the ranks, with the rendezvous address.
        directory: where runs are or will be written.
    """
    address, interface = _towards(launch.master_addr or "127.0.0.1", launch.master_port or 1)
    return {
        "rank": launch.rank,
        "local_rank": launch.local_rank,
        "host": socket.gethostname(),
        "python": f"{platform.python_version()} {sys.executable}",
        "package": str(Path(__file__).resolve().parent.parent),
        "versions": _versions(),
        "device": _device(launch.local_rank),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_free_gb": round(psutil.virtual_memory().available / 1e9, 1),
        "shm_free_gb": _free_gb(Path("/dev/shm")),
        "address": address,
        "interface": interface,
        "own_name_is": _own_name(),
        "disk": _disk(directory),
        "ops": _operators(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(ENVIRONMENT)},
    }


def interface_bytes() -> dict[str, int]:
    """Return the bytes sent so far by each network interface of this host, including InfiniBand ports."""
    sent = {name: counters.bytes_sent for name, counters in psutil.net_io_counters(pernic=True).items()}
    for port in Path("/sys/class/infiniband").glob("*/ports/*"):
        try:
            words = int((port / "counters/port_xmit_data").read_text())
        except (OSError, ValueError):
            continue
        sent[f"{port.parent.parent.name}:{port.name}"] = 4 * words
    return sent


def existing(directory: Path) -> Path:
    """Return the directory, or its nearest existing parent."""
    path = directory.absolute()
    while not path.exists():
        path = path.parent
    return path


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    found["torch"] = torch.__version__
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _operators() -> dict[str, str]:
    """Return ``prebuilt``, ``compiled at first use``, or why an operator cannot be used, by operator."""
    tools = [tool for tool in ("ninja", "c++") if shutil.which(tool) is None]
    if torch.cuda.is_available() and shutil.which("nvcc") is None and "CUDA_HOME" not in os.environ:
        tools.append("nvcc")
    compiled = f"cannot be compiled: {', '.join(tools)} not found" if tools else "compiled at first use"
    texts = {"prebuilt": "prebuilt", "possible": compiled, "impossible": "not possible here"}
    return {name: texts[operator_state(name)] for name in OPS}


def _device(local_rank: int) -> dict[str, Any]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return {"kind": "cpu", "name": platform.machine(), "count": 0}
    index = min(local_rank, count - 1)
    properties = torch.cuda.get_device_properties(index)
    memory = round(properties.total_memory / 1e9, 1)
    return {"kind": "cuda", "name": properties.name, "memory_gb": memory, "count": count}


def _towards(host: str, port: int) -> tuple[str, str]:
    """Return the (address, interface) used to reach another host; sends nothing."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, port))
            address = probe.getsockname()[0]
    except OSError as error:
        return f"none ({error.strerror or error})", "none"
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return address, name
    return address, "unknown"


def _own_name() -> str:
    """Return the address that this host's name resolves to, where gloo listens by default."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "unknown"


def _free_gb(path: Path) -> float:
    return round(shutil.disk_usage(path).free / 1e9, 2) if path.exists() else 0.0


def _disk(directory: Path) -> dict[str, Any]:
    path = existing(directory)
    usage, status = shutil.disk_usage(path), os.statvfs(path)
    mounts = [p for p in psutil.disk_partitions(all=True) if path.is_relative_to(p.mountpoint)]
    mount = max(mounts, key=lambda p: len(p.mountpoint), default=None)
    return {
        "path": str(path),
        "file_system": mount.fstype if mount else "unknown",
        "free_gb": round(usage.free / 1e9, 2),
        "total_gb": round(usage.total / 1e9, 2),
        "free_files": status.f_favail if status.f_files else None,
        "writable": os.access(path, os.W_OK),
    }
