"""Read a checkpoint in any layout.  Only safetensors and JSON are read: nothing is unpickled."""

from __future__ import annotations

import gc
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from diffmoe_ds.checkpoint.architecture import first_difference
from diffmoe_ds.checkpoint.layout import BUFFER, META, rank_file
from diffmoe_ds.checkpoint.metadata import read_metadata
from diffmoe_ds.checkpoint.pieces import FLOAT, PieceIndex, Rows, Run, buffers_of, merge_rows, rows_of
from diffmoe_ds.checkpoint.tensor_file import TensorFile
from diffmoe_ds.config.deepspeed_keys import MOMENTS
from diffmoe_ds.config.fields import printable
from diffmoe_ds.config.schema import Config
from diffmoe_ds.errors import CheckpointError
from diffmoe_ds.files import Reading, allow_open_files, unwatched
from diffmoe_ds.model.dit import empty_model, saved_buffers
from diffmoe_ds.text import shortened
from diffmoe_ds.text_features import TextFormat

PROJECTOR = "repa_projector."
"""Prefix of the parameters that only a run with REPA has."""
CLASS_EMBEDDING = "y_embedder.embedding_table.weight"
"""The one parameter whose shape depends on the classes."""
LIMIT_PER_OPEN_FILE = 4
"""Files that the process must be allowed to open for every file of a checkpoint that is kept open."""


class WeightsReader(Protocol):
    """Source of a model's weights: a checkpoint or an exported model."""

    path: Path
    """Where the weights are, for messages."""
    config: Config
    """Configuration of the run that trained the model."""
    images: int
    """Number of images that the model was trained on; 0 if unknown."""
    class_names: tuple[str, ...] | None
    """Name of each label, if labels have names."""
    text: TextFormat | None
    """The encoders of a text model."""
    initial_share: float
    """Share of the initial weights in the averaged ones; 0 if unknown."""
    reading: Reading
    """Entered while a file is read; its value is called whenever more bytes are read."""

    def kinds(self) -> list[str]:
        """Return what is stored of each parameter: some of `layout.KINDS`, and `layout.BUFFER`."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the logical shape of a parameter.

        Raises:
            CheckpointError: the parameter does not exist.
        """

    def read(self, kind: str, name: str, start: int, numel: int, out: Tensor | None = None) -> Tensor:
        """Return the elements [start, start + numel) of a flattened logical tensor, fp32 on the CPU.

        Args:
            kind: one of `kinds`.
            name: the parameter.
            start: first element.
            numel: elements.
            out: where to put them, contiguous, fp32 and on the CPU; a new tensor if None.

        Raises:
            CheckpointError: the elements do not exist or cannot be read.
        """

    def runs(self, kind: str, name: str, start: int, numel: int) -> list[Run]:
        """Return where these elements are stored, in order.

        Raises:
            CheckpointError: some do not exist.
        """

    def read_run(self, name: str, run: Run, out: Tensor) -> None:
        """Fill a tensor with one of the runs of a parameter.

        Args:
            name: the parameter.
            run: from `runs`.
            out: of ``run.numel`` elements, otherwise as in `read`.

        Raises:
            CheckpointError: the elements cannot be read.
        """

    def close(self) -> None:
        """Close files that are open; reading afterwards opens them again."""


