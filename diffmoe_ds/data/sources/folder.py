"""A folder of image files as a source of samples: labels come from folder names, keys from file names.

The layout is `DIR/CLASS/image.jpg`, where classes are numbered by sorted name, or `DIR/image.jpg` without labels;
`unlabelled` reads every image below `DIR`, at any depth.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from diffmoe_ds.control_files import open_regular
from diffmoe_ds.data.sources.images import MAX_IMAGE_BYTES
from diffmoe_ds.data.sources.tar_index import NO_LABEL
from diffmoe_ds.errors import DataError
from diffmoe_ds.files import expand_user

RAW_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
UNSUPPORTED_SUFFIXES = (".avif", ".heic", ".heif", ".jxl", ".cr2", ".nef", ".arw", ".dng", ".psd", ".svg")
"""Images that are not read, but worth a word, as a user may not notice that they are missing."""


class Source(Protocol):
    """Images that are not cropped yet, for preparation and raw training: a folder or shards."""

    @property
    def labels(self) -> np.ndarray:
        """Labels, int64 [n]; all `NO_LABEL` in a source without labels."""

    @property
    def classes(self) -> list[str] | None:
        """Name of each label, if they have names."""

    def __len__(self) -> int: ...
    def key(self, index: int) -> str: ...
    def describe(self, index: int) -> str: ...
    def suffix(self, index: int) -> str: ...
    def image_bytes(self, index: int) -> bytes: ...


UNLABELLED = "`diffmoe prepare images --unlabelled` takes all images, at any depth, without labels"


class ImageFolder:
    """The image files of a folder, sorted by name.

    Attributes:
        folder: the folder.
    """

    def __init__(self, folder: str | Path, unlabelled: bool = False) -> None:
        """List the images.

        Args:
            folder: the folder.
            unlabelled: read all images below it, without labels.

        Raises:
            DataError: the folder or a class holds no images, two class names differ in case only, or images are both
                next to and inside class folders, or deeper.
        """
        self.folder = expand_user(folder)
        if not self.folder.is_dir():
            raise DataError(f"{folder} is not a directory of images")
        if unlabelled:
            self.classes, files, labels = None, sorted(images_below(self.folder)), None
        else:
            self.classes, files, labels = _labelled(self.folder)
        if not files:
            raise DataError(f"{folder} holds no images; expected files named *{', *'.join(RAW_SUFFIXES)}")
        self.labels = np.full(len(files), NO_LABEL, np.int64) if labels is None else np.array(labels, np.int64)
        self._ambiguous = _ambiguous_keys(files)
        self._files = _Names(files)

    def unsupported(self) -> Counter[str]:
        """Return how many files of each unsupported image format are next to the images, by ending."""
        return unsupported({str(self.folder / os.path.dirname(name)) for name in self._files})

    def __len__(self) -> int:
        return len(self._files)

    def key(self, index: int) -> str:
        """Return the path below the folder, without its suffix and without dots in the last part."""
        key = file_key(self._files[index])
        return file_key(self._files[index], with_suffix=True) if key in self._ambiguous else key

    def describe(self, index: int) -> str:
        """Return the file of a sample, for messages."""
        return f"image {self.path(index)}"

    def path(self, index: int) -> Path:
        """Return the file of a sample."""
        return self.folder / self._files[index]

    def suffix(self, index: int) -> str:
        """Return the format of a file, as its name ends, in lower case."""
        return self.path(index).suffix[1:].lower()

    def image_bytes(self, index: int) -> bytes:
        """Return the contents of a file, truncated beyond the limit of `open_rgb`.

        Raises:
            DataError: the file cannot be read.
        """
        try:
            with open_regular(self.path(index)) as file:
                return file.read(MAX_IMAGE_BYTES + 1)
        except OSError as error:
            raise DataError(f"{self.describe(index)} cannot be read: {error.strerror}") from None


def _labelled(folder: Path) -> tuple[list[str] | None, list[str], list[int] | None]:
    """Return classes, files relative to the folder, and labels."""
    flat, classes = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                classes.append(entry.name)
            elif is_image(entry.name):
                flat.append(entry.name)
    if not classes:
        return None, sorted(flat), None
    if flat:
        raise DataError(
            f"{folder} holds images, such as {min(flat)}, next to the folders {', '.join(sorted(classes)[:3])}; "
            f"expected either images or class folders; {UNLABELLED}"
        )
    classes.sort()
    seen: dict[str, str] = {}
    for name in classes:
        same = unicodedata.normalize("NFKC", name).casefold().strip()
        if same in seen:
            raise DataError(
                f"{folder} holds two classes whose names differ in case only, {seen[same]!r} and {name!r}; "
                "merge or rename them"
            )
        seen[same] = name
    files, labels = [], []
    for label, name in enumerate(classes):
        found = []
        with os.scandir(folder / name) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir() and any(images_below(folder / name / entry.name)):
                    raise DataError(
                        f"{folder / name} holds images in a nested folder, {entry.name}, so their class is "
                        f"ambiguous; use {folder / name} itself, or move them; {UNLABELLED}"
                    )
                if not entry.is_dir() and is_image(entry.name):
                    found.append(f"{name}/{entry.name}")
        if not found:
            other = sorted(unsupported([str(folder / name)]))
            hint = f"convert its {', '.join(other)} files" if other else "remove it, or it shifts every later label"
            raise DataError(f"class folder {folder / name} holds no images; {hint}")
        files += sorted(found)
        labels += [label] * len(found)
    return classes, files, labels


def images_below(folder: Path) -> Iterator[str]:
    """Yield all images below a folder, relative to it.

    Hidden folders, which hold thumbnails and the like, are skipped.  Links to folders are not followed, so links cannot
    form loops.
    """
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = os.path.relpath(parent, folder)
        yield from (name if relative == "." else f"{relative}/{name}" for name in names if is_image(name))


def unsupported(folders: Iterable[str]) -> Counter[str]:
    """Return how many files of each unsupported image format some folders hold, by ending."""
    names = (entry.name for folder in folders for entry in os.scandir(folder))
    endings = (os.path.splitext(name)[1].lower() for name in names if not name.startswith("."))
    return Counter(ending for ending in endings if ending in UNSUPPORTED_SUFFIXES)


def is_image(name: str) -> bool:
    """Return whether a file name is that of an image in a supported format."""
    return name.lower().endswith(RAW_SUFFIXES) and not name.startswith(".")


def file_key(file: str, *, with_suffix: bool = False) -> str:
    """Return the key of a file; in WebDataset a key ends at the first dot of the base name."""
    folder, slash, base = file.rpartition("/")
    return folder + slash + (base if with_suffix else base.rpartition(".")[0]).replace(".", "_")


def _ambiguous_keys(files: list[str]) -> frozenset[str]:
    """Return the keys that several files would have, such as a.png next to a.jpg; theirs contain the suffix.

    Raises:
        DataError: two files would have the same key nevertheless.
    """
    ambiguous = frozenset(key for key, count in Counter(map(file_key, files)).items() if count > 1)
    if ambiguous:
        keys = (file_key(file, with_suffix=file_key(file) in ambiguous) for file in files)
        twice = next((key for key, count in Counter(keys).items() if count > 1), None)
        if twice is not None:
            raise DataError(f"two images would both have the key {twice!r}; rename one of them")
    return ambiguous


class _Names:
    """Names in one block of memory.

    A list of strings takes more than twice as much, and again in every worker: counting references to a string writes
    to its memory, which a forked worker then no longer shares.
    """

    def __init__(self, names: Sequence[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._bytes = b"".join(encoded)
        self._starts = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self._bytes[self._starts[index] : self._starts[index + 1]])

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))
