"""Log files of a run.  On a full disk, rows are buffered in memory and TensorBoard events are dropped."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from diffmoe_ds.control_files import parse_json, read_lines
from diffmoe_ds.files import write_error, write_text


class JsonlLog:
    """``metrics.jsonl``: one strict JSON object per line.  Rows that cannot be written are buffered and retried."""

    def __init__(self, path: Path, step: int) -> None:
        """Open the file, dropping rows of an earlier attempt after ``step``, so that no step appears twice.

        Args:
            path: the file; created if it does not exist.
            step: the last step to keep.

        Raises:
            CheckpointError: the file cannot be written.
        """
        self._path = path
        self._waiting: list[str] = []
        self._warned = False
        try:
            if path.exists():
                write_text(path, "".join(f"{line}\n" for line in _lines_until(path, step)))
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise write_error(path, error) from None

    def add(self, row: dict[str, Any]) -> None:
        """Append a row."""
        self._waiting.append(json.dumps(row, allow_nan=False) + "\n")
        data = "".join(self._waiting).encode()
        end = self._file.tell()
        try:
            if self._file.write(data) < len(data):
                raise OSError("the disk is full")
        except OSError as error:
            self._file.truncate(end)  # a partial line would corrupt the next one
            self._file.seek(end)
            if not self._warned:
                print(f"*** WARNING: {self._path}: {error}; buffering rows in memory ***", file=sys.stderr, flush=True)
            self._warned = True
            return
        self._warned = False
        self._waiting.clear()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardLog:
    """TensorBoard writer that is reopened after a write error; events in between are dropped."""

    def __init__(self, directory: Path, images: int) -> None:
        """Open an event file; TensorBoard hides an earlier attempt's events after ``images``."""
        self._directory = directory
        self._purge: int | None = images + 1 if images else None
        self._writer: SummaryWriter | None = None
        self._open()

    def add_scalar(self, tag: str, value: float, images: int) -> None:
        """Write a scalar at an image count."""
        self._tell("add_scalar", tag, value, images)

    def add_histogram(self, tag: str, values: Tensor, images: int) -> None:
        """Write a histogram at an image count."""
        self._tell("add_histogram", tag, values, images)

    def add_text(self, tag: str, text: str, images: int) -> None:
        """Write text at an image count."""
        self._tell("add_text", tag, text, images)

    def add_image(self, tag: str, grid_HWC: Any, images: int) -> None:
        """Write a uint8 image at an image count."""
        self._tell("add_image", tag, grid_HWC, images, dataformats="HWC")

    def flush(self) -> None:
        """Write everything to disk; after a failure, try again with a new file."""
        if self._writer is None:
            self._open()
        else:
            self._tell("flush")

    def close(self) -> None:
        """Close the file."""
        self._tell("close")

    def _open(self) -> None:
        try:
            self._writer = SummaryWriter(str(self._directory), purge_step=self._purge)
            self._purge = None
        except OSError as error:
            self._warn(error)

    def _tell(self, method: str, *arguments: Any, **named: Any) -> None:
        if self._writer is None:
            return
        try:
            getattr(self._writer, method)(*arguments, **named)
        except OSError as error:
            self._warn(error)
            self._writer = None

    def _warn(self, error: OSError) -> None:
        print(f"*** WARNING: {self._directory}: {error}; dropping TensorBoard events ***", file=sys.stderr, flush=True)


def _lines_until(path: Path, step: int) -> list[str]:
    kept = []
    for text in read_lines(path):
        try:
            if parse_json(text)["step"] <= step:
                kept.append(text)
        except (ValueError, KeyError, TypeError):
            continue  # a line that a killed run left incomplete
    return kept
