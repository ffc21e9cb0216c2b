"""Process-wide settings of torch that a run needs before its process group exists."""

from __future__ import annotations

import os

import torch

from diffmoe_ds.distributed.launch import cores_of_rank, local_device
from diffmoe_ds.training.plan import TrainPlan


def apply_device_settings(plan: TrainPlan) -> None:
    """Set up torch for a run. Call this before the process group and the model are created."""
    device = local_device(plan.launch)
    if device.type == "cuda" and plan.settings.offloads_optimizer:
        _use_cores(cores_of_rank(plan.launch))


def _use_cores(cores: int) -> None:
    """Let Adam on the CPU use the cores of this rank.

    Launchers set OMP_NUM_THREADS to 1, for ranks that leave the CPU idle; a larger value is the user's choice.
    """
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        os.environ["OMP_NUM_THREADS"] = str(cores)  # for operators of DeepSpeed with an OpenMP runtime of their own
        torch.set_num_threads(cores)
