"""Where the pieces of a checkpoint's tensors are, in 64 bytes per piece.

With ZeRO 3, every rank saves a piece of every tensor: over a million at 1,024 ranks. The kinds of a piece (master
weights, moments, averaged weights) share one row of numbers, and ranks exchange rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffmoe_ds.checkpoint.layout import BUFFER, KINDS, parse_key
from diffmoe_ds.checkpoint.tensor_file import Stored

NUMBER, START, NUMEL, FILE, OFFSETS = range(5)
"""Columns of a row: the tensor's number, first element, elements, the file's number, then the first byte in the file of
each of `KINDS`, -1 for those that are not stored."""
COLUMNS = OFFSETS + len(KINDS)
"""Columns of a row."""
ROW_BYTES = 8 * COLUMNS
"""Bytes of a row."""
FLOAT = 4
"""Bytes of an element."""

Rows = NDArray[np.int64]


class Run(NamedTuple):
    """Consecutive elements of a flattened tensor that are stored in one place."""

    start: int
    """First element."""
    numel: int
    """Elements."""
    file: int
    """Number of the file."""
    offset: int
    """First byte in the file."""


def rows_of(header: Mapping[str, Stored], file: int, shapes: Mapping[str, Sequence[int]]) -> Rows:
    """Return the rows of one file. Buffers, and tensors that ``shapes`` does not list, have none.

    Args:
        header: the file's tensors.
        file: the file's number.
        shapes: of the parameters; a tensor's number is its place here.

    Raises:
        ValueError: a tensor is not a fragment of one of these.
        OverflowError: a fragment starts beyond any tensor.
    """
    numbers = {name: number for number, name in enumerate(shapes)}
    numels = {name: math.prod(shape) for name, shape in shapes.items()}
    found: dict[tuple[int, int, int], list[int]] = {}
    for key, stored in header.items():
        kind, name, start = parse_key(key)
        if stored.dtype != "F32" or len(stored.shape) != 1:
            raise ValueError(f"{key!r} is {stored.dtype} {list(stored.shape)}, not flat F32")
        if kind in KINDS and name in numbers:
            if start + stored.shape[0] > numels[name]:
                raise ValueError(f"{key!r} ends beyond {name}")
            offsets = found.setdefault((numbers[name], start, stored.shape[0]), [-1] * len(KINDS))
            offsets[KINDS.index(kind)] = stored.offset
    table = [(*place, file, *offsets) for place, offsets in found.items()]
    return np.array(table, dtype=np.int64).reshape(-1, COLUMNS)


def buffers_of(header: Mapping[str, Stored], file: int) -> dict[str, Run]:
    """Return where the buffers of one file are, by name.

    Args:
        header: the file's tensors, all flat and fp32.
        file: the file's number.
    """
    found = {}
    for key, stored in header.items():
        if key.startswith(f"{BUFFER}/"):
            _, name, start = parse_key(key)
            found[name] = Run(start, stored.shape[0], file, stored.offset)
    return found


def merge_rows(rows: Iterable[Rows]) -> Rows:
    """Return rows as one table."""
    return np.concatenate([np.empty((0, COLUMNS), np.int64), *rows])


class PieceIndex:
    """The rows of all files, sorted for lookups."""

    def __init__(self, rows: Rows, tensors: int) -> None:
        """Sort the rows.

        Args:
            rows: of all files; see `rows_of`.
            tensors: how many tensors are numbered.
        """
        self._rows = rows[np.lexsort((rows[:, START], rows[:, NUMBER]))]
        self._bounds = np.searchsorted(self._rows[:, NUMBER], np.arange(tensors + 1))

    def kinds(self) -> list[str]:
        """Return which of `KINDS` are stored."""
        return [kind for column, kind in enumerate(KINDS, OFFSETS) if (self._rows[:, column] >= 0).any()]

    def runs(self, kind: str, number: int, start: int, numel: int) -> list[Run]:
        """Return where a range of a flattened tensor is stored, in order, up to the first gap.

        Args:
            kind: one of `KINDS`.
            number: of the tensor.
            start: first element.
            numel: elements.
        """
        column = OFFSETS + KINDS.index(kind)
        found = []
        filled, end = start, start + numel
        for row in self._overlapping(number, start, numel).tolist():
            low, high = max(filled, row[START]), min(end, row[START] + row[NUMEL])
            if row[column] >= 0 and low == filled < high:
                found.append(Run(low, high - low, row[FILE], row[column] + FLOAT * (low - row[START])))
                filled = high
        return found

    def _overlapping(self, number: int, start: int, numel: int) -> Rows:
        rows = self._rows[self._bounds[number] : self._bounds[number + 1]]
        return rows[(rows[:, START] < start + numel) & (rows[:, START] + rows[:, NUMEL] > start)]