class CheckpointReader:
    """Random access to the tensors of a checkpoint (a `WeightsReader`).

    Constructing one reads ``meta.json``. The headers are read when they are needed first, and files are opened when
    something is read from them.
    """

    def __init__(self, path: Path) -> None:
        """Read the metadata.

        Args:
            path: the checkpoint's directory.

        Raises:
            CheckpointError: the metadata is missing, damaged or of another format.
        """
        self.path = path
        self._stamp = _stamp(path)
        self.metadata = read_metadata(path)
        self.config = self.metadata.config
        self.images = self.metadata.images
        self.class_names = self.metadata.class_names
        self.text = self.metadata.text
        self.initial_share = self.metadata.initial_share
        self._numbers = {name: number for number, name in enumerate(self.metadata.shapes)}
        self._index: PieceIndex | None = None
        self._buffers: dict[str, Run] = {}
        self._files: OrderedDict[int, TensorFile] = OrderedDict()  # the least recently used first
        self.reading: Reading = unwatched

    def is_current(self) -> bool:
        """Return whether the path still is the checkpoint that was opened, not another one of the same name."""
        return self._stamp is not None and self._stamp == _stamp(self.path)

    def scan(self, files: Iterable[int]) -> Rows:
        """Read the headers of some of the files, and return where their pieces are.

        Args:
            files: numbers of the files, below ``metadata.files``.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        with _collector_paused():
            return merge_rows(map(self._scan_file, files))

    def _scan_file(self, number: int) -> Rows:
        with self.reading():
            header = self._file(number).header()
        try:
            self._buffers.update(buffers_of(header, number))
            return rows_of(header, number, self.metadata.shapes)
        except (ValueError, OverflowError) as error:
            raise CheckpointError(f"{self.path / rank_file(number)}: cannot be read: {error}.") from None

    def set_index(self, rows: Rows) -> None:
        """Use rows of all files, of which this process has scanned only some."""
        self._index = PieceIndex(rows, len(self._numbers))

    def close(self) -> None:
        """Close the files and drop the index; reading afterwards opens them again."""
        while self._files:
            self._files.popitem()[1].close()
        self._index = None

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the logical shape of a parameter; see `WeightsReader.shape`."""
        if name not in self.metadata.shapes:
            raise CheckpointError(f"{self.path}: holds no tensor {name!r}; it is from a different model.")
        return self.metadata.shapes[name]

    def kinds(self) -> list[str]:
        """Return what is stored of each parameter; see `WeightsReader.kinds`."""
        return sorted([*self._all_pieces().kinds(), *([BUFFER] if self._buffers else [])])

    def buffers(self) -> dict[str, int]:
        """Return the number of elements of each buffer, by name."""
        self._all_pieces()
        return {name: run.numel for name, run in self._buffers.items()}

    def runs(self, kind: str, name: str, start: int, numel: int) -> list[Run]:
        """Return where a range of a flattened logical tensor is stored; see `WeightsReader.runs`."""
        index = self._all_pieces()
        if kind == BUFFER:
            stored = self._buffers.get(name)
            count = 0 if stored is None else min(numel, stored.numel - start)
            found = [] if stored is None else [Run(start, count, stored.file, stored.offset + FLOAT * start)]
        else:
            self.shape(name)
            found = index.runs(kind, self._numbers[name], start, numel)
        filled = sum(run.numel for run in found)
        if filled != numel:
            raise CheckpointError(f"{self.path}: holds {filled} of the {numel} elements requested of {kind} {name!r}.")
        return found

    def read(self, kind: str, name: str, start: int, numel: int, out: Tensor | None = None) -> Tensor:
        """Return a range of a flattened logical tensor; see `WeightsReader.read`."""
        runs = self.runs(kind, name, start, numel)  # first: more than is stored could not be allocated
        out = torch.empty(numel, dtype=torch.float32) if out is None else out
        for run in runs:
            self.read_run(name, run, out[run.start - start : run.start - start + run.numel])
        return out

    def read_run(self, name: str, run: Run, out: Tensor) -> None:
        """Fill a tensor with a run; see `WeightsReader.read_run`."""
        with self.reading() as progress:
            self._file(run.file).read(run.offset, out, progress)

    def _all_pieces(self) -> PieceIndex:
        if self._index is None:
            self.set_index(self.scan(range(self.metadata.files)))
        assert self._index is not None
        return self._index

    def _file(self, number: int) -> TensorFile:
        if number in self._files:
            self._files.move_to_end(number)
            return self._files[number]
        file = self._files[number] = TensorFile(self.path / rank_file(number))
        wanted = LIMIT_PER_OPEN_FILE * len(self._files)  # to keep all: each tensor of ZeRO 3 is in all files
        if allow_open_files(wanted) < wanted:
            self._files.popitem(last=False)[1].close()
        return file


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Do not search for reference cycles: headers have none, but so many objects that it would take half the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Return what tells the metadata of a checkpoint from that of another one with the same name, if it exists."""
    try:
        status = os.stat(path / META)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def best_kind(reader: WeightsReader) -> str:
    """Return the kind of the averaged weights if they are stored, otherwise that of the last weights."""
    return "ema" if "ema" in reader.kinds() else "fp32"


def check_same_model(reader: WeightsReader, config: Config, hint: str = "") -> None:
    """Check that weights belong to the model of a configuration.

    Args:
        reader: the weights.
        config: the configuration.
        hint: end of the error's sentence: what the user can do.

    Raises:
        CheckpointError: names the first key that differs, and both values.
    """
    different = first_difference(reader.config, config)
    if different is not None:
        key, old, new = different
        raise CheckpointError(
            f"{reader.path}: belongs to another model: {key} is {old!r} there and {new!r} here{hint}."
        )


def check_complete(reader: CheckpointReader) -> None:
    """Check that a checkpoint describes exactly the tensors of its model, before they are copied.

    Raises:
        CheckpointError: names the first one that is missing, unknown or of another shape.
    """
    model = empty_model(reader.config)
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    wanted |= {name: (buffer.numel(),) for name, buffer in saved_buffers(model).items()}
    found = reader.metadata.shapes | {name: (numel,) for name, numel in reader.buffers().items()}
    name = min((name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)), default=None)
    if name is not None:
        there = f"has the shape {shortened(str(found[name]))}" if name in found else "is missing"
        here = f"is {wanted[name]}" if name in wanted else "lacks it"
        raise CheckpointError(f"{reader.path}: {printable(name)} {there}, but the model of its configuration {here}.")


def check_same_moments(reader: CheckpointReader, optimizer: str) -> None:
    """Check that a run can continue with the moments of a checkpoint; those of Adam and AdamW are the same.

    Args:
        reader: the checkpoint.
        optimizer: type of the optimizer that wants them.

    Raises:
        CheckpointError: names both optimizers.
    """
    saved = reader.metadata.optimizer
    if MOMENTS[saved] != MOMENTS[optimizer]:
        raise CheckpointError(
            f"{reader.path}: has the moments of {saved}, but optimizer.type is {optimizer}; set {saved}, or start a "
            "new run from its weights with model.init_from."
        )
