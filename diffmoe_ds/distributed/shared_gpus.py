"""Find ranks that were given the same GPU, before NCCL fails with a message that does not say so."""

from __future__ import annotations

import os
from collections.abc import Sequence

from diffmoe_ds.distributed.launch import Launch, local_device
from diffmoe_ds.errors import LaunchError


def gpu_of(launch: Launch) -> str:
    """Return what identifies this rank's GPU on its host; empty on a CPU, or if the driver does not tell."""
    import torch  # imported lazily so that typos fail fast

    device = local_device(launch)
    if device.type != "cuda":
        return ""
    identity = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return f"{identity} {visible}" if identity and "MIG" in visible else identity  # slices of a GPU may share its UUID


def check_gpus(hosts: Sequence[str], gpus: Sequence[str]) -> None:
    """Check that no two ranks share a GPU.

    Args:
        hosts: the host of every rank.
        gpus: `gpu_of` every rank.

    Raises:
        LaunchError: two of them do.
    """
    first: dict[tuple[str, str], int] = {}
    for rank, place in enumerate(zip(hosts, gpus, strict=True)):
        other = first.setdefault(place, rank)
        if place[1] and other != rank:
            raise LaunchError(
                f"ranks {other} and {rank} on {place[0]} share one GPU; start one process per GPU, and check "
                "LOCAL_RANK and CUDA_VISIBLE_DEVICES."
            )
