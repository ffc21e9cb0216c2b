"""Captions of a dataset with text features as the labels of a text model.

Legend: P prompts, B images of a batch, N values of a row of text features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diffmoe_ds.data.reader import Dataset
from diffmoe_ds.errors import DataError


class DatasetPrompts:
    """The first captions of some images of a dataset, whose features are read when they are needed (a `Prompts`)."""

    def __init__(self, dataset: Dataset, indices: Sequence[int]) -> None:
        """Choose the images.

        Args:
            dataset: with text features.
            indices: of the images, in the order of the prompts.
        """
        assert dataset.text is not None, "checked by `with_text`"
        self._dataset = dataset
        self._indices = indices
        self._null_N = dataset.text.null_row

    def __len__(self) -> int:
        return len(self._indices)

    def captions(self) -> list[str]:
        """Return the prompts.

        Raises:
            DataError: one cannot be read.
        """
        return [self._first(index) for index in self._indices]

    def _first(self, index: int) -> str:
        captions = self._dataset.captions(index)
        if not captions:
            raise DataError(f"{self._dataset.describe(index)} has text features, but no caption")
        return captions[0]

    def rows(self, labels: list[int]) -> Tensor:
        """Return the text features of some prompts; the negative one is empty; see `Prompts`.

        Raises:
            DataError: one cannot be read.
        """
        rows = [self._row(label) for label in labels]
        return torch.from_numpy(np.stack(rows))

    def _row(self, label: int) -> np.ndarray:
        if label == len(self):
            return self._null_N
        row_N: np.ndarray = self._dataset.text_rows([self._indices[label]], [0.0])[0]
        return row_N


class RowPrompts:
    """Prompts whose features are in memory (a `Prompts`)."""

    def __init__(self, rows_PN: Tensor, null_N: Tensor) -> None:
        """Keep the features.

        Args:
            rows_PN: fp16 on the CPU.
            null_N: those of the empty prompt, which is the negative one.
        """
        self._rows = torch.cat([rows_PN, null_N[None]])

    def __len__(self) -> int:
        return len(self._rows) - 1

    def rows(self, labels: list[int]) -> Tensor:
        """Return the text features of some prompts; see `Prompts`."""
        return self._rows[labels]


def evenly_spaced(dataset: Dataset, count: int) -> DatasetPrompts:
    """Return the captions of at most ``count`` evenly spaced images of a dataset, which may be sorted."""
    return DatasetPrompts(dataset, spaced(len(dataset), count))


def spaced(images: int, count: int) -> list[int]:
    """Return the indices of at most ``count`` evenly spaced images."""
    count = min(count, images)
    return [number * images // count for number in range(count)]
