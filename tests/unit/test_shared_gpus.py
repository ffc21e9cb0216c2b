"""Two ranks on one GPU are refused before NCCL is asked."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from diffmoe_ds.distributed import shared_gpus
from diffmoe_ds.distributed.launch import resolve_launch
from diffmoe_ds.errors import LaunchError


def test_ranks_that_share_a_gpu_are_named():
    shared_gpus.check_gpus(["a", "a", "b", "b"], ["1", "2", "1", "2"])
    shared_gpus.check_gpus(["a", "a"], ["", ""])
    with pytest.raises(LaunchError, match=r"ranks 1 and 2 on b share one GPU; start one process per GPU"):
        shared_gpus.check_gpus(["a", "b", "b"], ["1", "1", "1"])


@pytest.mark.parametrize(("visible", "expected"), (("0,1", "GPU-7"), ("MIG-3", "GPU-7 MIG-3")))
def test_what_identifies_a_gpu(monkeypatch, visible, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(shared_gpus, "local_device", lambda launch: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-7"))
    assert shared_gpus.gpu_of(resolve_launch()) == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_cpu_is_shared_by_all():
    assert shared_gpus.gpu_of(resolve_launch()) == ""
