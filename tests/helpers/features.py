"""For tests of ``diffmoe evaluate``: extractors without a network, named ``tests.helpers.features:CLASS``."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
from torch import Tensor, nn


def assert_same(found: dict[str, Any], expected: dict[str, Any], rel: float = 1e-9) -> None:
    """Compare two results of ``diffmoe evaluate --json``, up to rounding."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        exact = value is None or isinstance(value, str)
        assert found[name] == (value if exact else pytest.approx(value, rel=rel, abs=1e-12)), name


class Averages(nn.Module):
    """Mean colors of a 4x4 grid: 48 features at any size."""

    num_features = 48

    def forward(self, images_BCHW: Tensor) -> Tensor:
        assert images_BCHW.dtype == torch.uint8
        return nn.functional.adaptive_avg_pool2d(images_BCHW.float() / 255, 4).flatten(1)


class Resized(Averages):
    """The same, for images resized to 8x8 pixels."""

    input_img_size = (3, 8, 8)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        assert images_BCHW.shape[1:] == self.input_img_size
        return super().forward(images_BCHW)


class WrongShape(nn.Module):
    """Returns a feature map instead of features."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return images_BCHW.float()


class NotFinite(Averages):
    """Returns NaN."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return super().forward(images_BCHW) * torch.nan


class DiesOnRank1(Averages):
    """Kills its process if that is rank 1."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        if os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(images_BCHW)
