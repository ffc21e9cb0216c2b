"""Settings of the process on a GPU, without one: TF32, determinism, CPU cores for an offloaded optimizer."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from diffmoe_ds.distributed import flight_recorder
from diffmoe_ds.distributed.launch import Launch, cores_of_rank
from diffmoe_ds.training import device_settings

TORCHRUN = Launch(0, 16, 0, 8, "torchrun's RANK")
SRUN = Launch(0, 16, 0, 8, "srun's SLURM_PROCID")


@pytest.fixture(autouse=True)
def recorded_in(monkeypatch) -> list[Path]:
    """The folders of NCCL's flight recorder."""
    folders: list[Path] = []
    monkeypatch.setattr(flight_recorder, "enable", lambda folder, world: folders.append(folder))
    return folders


def plan(offloads_optimizer: bool = False, deterministic: bool = False) -> SimpleNamespace:
    run = SimpleNamespace(deterministic=deterministic)
    settings = SimpleNamespace(offloads_optimizer=offloads_optimizer)
    directory = Path("run")
    return SimpleNamespace(launch=TORCHRUN, directory=directory, settings=settings, config=SimpleNamespace(run=run))


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
    device_settings.apply_device_settings(plan(offloads_optimizer=offloads))
    assert set_to == ([] if threads is None else [threads])
    assert os.environ.get("OMP_NUM_THREADS") == (before if threads is None else str(threads))


@pytest.mark.parametrize(("device", "tf32"), (("cuda", [True]), ("cpu", [])))
def test_training_on_a_gpu_uses_tf32_and_records_collectives(monkeypatch, recorded_in, device, tf32):
    found = []
    monkeypatch.setattr(device_settings, "local_device", lambda launch: torch.device(device))
    monkeypatch.setattr(device_settings, "set_tf32", found.append)
    device_settings.apply_device_settings(plan())
    assert recorded_in == [Path("run/flight_recorder")] * len(tf32)
    assert found == tf32 and not torch.are_deterministic_algorithms_enabled()


@pytest.fixture
def settings_of_torch(monkeypatch):
    """Restores what `run.deterministic` changes."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_NVLS_ENABLE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.usefixtures("settings_of_torch")
def test_deterministic_runs_on_a_gpu(monkeypatch):
    monkeypatch.setattr(device_settings, "local_device", lambda launch: torch.device("cuda"))
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    device_settings.apply_device_settings(plan(deterministic=True))
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["NCCL_NVLS_ENABLE"] == "1", "the user's choice is kept"
    assert not torch.backends.cuda.cudnn_sdp_enabled()
