"""Index of, and random access to, the samples of WebDataset shards.

A shard is a tar file; neighbouring members with the same key (the name up to the first dot of its base name)
form a sample.  Opening reads the tar headers only; an image is read when it is asked for.  Members are read by
offset and never extracted, members that are no image or label are never read, and nothing is ever unpickled.
"""

import glob
import gzip
import io
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import braceexpand
import numpy as np
from PIL import Image, UnidentifiedImageError

from diffmoe_ds.errors import DataError

EMBEDDED = Path(__file__).parent / "embedded" / "fashion-mnist-00000.tar.gz"

MAX_MEMBER_BYTES = 64 << 20
MAX_UNPACKED_BYTES = 4 << 30  # of one .tar.gz, which is held in memory
MAX_OPEN_FILES = 256  # per data set and process; the usual limit is 1,024 per process

PIL_FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}
IMAGE_SUFFIXES = (*PIL_FORMATS, "npy")
LABEL_SUFFIX = "cls"
GREY_MODES = ("1", "L", "LA")
COLOUR_MODES = ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


class Sample(NamedTuple):
    image: np.ndarray  # [C, H, W]: uint8 of an image file (C is 1 or 3), float32 of a latent (.npy)
    label: int
    key: str


class _Entry(NamedTuple):
    """Where a sample's parts lie: one row of the index.  Offsets and sizes are in bytes."""

    shard: int
    suffix: int  # of the image, in IMAGE_SUFFIXES
    image_offset: int
    image_size: int
    label_offset: int
    label_size: int
    key_offset: int  # in the index's joined keys
    key_size: int


def expand(path: str | Path) -> list[Path]:
    """The shards that ``path`` names: a file, a directory's ``*.tar`` and ``*.tar.gz``, or a pattern.

    A pattern has braces (``shards-{000..127}.tar``), wildcards (``shards-*.tar``) or both.  The shards of a
    directory and of a wildcard are sorted by name; those of braces keep the order of the braces.

    Raises ``DataError`` if the path does not exist or any part of the pattern matches nothing.
    """
    whole = Path(path).expanduser()
    if whole.is_dir():
        shards = sorted(p for p in whole.iterdir() if p.name.endswith((".tar", ".tar.gz")))
        if not shards:
            raise DataError(f"directory {path} holds no shard; expected files named *.tar or *.tar.gz")
        return shards
    if whole.exists():
        return [whole]
    shards = []
    try:
        for pattern in braceexpand.braceexpand(str(whole)):
            matches = sorted(glob.glob(pattern))
            if not matches:
                raise DataError(f"no shard {pattern} exists; expected a file, a directory or a pattern of tar files")
            shards += map(Path, matches)
    except braceexpand.UnbalancedBracesError:
        raise DataError(f"pattern {path} has unbalanced braces; write it like shards-{{000..127}}.tar") from None
    return shards


class ShardDataset:
    """Random access to the samples of ``shards``, in the order in which they are stored.

    Workers may be forked from a process that holds one; a copy sent to another process opens its own files.

    Raises ``DataError`` if a shard cannot be read to its end, a sample lacks an image or a label or has several,
    a member is too big, or there is no sample at all; ``ds[i]`` raises it for contents that cannot be decoded.
    """

    def __init__(self, shards: Sequence[Path]):
        assert shards, "expand() never gives an empty list"
        self._shards = list(shards)
        self._unpacked: dict[int, bytes] = {}
        self._files: dict[int, io.FileIO] = {}  # the least recently read first
        keys = bytearray()
        # Arrays and one byte string instead of millions of objects: small, and forked workers share them.
        blocks = [np.empty((0, len(_Entry._fields)), np.int64)]
        for number, shard in enumerate(self._shards):
            entries = []
            for key, members in self._scan(number):
                suffix, image, label = _parts(f"sample {key!r} of shard {shard}", members)
                name = key.encode("utf-8", "surrogateescape")
                entries.append(_Entry(number, IMAGE_SUFFIXES.index(suffix), *image, *label, len(keys), len(name)))
                keys += name
            if entries:
                blocks.append(np.array(entries, np.int64))
        self._keys = bytes(keys)
        self._index = np.concatenate(blocks)
        if not len(self):
            others = f" and {len(shards) - 1} more shards" if len(shards) > 1 else ""
            raise DataError(f"there is no sample in {shards[0]}{others}; expected a .cls and an image for each")

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Sample:
        entry = _Entry(*self._index[index].tolist())
        suffix = IMAGE_SUFFIXES[entry.suffix]
        text = self._read(entry.shard, entry.label_offset, entry.label_size)
        if not re.fullmatch(rb"\s*[0-9]{1,9}\s*", text):
            raise DataError(f"{self.describe(index)} has the label {text[:40]!r}; expected an integer from 0 in ASCII")
        data = self._read(entry.shard, entry.image_offset, entry.image_size)
        try:
            image = _decode_image(data, suffix)
        except Exception as error:  # what a decoder raises on damaged bytes depends on the bytes
            raise DataError(f"{self.describe(index)} has a .{suffix} that cannot be decoded: {error}") from error
        return Sample(image, int(text), self._key(entry))

    def describe(self, index: int) -> str:
        """Key and shard of a sample, for messages."""
        entry = _Entry(*self._index[index].tolist())
        return f"sample {self._key(entry)!r} of shard {self._shards[entry.shard]}"

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": {}}

    def _key(self, entry: _Entry) -> str:
        name = self._keys[entry.key_offset : entry.key_offset + entry.key_size]
        return name.decode("utf-8", "surrogateescape")

    def _scan(self, number: int) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
        """The samples of a shard, unpacked into memory first if it is gzipped."""
        shard = self._shards[number]
        try:
            with open(shard, "rb") as file:
                if file.read(2) == b"\x1f\x8b":
                    self._unpacked[number] = _unpack(shard)
                    yield from _scan_tar(shard, io.BytesIO(self._unpacked[number]))
                else:
                    file.seek(0)
                    yield from _scan_tar(shard, file)
        except (OSError, EOFError, zlib.error, tarfile.TarError, ValueError) as error:
            raise DataError(f"shard {shard} is not a readable, complete tar or tar.gz file: {error}") from error

    def _read(self, number: int, offset: int, size: int) -> bytes:
        if number in self._unpacked:
            return self._unpacked[number][offset : offset + size]
        try:
            data = os.pread(self._file(number).fileno(), size, offset)
        except OSError as error:
            raise DataError(f"shard {self._shards[number]} can no longer be read: {error}") from error
        if len(data) != size:
            raise DataError(f"shard {self._shards[number]} ends before byte {offset + size}: it changed after opening")
        return data

    def _file(self, number: int) -> io.FileIO:
        file = self._files.pop(number, None) or io.FileIO(self._shards[number])
        self._files[number] = file
        if len(self._files) > MAX_OPEN_FILES:
            self._files.pop(next(iter(self._files))).close()
        return file


