"""Settings of the process: CPU cores for an offloaded optimizer."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from diffmoe_ds.distributed.launch import Launch, cores_of_rank
from diffmoe_ds.training import device_settings

TORCHRUN = Launch(0, 16, 0, 8, "torchrun's RANK")
SRUN = Launch(0, 16, 0, 8, "srun's SLURM_PROCID")


@pytest.mark.parametrize(
    ("launch", "visible", "environ", "cores"),
    (
        (TORCHRUN, 96, {}, 12),
        (TORCHRUN, 96, {"SLURM_CPUS_PER_TASK": "96"}, 12),  # torchrun in a task that has the whole node
        (TORCHRUN, 4, {}, 1),
        (SRUN, 12, {"SLURM_CPUS_PER_TASK": "12"}, 12),  # bound to its own cores
        (SRUN, 96, {"SLURM_CPUS_PER_TASK": "12"}, 12),  # not bound
        (SRUN, 96, {}, 12),
        (SRUN, 2, {"SLURM_CPUS_PER_TASK": "12"}, 2),
    ),
)
def test_cores_of_a_rank(monkeypatch, launch, visible, environ, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(visible)), raising=False)
    assert cores_of_rank(launch, environ) == cores


@pytest.mark.parametrize(
    ("device", "offloads", "before", "threads"),
    (
        ("cuda", True, None, 12),
        ("cuda", True, "1", 12),  # set by a launcher
        ("cuda", True, "4", None),  # set by the user
        ("cuda", False, "1", None),
        ("cpu", True, "1", None),  # the ranks compute on the CPU themselves
    ),
)
def test_an_offloaded_optimizer_uses_the_cores_of_its_rank(monkeypatch, device, offloads, before, threads):
    set_to = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(96)), raising=False)
    monkeypatch.setattr(device_settings, "local_device", lambda launch: torch.device(device))
    monkeypatch.setenv("OMP_NUM_THREADS", before or "")
    if before is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    settings = SimpleNamespace(offloads_optimizer=offloads)
    device_settings.apply_device_settings(SimpleNamespace(launch=TORCHRUN, settings=settings))
    assert set_to == ([] if threads is None else [threads])
    assert os.environ.get("OMP_NUM_THREADS") == (before if threads is None else str(threads))
