"""Image grids as PNG files.

Legend: N images, H, W height and width, C channels.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

Pixels = npt.NDArray[Any]


def to_uint8(images_NCHW: Tensor) -> Pixels:
    """Convert pixels in [-1, 1] to uint8 [N, H, W, C]; values outside are clipped."""
    scaled = (images_NCHW.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def grid_columns(num_images: int, num_classes: int | None) -> int:
    """Return the number of columns: one per class if labels cycle over 2 to 16, otherwise for a nearly square grid.

    Args:
        num_images: number of images in the grid.
        num_classes: number of classes over which labels cycle; None if they do not cycle.
    """
    if num_classes is not None and 1 < num_classes <= 16:
        return num_classes
    return math.ceil(math.sqrt(num_images))


def make_grid(images_NHWC: Pixels, columns: int, border: int = 2) -> Pixels:
    """Arrange images in rows on a white background.

    Args:
        images_NHWC: uint8, one or three channels.
        columns: images per row.
        border: pixels between images.

    Returns:
        uint8 [height, width, 3].
    """
    count, height, width, channels = images_NHWC.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    grid = np.full((rows * (height + border) + border, columns * (width + border) + border, 3), 255, np.uint8)
    for index, image in enumerate(images_NHWC):
        top = border + index // columns * (height + border)
        left = border + index % columns * (width + border)
        grid[top : top + height, left : left + width] = image if channels == 3 else image[..., :1]
    return grid


def save_png(grid_HWC: Pixels, path: Path, min_width: int = 600) -> None:
    """Write a grid as PNG, enlarged by an integer factor without smoothing so that small images are visible.

    Args:
        grid_HWC: uint8 [height, width, 3].
        path: the file.
        min_width: width to reach, with the smallest possible factor.
    """
    picture = Image.fromarray(grid_HWC)
    scale = max(1, math.ceil(min_width / picture.width))
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(path)
