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
MAX_COLUMNS = 16
"""Most classes or prompts that have a column each."""
MIN_PROMPT_WIDTH = 150
"""Width in pixels that an image with a prompt beneath it is enlarged to."""
PROMPT_FONT, PROMPT_LINE, PROMPT_LINES = 15, 19, 6
"""Of prompts: size of the font and height of a line in pixels, and most lines."""


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
    if 1 < num_classes <= MAX_COLUMNS:
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


def prompt_grid(images_NHWC: Pixels, prompts_N: Sequence[str]) -> Pixels:
    """Draw a grid of enlarged images with their prompts beneath them.

    Prompts that repeat in a cycle have one column each and are written beneath it; a single one, beneath the grid.

    Args:
        images_NHWC: uint8, one or three channels.
        prompts_N: prompt of each image.

    Returns:
        uint8 [height, width, 3].
    """
    count, _, width, _ = images_NHWC.shape
    distinct = list(dict.fromkeys(prompts_N))
    cycle = all(prompt == distinct[image % len(distinct)] for image, prompt in enumerate(prompts_N))
    is_column_each = cycle and len(distinct) < count and len(distinct) <= MAX_COLUMNS
    columns = grid_columns(count, len(distinct) if is_column_each else 0)
    scale = max(math.ceil(MIN_WIDTH / (columns * (width + 2) + 2)), math.ceil(MIN_PROMPT_WIDTH / (width + 2)))
    empty = -count % columns
    blank = np.full((empty, *images_NHWC.shape[1:]), 255, np.uint8)
    images_NHWC, prompts_N = np.concatenate([images_NHWC, blank]), [*prompts_N, *[""] * empty]
    parts = []
    for start in range(0, len(images_NHWC), columns):
        row = make_grid(images_NHWC[start : start + columns], columns).repeat(scale, 0).repeat(scale, 1)
        parts.append(row)
        if not is_column_each:
            parts.append(_captions(prompts_N[start : start + columns], row.shape[1]))
    if is_column_each:
        parts.append(_captions(distinct, parts[0].shape[1]))
    return np.concatenate(parts)


def _captions(prompts: Sequence[str], width: int) -> Pixels:
    """Draw prompts side by side, each wrapped and centered in its column."""
    font, column = ImageFont.load_default(PROMPT_FONT), width / len(prompts)
    wrapped = [_wrap(prompt, font, column - PROMPT_FONT) for prompt in prompts]
    picture = Image.new("RGB", (width, PROMPT_LINE * max(map(len, wrapped)) + PROMPT_LINE // 2), "white")
    draw = ImageDraw.Draw(picture)
    for index, lines in enumerate(wrapped):
        for number, line in enumerate(lines):
            draw.text(((index + 0.5) * column, PROMPT_LINE * (number + 0.5)), line, "black", font, anchor="mm")
    return np.asarray(picture)


def _wrap(prompt: str, font: Any, width: float) -> list[str]:
    """Split a prompt into at most `PROMPT_LINES` lines that are not wider than a number of pixels.

    Words that are too wide for a line are split; a prompt that is too long ends with an ellipsis.
    """
    words = prompt[: MAX_HEAD + 1].split()
    lines = [""]
    for word in words:
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") > width:
            lines.append("")
        elif lines[-1]:
            lines[-1] += " "
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) > PROMPT_LINES or len(prompt) > MAX_HEAD:
        lines = lines[:PROMPT_LINES]
        while lines[-1] and font.getlength(lines[-1] + "…") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] = lines[-1].rstrip() + "…"
    return lines


def save_png(picture_HWC: Pixels, path: Path) -> None:
    """Write a picture, uint8 [height, width, 3], as PNG."""
    Image.fromarray(picture_HWC).save(path, format="PNG")
