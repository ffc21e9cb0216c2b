"""For tests of ``diffmoe evaluate``: extractors without a network, named ``tests.helpers.features:CLASS``."""

from __future__ import annotations

import os
import signal
import sys
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


class Rectangle(Averages):
    """The same, for images resized to 4 by 12 pixels."""

    input_img_size = (3, 4, 12)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        assert images_BCHW.shape[1:] == self.input_img_size
        return super().forward(images_BCHW)


class NamedSize(Averages):
    """Has a size that is not a number."""

    input_img_size = "big"


class NoSize(Averages):
    """Has a size of 0."""

    input_img_size = (3, 0, 8)


class BoolSize(Averages):
    """Has a size that is a bool, which Python takes for an integer."""

    input_img_size = True


class NamedWidth(Averages):
    """Has a number of features that is not a number."""

    num_features = "3"


class Empty(nn.Module):
    """Returns no features."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return images_BCHW.flatten(1)[:, :0]


class Complex(nn.Module):
    """Returns complex numbers."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return images_BCHW[:, 0, 0, :5].to(torch.complex64)


class Varying(nn.Module):
    """Returns as many features as there are images."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return images_BCHW.flatten(1)[:, : len(images_BCHW)].float()


class VaryingOverRanks(nn.Module):
    """Returns more features on rank 1."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return images_BCHW.flatten(1)[:, : 3 + int(os.environ.get("RANK", "0"))].float()


class Huge(Averages):
    """Returns finite features, powers of which overflow."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return super().forward(images_BCHW) * 1e27


class Exits:
    """Ends the process successfully."""

    def __init__(self) -> None:
        sys.exit(0)


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
