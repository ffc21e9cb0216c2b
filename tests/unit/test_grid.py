"""Image grids: their shape."""

from __future__ import annotations

import pytest

from diffmoe_ds.sampling.grid import grid_columns


@pytest.mark.parametrize(
    ("images", "classes", "columns"), ((20, 10, 10), (12, 1, 4), (12, None, 4), (20, 17, 5), (9, 2, 2), (32, 16, 16))
)
def test_a_column_for_each_class_or_a_square(images, classes, columns):
    assert grid_columns(images, classes) == columns
