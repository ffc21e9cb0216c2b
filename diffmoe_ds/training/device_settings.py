"""Process-wide settings of torch that a run needs before its process group exists."""

from __future__ import annotations

import os

import torch

from diffmoe_ds.distributed import flight_recorder
from diffmoe_ds.distributed.launch import cores_of_rank, local_device
from diffmoe_ds.precision import set_tf32
from diffmoe_ds.training.plan import TrainPlan


def apply_device_settings(plan: TrainPlan) -> None:
    """Set up torch for a run. Call this before the process group and the model are created."""
    if local_device(plan.launch).type != "cuda":
        return
    if plan.launch.world > 1:
        flight_recorder.enable(plan.directory / "flight_recorder", plan.launch.world)
    set_tf32(True)
    if plan.config.run.deterministic:
        _be_deterministic()
    if plan.settings.offloads_optimizer:
        _use_cores(cores_of_rank(plan.launch))


def _be_deterministic() -> None:
    """Let torch, cuBLAS and NCCL use algorithms that give the same bits in every run on the same layout."""
    torch.use_deterministic_algorithms(True)  # includes the backward passes of flash and memory-efficient attention
    torch.backends.cuda.enable_cudnn_sdp(False)  # torch does not run cuDNN's attention deterministically
    # off: a check for bugs that costs a kernel per buffer
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch requires it
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # sums inside NVLink switches need not be reproducible


def _use_cores(cores: int) -> None:
    """Let Adam on the CPU use the cores of this rank.

    Launchers set OMP_NUM_THREADS to 1, for ranks that leave the CPU idle; a larger value is the user's choice.
    """
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        os.environ["OMP_NUM_THREADS"] = str(cores)  # for operators of DeepSpeed with an OpenMP runtime of their own
        torch.set_num_threads(cores)
