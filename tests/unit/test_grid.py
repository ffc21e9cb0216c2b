"""Image grids: their shape, and the heads of the columns."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import ImageFont

from diffmoe_ds.sampling.grid import (
    MAX_HEAD,
    MIN_PROMPT_WIDTH,
    PROMPT_LINE,
    PROMPT_LINES,
    class_grid,
    grid_columns,
    prompt_grid,
)


@pytest.mark.parametrize(
    ("images", "classes", "columns"), ((20, 10, 10), (12, 1, 4), (12, 0, 4), (20, 17, 5), (9, 2, 2), (32, 16, 16))
)
def test_a_column_for_each_class_or_a_square(images, classes, columns):
    assert grid_columns(images, classes) == columns


def black(count: int) -> np.ndarray:
    return np.zeros((count, 32, 32, 1), np.uint8)


def ink(picture_HWC: np.ndarray, columns: int) -> list[int]:
    """The dark pixels in the head of each column; an image starts where a column has a long dark line."""
    first = int(np.flatnonzero((picture_HWC[..., 0] == 0).mean(1) > 0.5)[0])
    return [int((part < 128).any(2).sum()) for part in np.array_split(picture_HWC[:first], columns, axis=1)]


def test_columns_of_classes_have_heads():
    """Names are inside their column; classes without a name have their label."""
    plain = class_grid(black(4), ())
    assert plain.shape == (9 * 70, 9 * 70, 3), "a square without heads, 600 pixels or more"
    named = class_grid(black(6), (0, 2, 1), ("cat", "i", "a rather large animal from the south of the north"))
    assert named.shape[1] == 6 * 104 and named.shape[0] > 6 * 70
    cat, animal, short = ink(named, 3)
    assert animal > cat > short > 0, "in the order of the classes"
    assert all(ink(class_grid(black(3), (0, 1, 2)), 3)), "labels"
    assert ink(class_grid(black(4), (0, 1), ("1", "")), 2)[1] == 0, "an empty name"


def test_long_names_end_with_an_ellipsis():
    long, cut = "wild boar of the Carpathian mountains, asleep" * 3, 100
    both = [class_grid(black(10), range(10), [name] * 10) for name in (long, long[:cut])]
    assert np.array_equal(*both), "what is beyond the column does not matter"
    assert all(ink(both[0], 10))
    edges = np.array_split(both[0][:18], 10, axis=1)
    assert all((part[:, 0] == 255).all() for part in edges), "names do not touch the next column"


@pytest.mark.parametrize(("count", "classes"), ((20, range(17)), (8, (3,)), (1, (3,)), (5, ())))
def test_other_grids_have_no_heads(count, classes):
    picture = class_grid(black(count), classes, ["name"] * 17)
    columns = grid_columns(count, len(classes))
    assert picture.shape[0] == picture.shape[1] * (-(-count // columns) * 34 + 2) // (columns * 34 + 2)


def bands(picture_HWC: np.ndarray) -> list[str]:
    """Return what is in a grid of black images from top to bottom: rows of images, and lines of text."""
    dark = (picture_HWC[..., 0] < 128).mean(1)
    kinds = ["images" if share > 0.45 else "text" if share else "" for share in dark]
    return [kind for kind, _ in itertools.groupby(kinds) if kind]


def test_prompts_are_beneath_their_images():
    """Each image has its own, unless prompts repeat in a cycle: then they stand beneath their columns."""
    each = prompt_grid(black(3), ["cat", "a long prompt of a red apple on the table of the house", ""])
    assert bands(each)[:2] == ["images", "text"] and bands(each)[-1] == "images", "the third prompt is empty"
    assert bands(each).count("text") > 1, "the second is wrapped"
    assert bands(prompt_grid(black(6), ["cat", "cow", "sea"] * 2)) == ["images", "images", "text"]
    assert bands(prompt_grid(black(3), ["cat"] * 3)) == ["images", "images", "text"]
    assert bands(prompt_grid(black(1), ["cat"])) == ["images", "text"]
    assert prompt_grid(black(40), [f"{n}" for n in range(40)]).shape[1] >= 7 * MIN_PROMPT_WIDTH


@pytest.mark.parametrize("prompt", ("word " * 500, "x" * 5000))
def test_long_prompts_are_cut_inside_their_column(prompt):
    picture = prompt_grid(black(2), [prompt, f"{prompt}!"])
    text_HW = picture[-PROMPT_LINE * PROMPT_LINES :, :, 0] < 128
    middle = picture.shape[1] // 2
    assert text_HW.any() and not text_HW[:, middle - 4 : middle + 4].any() and not text_HW[:, :4].any()
    assert len(picture) == len(prompt_grid(black(2), ["a", "b"])) + (PROMPT_LINES - 1) * PROMPT_LINE


def test_fewer_images_than_classes():
    assert class_grid(black(3), range(10), [str(label) for label in range(10)]).shape[1] == 6 * 104


def test_long_names_are_cut_before_they_are_measured(monkeypatch):
    measured = []
    monkeypatch.setattr(ImageFont.FreeTypeFont, "getlength", lambda self, text: measured.append(len(text)) or 10.0)
    class_grid(np.zeros((4, 8, 8, 1), np.uint8), (0, 1), ["x" * 100_000, "y"])
    assert max(measured) <= MAX_HEAD