def _unpack(shard: Path) -> bytes:
    chunks, total = [], 0
    with gzip.open(shard) as stream:
        while chunk := stream.read(1 << 24):
            chunks.append(chunk)
            total += len(chunk)
            if total > MAX_UNPACKED_BYTES:
                raise DataError(
                    f"shard {shard} unpacks to more than {MAX_UNPACKED_BYTES >> 20} MiB of memory; "
                    "store it as a plain .tar, which is read in place"
                )
    return b"".join(chunks)


def _scan_tar(shard: Path, file: io.BufferedIOBase) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Key and members ``{suffix: (offset, size)}`` of each sample, grouped as WebDataset groups them."""
    current, members = None, {}
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            folder, slash, base = member.name.rpartition("/")
            stem, dot, suffix = base.partition(".")
            if not (member.isreg() and stem and dot) or member.issparse():
                continue  # links, devices, directories, hidden files: never part of a sample
            key, suffix = folder + slash + stem, suffix.lower()
            if key != current:
                if members:
                    yield current, members
                current, members = key, {}
            if suffix in members:
                raise DataError(f"sample {key!r} of shard {shard} has two members .{suffix}; expected one")
            if suffix in (*IMAGE_SUFFIXES, LABEL_SUFFIX) and not 0 <= member.size <= MAX_MEMBER_BYTES:
                raise DataError(
                    f"member {member.name!r} of shard {shard} has {member.size} bytes; "
                    f"at most {MAX_MEMBER_BYTES >> 20} MiB are read"
                )
            members[suffix] = (member.offset_data, member.size)
        # tarfile takes a damaged or cut-off header for the end of the archive; the true end is a block of zeros.
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no valid header or end mark at byte {tar.offset}")
    if members:
        yield current, members


def _parts(where: str, members: dict[str, tuple[int, int]]) -> tuple[str, tuple[int, int], tuple[int, int]]:
    """The image's suffix and place, and the label's place, of a sample's members."""
    images = [suffix for suffix in members if suffix in IMAGE_SUFFIXES]
    found = ", ".join(f".{suffix}" for suffix in members)
    if len(images) != 1:
        raise DataError(
            f"{where} has {len(images) or 'no'} image{'s' * (len(images) > 1)} among its members {found}; "
            f"expected one of .{', .'.join(IMAGE_SUFFIXES)}, stored next to the other members of its key"
        )
    if LABEL_SUFFIX not in members:
        raise DataError(f"{where} has no label among its members {found}; expected a .cls stored next to them")
    return images[0], members[images[0]], members[LABEL_SUFFIX]


def _decode_image(data: bytes, suffix: str) -> np.ndarray:
    """``[C, H, W]`` uint8 of an image file, float32 of a latent; any exception means it cannot be decoded."""
    if suffix == "npy":
        # read_array and not np.load, which would also take a zip archive or, if allowed, a bare pickle.
        latent = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
        if latent.ndim != 3 or latent.dtype.kind != "f" or not np.isfinite(latent).all():
            raise ValueError(f"{latent.dtype} array of shape {latent.shape}, expected finite floats of shape (C, H, W)")
        return np.ascontiguousarray(latent, np.float32)
    try:
        picture = Image.open(io.BytesIO(data), formats=[PIL_FORMATS[suffix]])
    except UnidentifiedImageError:
        raise ValueError(f"it does not begin as a {PIL_FORMATS[suffix]} file") from None
    if picture.mode in GREY_MODES:
        return np.array(picture.convert("L"))[None]
    if picture.mode not in COLOUR_MODES:  # 16-bit greys: converting would clip them
        raise ValueError(f"pixel mode {picture.mode} is not supported, expected 8 bits a channel")
    return np.ascontiguousarray(np.asarray(picture.convert("RGB")).transpose(2, 0, 1))
