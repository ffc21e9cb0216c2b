"""The files that a run appends to.  A full disk does not end the run: rows wait in memory, TensorBoard gets a gap."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from diffmoe_ds.files import write_error, write_text


class JsonlLog:
    """``metrics.jsonl``: one strict JSON object per line.  Rows that a full disk refuses are retried later."""

    def __init__(self, path: Path, step: int) -> None:
        """Open the file, dropping rows of an earlier attempt after ``step``, so that no step appears twice.

        Args:
            path: the file; created if it does not exist.
            step: the last step that counts.

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
                print(f"*** WARNING: {self._path}: {error}; rows wait in memory ***", file=sys.stderr, flush=True)
            self._warned = True
            return
        self._warned = False
        self._waiting.clear()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardLog:
    """TensorBoard's writer, reopened after a failure; what is written in between is lost, the run goes on."""

    def __init__(self, directory: Path, images: int) -> None:
        """Open an event file; events of an earlier attempt after ``images`` are hidden by TensorBoard."""
        self._directory = directory
        self._purge: int | None = images + 1 if images else None
        self._writer: SummaryWriter | None = None
        self._open()

    def add_scalar(self, tag: str, value: float, images: int) -> None:
        """A number at an image count."""
        self._tell("add_scalar", tag, value, images)

    def add_histogram(self, tag: str, values: Tensor, images: int) -> None:
        """The distribution of some numbers at an image count."""
        self._tell("add_histogram", tag, values, images)

    def add_text(self, tag: str, text: str, images: int) -> None:
        """A sentence at an image count."""
        self._tell("add_text", tag, text, images)

    def add_image(self, tag: str, grid_HWC: Any, images: int) -> None:
        """A uint8 picture at an image count."""
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
        print(f"*** WARNING: {self._directory}: {error}; TensorBoard has a gap ***", file=sys.stderr, flush=True)


def _lines_until(path: Path, step: int) -> list[str]:
    kept = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(text)["step"] <= step:
                kept.append(text)
        except (ValueError, KeyError, TypeError):
            continue  # a line that a killed run left incomplete
    return kept
