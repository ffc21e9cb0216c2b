"""Extractors that need no network, named ``tests.helpers.features:CLASS`` on command lines."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Averages(nn.Module):
    """Mean colors of a 4x4 grid: 48 features at any size."""

    num_features = 48

    def forward(self, images_BCHW: Tensor) -> Tensor:
        assert images_BCHW.dtype == torch.uint8
        return nn.functional.adaptive_avg_pool2d(images_BCHW.float() / 255, 4).flatten(1)


class Resized(Averages):
    """The same, but of images of 8x8 pixels."""

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
