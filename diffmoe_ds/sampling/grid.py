"""Image grids as PNG files.

Legend: N images, H, W height and width, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Pixels = npt.NDArray[Any]
MIN_WIDTH = 600
"""Width in pixels that a grid is enlarged to, by the smallest integer factor and without smoothing."""
MAX_HEAD = 300
"""Most characters of a column head that are measured."""
FONT_SIZES = (18, 15, 12)
"""Sizes in pixels of the column heads, the largest first."""


def to_uint8(images_NCHW: Tensor) -> Pixels:
    """Convert pixels in [-1, 1] to uint8 [N, H, W, C]; values outside are clipped."""
    scaled = (images_NCHW.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def grid_columns(num_images: int, num_classes: int) -> int:
    """Return the number of columns: one per class if labels cycle over 2 to 16, otherwise for a nearly square grid.

    Args:
        num_images: number of images in the grid.
        num_classes: number of classes over which labels cycle; 0 if they do not cycle.
    """
    if 1 < num_classes <= 16:
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


def class_grid(images_NHWC: Pixels, classes: Sequence[int], names: Sequence[str] = ()) -> Pixels:
    """Draw a grid of images, enlarged so that small images are visible; columns of classes have a head.

    Args:
        images_NHWC: uint8, one or three channels.
        classes: the classes over which the images cycle; empty if they do not cycle.
        names: name of each label; heads without a name are labels.

    Returns:
        uint8 [height, width, 3].
    """
    columns = grid_columns(len(images_NHWC), len(classes))
    grid_HWC = make_grid(images_NHWC, columns)
    scale = max(1, math.ceil(MIN_WIDTH / grid_HWC.shape[1]))
    enlarged = grid_HWC.repeat(scale, 0).repeat(scale, 1)
    if len(classes) < 2 or columns != len(classes):
        return enlarged
    heads = [names[label] if label < len(names) else str(label) for label in classes[: len(images_NHWC)]]
    return np.concatenate([_heads(heads, enlarged.shape[1]), enlarged])


def _heads(heads: Sequence[str], width: int) -> Pixels:
    """Draw a line of text with one centered entry per column, in the largest font in which all of them fit."""
    column = width / len(heads)
    heads = [" ".join(head[:MAX_HEAD].split()) for head in heads]
    for size in FONT_SIZES:
        font = ImageFont.load_default(size)
        if max(font.getlength(head) for head in heads) <= column - size / 2:
            break
    line = Image.new("RGB", (width, 2 * size), "white")
    draw = ImageDraw.Draw(line)
    for index, head in enumerate(heads):
        while len(head) > 1 and font.getlength(head) > column - size / 2:
            head = head.rstrip("…")[:-1].rstrip() + "…"
        draw.text(((index + 0.5) * column, size), head, "black", font, anchor="mm")
    return np.asarray(line)


def save_png(picture_HWC: Pixels, path: Path) -> None:
    """Write a picture, uint8 [height, width, 3], as PNG."""
    Image.fromarray(picture_HWC).save(path, format="PNG")
