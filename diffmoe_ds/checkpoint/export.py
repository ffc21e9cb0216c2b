"""Write and read exported models: ``model.safetensors`` with a ``config.json`` beside it.

The tensors have the names of our ``state_dict`` (experts stacked, [E, ...]), thresholds included.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from diffmoe_ds.checkpoint.description import Description, read_description
from diffmoe_ds.checkpoint.layout import BUFFER, MANIFEST
from diffmoe_ds.checkpoint.load import CheckpointReader, WeightsReader, check_complete
from diffmoe_ds.checkpoint.metadata import MAX_INT
from diffmoe_ds.checkpoint.pieces import Run
from diffmoe_ds.checkpoint.stream import Entry, write_safetensors
from diffmoe_ds.checkpoint.tensor_file import DTYPES, TensorFile
from diffmoe_ds.checkpoint.verify import newest_valid
from diffmoe_ds.config.fields import short_repr
from diffmoe_ds.control_files import read_json
from diffmoe_ds.errors import CheckpointError
from diffmoe_ds.files import Reading, sha256_of, unwatched, write_json
from diffmoe_ds.model.dit import empty_model
from diffmoe_ds.outputs import write_together

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
WEIGHTS = {"ema": "ema", "raw": "fp32"}
"""What users call the averaged and the last weights, and their kind in a checkpoint."""
LARGE_SHARE = 0.1
"""Averaged weights that contain more of the initial ones than this are worth a warning."""
PIECE_NUMEL = 4 << 20
"""Elements held in memory while a file is written."""


class ModelFileReader:
    """Random access to the tensors of an exported model (a `WeightsReader`)."""

    def __init__(self, directory: Path) -> None:
        """Read the configuration and the header, but no weights.

        Args:
            directory: of the two files.

        Raises:
            CheckpointError: a file is missing or damaged, or the two describe different models.
        """
        self.path = directory / WEIGHTS_FILE
        config = directory / CONFIG_FILE
        self.weights, self.images, self.initial_share, description = _read_description(config)
        self.config, self.class_names, self.text = description
        self.reading: Reading = unwatched
        self._file: TensorFile | None = None
        self._tensors = self._open().header()
        self.close()
        for name, stored in self._tensors.items():
            if stored.dtype not in DTYPES:
                valid = ", ".join(DTYPES)
                raise CheckpointError(f"{self.path}: {name!r} is of type {stored.dtype}; valid: {valid}.")
        self._check_tensors(config)

    def _check_tensors(self, source: Path) -> None:
        """Check that the file holds exactly the tensors of the model that ``config.json`` describes."""
        blocks = len({name.split(".")[1] for name in self._tensors if name.startswith("blocks.")})
        if self.config.size.depth != blocks:
            depth = self.config.size.depth
            raise CheckpointError(f"{source}: depth is {depth}, but {self.path} holds {blocks} block(s).")
        model = empty_model(self.config).state_dict()
        for name in sorted(model.keys() | self._tensors.keys()):
            if name not in model:
                raise CheckpointError(f"{self.path}: holds {name!r}, which the model of {source} lacks.")
            if self.shape(name) != model[name].shape:
                wanted = tuple(model[name].shape)
                raise CheckpointError(
                    f"{self.path}: {name!r} has shape {self.shape(name)}, but {source} describes {wanted}."
                )

    def kinds(self) -> list[str]:
        """Return what is stored of each parameter; see `WeightsReader.kinds`."""
        return [WEIGHTS[self.weights], BUFFER]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter; see `WeightsReader.shape`."""
        if name not in self._tensors:
            raise CheckpointError(f"{self.path}: holds no tensor {name!r}; it does not match its config.")
        return self._tensors[name].shape

    def read(self, kind: str, name: str, start: int, numel: int, out: Tensor | None = None) -> Tensor:
        """Return a range of a flattened tensor; see `WeightsReader.read`."""
        (run,) = self.runs(kind, name, start, numel)
        out = torch.empty(numel, dtype=torch.float32) if out is None else out
        self.read_run(name, run, out)
        return out

    def read_run(self, name: str, run: Run, out: Tensor) -> None:
        """Fill a tensor with a run; see `WeightsReader.read_run`."""
        dtype = DTYPES[self._tensors[name].dtype]
        found = out if dtype == out.dtype else torch.empty(run.numel, dtype=dtype)
        with self.reading() as progress:
            self._open().read(run.offset, found, progress)
        if found is not out:
            out.copy_(found)

    def runs(self, kind: str, name: str, start: int, numel: int) -> list[Run]:
        """Return where a range of a flattened tensor is stored; see `WeightsReader.runs`."""
        if kind not in (BUFFER, WEIGHTS[self.weights]):
            raise CheckpointError(f"{self.path}: holds only {self.weights} weights; use --weights {self.weights}.")
        total = torch.Size(self.shape(name)).numel()
        if start + numel > total:
            raise CheckpointError(f"{self.path}: {name!r} has {total} elements, fewer than the model's.")
        stored = self._tensors[name]
        return [Run(start, numel, 0, stored.offset + start * DTYPES[stored.dtype].itemsize)]

    def close(self) -> None:
        """Close the file; see `WeightsReader.close`."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> TensorFile:
        if self._file is None:
            self._file = TensorFile(self.path)
        return self._file


def _read_description(path: Path) -> tuple[str, int, float, Description]:
    """Return (weights, images, share of initial weights, description of the model) of ``config.json``."""
    try:
        tree = read_json(path)
        weights, images, _ = tree["weights"], tree["images"], tree["config"]
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path}: is not the description of an exported model.") from None
    if weights not in tuple(WEIGHTS):  # not the dictionary: JSON may hold unhashable values
        raise CheckpointError(f"{path}: weights is {short_repr(weights)}; valid: {', '.join(WEIGHTS)}.")
    if type(images) is not int or not 0 <= images <= MAX_INT:
        raise CheckpointError(f"{path}: images must be a non-negative integer, got {short_repr(images)}.")
    share = tree.get("initial_share", 0.0)
    if type(share) not in (int, float) or not 0 <= share <= 1:
        raise CheckpointError(f"{path}: initial_share must be a number from 0 to 1, got {short_repr(share)}.")
    return weights, images, share, read_description(tree, str(path))


def open_weights(path: Path) -> WeightsReader | None:
    """Open anything that a user may call a model, fully verified.

    Args:
        path: an exported ``.safetensors`` file or its directory, a checkpoint, or a run directory.

    Returns:
        The reader, or None if the path is none of these.

    Raises:
        CheckpointError: it is one of these and cannot be read.
    """
    if path.suffix == ".safetensors" and os.path.isfile(path):
        if path.name != WEIGHTS_FILE:
            raise CheckpointError(f"{path}: a model is a {WEIGHTS_FILE} with a {CONFIG_FILE} beside it.")
        return ModelFileReader(path.parent)
    if os.path.isfile(path / WEIGHTS_FILE):
        return ModelFileReader(path)
    found = newest_valid(path, full=True)
    return None if found is None else CheckpointReader(found)


def require_weights(path: Path, what: str = "") -> WeightsReader:
    """Open anything that a user may call a model, as `open_weights` does.

    Args:
        path: the path.
        what: the key or the option that names it, for the message.

    Raises:
        CheckpointError: the path is none of these, or the model cannot be read.
    """
    reader = open_weights(path)
    if reader is None:
        raise CheckpointError(f"{what} {path}: {not_a_model(path)}.".lstrip())
    return reader


def not_a_model(path: Path) -> str:
    """Return why a path is refused where a model is expected, and how to use what it may be instead."""
    hint = ""
    if path.suffix in (".pt", ".pth", ".ckpt"):
        hint = "; `diffmoe checkpoint import-official` converts checkpoints of the reference code"
    elif any((folder / "model_index.json").is_file() for folder in (path, path.parent)):
        hint = "; it belongs to a diffusers pipeline, which DiffusionPipeline.from_pretrained loads"
    return f"not a checkpoint, run directory or exported model{hint}"


def digest_of(reader: WeightsReader) -> str:
    """Return a hexadecimal SHA-256 that identifies the contents of a checkpoint or an exported model.

    Raises:
        CheckpointError: a file cannot be read.
    """
    if not os.path.isfile(reader.path):
        return _sha256_of(reader.path / MANIFEST)  # lists the digests of all files
    both = _sha256_of(reader.path) + _sha256_of(reader.path.with_name(CONFIG_FILE))
    return hashlib.sha256(both.encode()).hexdigest()


def _sha256_of(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from None


def initial_weights_warning(reader: WeightsReader, weights: str) -> str | None:
    """Return a sentence if a model's averaged weights still contain too much of the initial ones.

    Args:
        reader: the model.
        weights: those to be used, ``ema`` or ``raw``.
    """
    if weights != "ema" or reader.initial_share <= LARGE_SHARE:
        return None
    return (
        f"the averaged weights still contain {reader.initial_share:.0%} of the initial weights, because ema.decay is "
        f"{reader.config.ema.decay:g}; train longer, or use the last weights (--weights raw)"
    )


def check_no_model(out: Path) -> None:
    """Check that a directory holds no exported model, which a new one would replace.

    Raises:
        CheckpointError: it does.
    """
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        if os.path.lexists(out / name):
            raise CheckpointError(f"--out {out}: already holds {name}; pass a new folder.")


def export(reader: CheckpointReader, weights: str, out: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a checkpoint's model into one file, holding one piece of one tensor at a time; needs no process group.

    Args:
        reader: the checkpoint.
        weights: ``ema`` or ``raw``.
        out: directory of the two files; created if it does not exist.
        dtype: type of the weights in the file; thresholds stay fp32.

    Returns:
        The file with the weights.

    Raises:
        CheckpointError: the checkpoint is incomplete, or the files cannot be written.
    """

    def pieces(kind: str, name: str, numel: int, dtype: torch.dtype) -> Iterator[Tensor]:
        for start in range(0, numel, PIECE_NUMEL):
            count = min(PIECE_NUMEL, numel - start)
            yield reader.read(kind, name, start, count).to(dtype)
            bar.update(count)

    check_complete(reader)
    entries = []
    for name, shape in reader.metadata.shapes.items():
        numel = torch.Size(shape).numel()
        entries.append(Entry(name, shape, dtype, pieces(WEIGHTS[weights], name, numel, dtype)))
    for name, numel in reader.buffers().items():
        entries.append(Entry(name, (numel,), torch.float32, pieces(BUFFER, name, numel, torch.float32)))
    total = sum(torch.Size(entry.shape).numel() for entry in entries)
    with tqdm(total=total, unit=" weights", unit_scale=True, desc="export") as bar:
        saved = reader.metadata
        share = saved.initial_share if weights == "ema" else 0.0
        described = Description(saved.config, saved.class_names, saved.text)
        return write_model(out, entries, described, weights, saved.images, share)


def write_model(
    out: Path,
    entries: Sequence[Entry],
    model: Description,
    weights: str,
    images: int,
    initial_share: float = 0.0,
) -> Path:
    """Write ``model.safetensors`` and ``config.json``; both appear when they are complete.

    Args:
        out: their directory; created if it does not exist.
        entries: the tensors.
        model: the model.
        weights: ``ema`` or ``raw``.
        images: images that the model was trained on.
        initial_share: share of the initial weights in averaged ones.

    Returns:
        The file with the weights.

    Raises:
        CheckpointError: they cannot be written; existing files are unchanged.
    """
    description = {"weights": weights, "images": images, **model.to_json()}
    if initial_share:
        description["initial_share"] = initial_share
    written = write_together(
        out,
        {
            CONFIG_FILE: lambda path: write_json(path, description),
            WEIGHTS_FILE: lambda path: write_safetensors(path, entries, {"format": "pt"}),
        },
    )
    return written[-1]
