"""Read weight files of the reference implementation, and check what is in them."""

from __future__ import annotations

import argparse
import io
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from diffmoe_ds.control_files import open_regular
from diffmoe_ds.errors import CheckpointError

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Types that weights may have."""
MAX_PICKLE_BYTES = 16 << 20
"""Limit of the pickles in a file, which are everything but the numbers of the tensors."""
MAX_OPERATIONS = 1 << 19
"""Most operations in the pickles, of which a tensor takes about 32."""
LEGACY_PICKLES = 5
"""Pickles in a file of torch before 1.6: magic number, protocol, system, contents and keys of the storages."""
KEYS = {
    "ema": "ema", "ema_model": "ema", "ema_model_state_dict": "ema",
    "model": "raw", "state_dict": "raw", "model_state_dict": "raw",
}  # fmt: skip
"""Keys of a file under which weights can be, and which weights those are; the first one is taken."""


PATCHES = "x_embedder.proj.weight"
"""Name of the weights that embed patches."""


def read_reference(path: Path, weights: str | None = None) -> tuple[dict[str, Tensor], str]:
    """Read the weights in a ``.pt`` file of the reference without executing anything in it.

    Args:
        path: a file of ``torch.save``: the weights, or a dictionary with them under ``ema`` or ``model``.
        weights: ``ema`` or ``raw``; None is ``ema`` if the file holds both.

    Returns:
        The weights, and whether they are ``ema`` or ``raw``. Those at the top level are what `weights` says, or raw.

    Raises:
        CheckpointError: the file cannot be read, or holds no weights, or anything but plain data and tensors.
    """
    try:
        check_pickles(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # the reference stores its arguments as one
            # Files of torch before 1.6 are not zip archives and cannot be memory-mapped.
            tree = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from None
    except RefusedFileError as error:
        raise CheckpointError(f"{path}: {error}, so it was not loaded.") from None
    except Exception as error:  # the type depends on the defect
        # torch's own message advises loading the file without this protection
        refused = re.search(r"\bGLOBAL ([\w.]+)", str(error))
        found = f"holds {refused[1]}, which is neither a tensor nor plain data" if refused else "is not a tensor file"
        raise CheckpointError(f"{path}: {found}, so it was not loaded.") from None
    keys = [key for key, kind in KEYS.items() if weights in (kind, None)]
    found = weights or "raw"
    for key in keys:
        if isinstance(tree, dict) and isinstance(tree.get(key), dict):
            tree, found = tree[key], KEYS[key]
            break
    if not isinstance(tree, dict) or not all(isinstance(value, Tensor) for value in tree.values()) or not tree:
        raise CheckpointError(f"{path}: holds no weights under {', '.join(keys)} or at its top level.")
    names = {name: str(name).removeprefix("module.").removeprefix("_orig_mod.") for name in tree}
    return {names[name]: value for name, value in tree.items()}, found


class RefusedFileError(Exception):
    """A file that torch must not load; the message continues a sentence that begins with the file."""


def check_pickles(path: Path) -> None:
    """Check, without unpickling, that torch unpickles a file in little time and memory.

    Raises:
        RefusedFileError: it does not, or records are compressed, which torch would map as the numbers themselves.
        OSError: the file cannot be read, or is not a regular file.
        ValueError, zipfile.BadZipFile: it is damaged.
    """
    with open_regular(path) as file:  # torch would wait for a named pipe
        pickles = _pickles_of_zip(file) if zipfile.is_zipfile(file) else _pickles_of_legacy(file)
    operations = (operation for data in pickles for operation in pickletools.genops(data))
    for number, (operation, argument, _) in enumerate(operations):
        if number == MAX_OPERATIONS:
            raise RefusedFileError(f"has more than {MAX_OPERATIONS:,} operations besides its tensors")
        if operation.name == "GLOBAL" and str(argument).endswith(" bytearray"):  # of whatever size the file says
            raise RefusedFileError("holds bytearray, which is neither a tensor nor plain data")


def _pickles_of_zip(file: BinaryIO) -> list[io.BytesIO]:
    with zipfile.ZipFile(file) as archive:
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise RefusedFileError("has compressed records, unlike files of torch.save")
        records = [record for record in archive.infolist() if record.filename.lower().endswith("data.pkl")]
        if any(record.file_size > MAX_PICKLE_BYTES for record in records):
            raise RefusedFileError(f"has more than {MAX_PICKLE_BYTES >> 20} MiB besides its tensors")
        return [io.BytesIO(archive.read(record)) for record in records]


def _pickles_of_legacy(file: BinaryIO) -> list[io.BytesIO]:
    file.seek(0)
    return [io.BytesIO(file.read(MAX_PICKLE_BYTES))] * LEGACY_PICKLES  # one after the other, then the numbers


def check_plain(name: str, value: Any) -> None:
    """Check that a tensor can be a weight: dense, real, floating-point and fully stored.

    Raises:
        CheckpointError: it cannot.
    """
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{name!r} is a {type(value).__name__}, but a state_dict holds tensors by name.")
    plain = value.layout == torch.strided and not value.is_nested and value.dtype in DTYPES and not value.is_meta
    # An expanded tensor takes one element on disk and could demand any amount of memory.
    if not plain or value.numel() * value.itemsize > value.untyped_storage().nbytes():
        kind = f"{value.dtype} {value.layout} on {value.device}".replace("torch.", "")
        raise CheckpointError(f"{name!r} is {kind}, but a weight is a dense tensor of floating-point numbers.")


def shape_of(state: dict[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    """Return the shape of a weight.

    Args:
        state: the weights.
        name: that of the weight.
        dimensions: the number of dimensions that it must have.

    Raises:
        CheckpointError: it is missing, has another number of dimensions, or is empty.
    """
    if name not in state:
        raise CheckpointError(f"not weights of the reference: {name!r} is missing.")
    check_plain(name, state[name])
    shape = tuple(state[name].shape)
    if len(shape) != dimensions or 0 in shape:
        raise CheckpointError(f"{name!r} has shape {shape}, but it must have {dimensions} dimensions, none of them 0.")
    return shape
