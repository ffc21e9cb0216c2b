"""Read the headers of a tar file within bounds, and the members that describe the formats of others."""

from __future__ import annotations

import re
import tarfile
from dataclasses import dataclass
from typing import BinaryIO

from diffmoe_ds.data.sources.image_features import (
    FEATURES_MEMBER,
    MAX_FEATURES_FORMAT_BYTES,
    FeatureFormat,
    parse_feature_format,
)
from diffmoe_ds.data.sources.latents import FORMAT_MEMBER, MAX_FORMAT_BYTES, LatentFormat, parse_format
from diffmoe_ds.data.sources.text_index import MAX_TEXT_FORMAT_BYTES, TEXT_FORMAT_MEMBER, parse_text_format
from diffmoe_ds.errors import DataError
from diffmoe_ds.text import quoted
from diffmoe_ds.text_features import TextFormat

MAX_HEADER_BYTES = 1 << 20
"""Most bytes of all headers of one member: extended ones hold long names, attributes and maps of sparse files."""
MAX_MEMBER_BYTES = 64 << 20
"""Most bytes of a member that is read."""
MAX_LABEL_BYTES = 64
MAX_DIGITS = 64
"""Longest number in an extended header; the standard library's search for one takes quadratic time."""
LIMITS = {
    FORMAT_MEMBER: MAX_FORMAT_BYTES,
    TEXT_FORMAT_MEMBER: MAX_TEXT_FORMAT_BYTES,
    FEATURES_MEMBER: MAX_FEATURES_FORMAT_BYTES,
}
"""Most bytes of each member that describes a format."""


class Headers:
    """A tar file as `tarfile` reads it: headers only, and a bounded number of bytes for each member."""

    def __init__(self, shard: str, file: BinaryIO) -> None:
        """Wrap a file.

        Args:
            shard: its name, for messages.
            file: the tar file.
        """
        self._shard = shard
        self._file = file
        self._left = MAX_HEADER_BYTES
        self._offset = 0
        self.seek, self.tell = file.seek, file.tell

    def start_member(self, offset: int) -> None:
        """Allow the headers of the next member.

        Args:
            offset: where they begin.

        Raises:
            DataError: they do not follow the previous ones, so that reading would never end.
        """
        if offset <= self._offset:
            raise DataError(f"shard {self._shard} has a member of negative size before byte {self._offset}")
        self._offset, self._left = offset, MAX_HEADER_BYTES

    def read(self, size: int = -1) -> bytes:
        """Return a part of a header.

        Raises:
            DataError: the member has more than `MAX_HEADER_BYTES` of headers, or a header has a number of more than
                `MAX_DIGITS`.
        """
        self._left -= size
        if size < 0 or self._left < 0:
            raise DataError(
                f"shard {self._shard} has a member with more than {MAX_HEADER_BYTES >> 20} MiB of headers at byte "
                f"{self._file.tell()}"
            )
        data = self._file.read(size)
        if size > tarfile.BLOCKSIZE and re.search(b"[0-9]{%d}" % (MAX_DIGITS + 1), data):
            raise DataError(f"shard {self._shard} has a header with a number of more than {MAX_DIGITS} digits")
        return data


@dataclass
class Formats:
    """The formats that the first members of a shard describe."""

    latents: LatentFormat | None = None
    text: TextFormat | None = None
    features: FeatureFormat | None = None

    def read(self, shard: str, file: BinaryIO, member: tarfile.TarInfo) -> bool:
        """Read a member if it describes a format, and return whether it does.

        Raises:
            DataError: it is invalid.
        """
        limit, where = LIMITS.get(member.name), f"shard {shard}"
        if not member.isreg() or limit is None:
            return False
        if not 0 <= member.size <= limit:
            if member.name != FORMAT_MEMBER:
                raise DataError(f"{where} has a {member.name} of {member.size:,} bytes, which is out of range")
            return False
        data = read_at(file, member.offset_data, member.size)
        if member.name == TEXT_FORMAT_MEMBER:
            self.text = self.text or parse_text_format(data, where)
        elif member.name == FEATURES_MEMBER:
            self.features = self.features or parse_feature_format(data, where)
        else:
            self.latents = self.latents or parse_format(data, where)
        return True


def read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    """Read bytes and restore the position, from which tarfile continues."""
    here = file.tell()
    file.seek(offset)
    data = file.read(size)
    file.seek(here)
    if len(data) != size:
        raise EOFError(f"the file ends before byte {offset + size}")
    return data


def check_member(shard: str, member: tarfile.TarInfo) -> None:
    """Check size and name of a member that is read.

    Raises:
        DataError: it is too large, or has a name that leads out of the archive.
    """
    if not 0 <= member.size <= MAX_MEMBER_BYTES:
        raise DataError(
            f"member {quoted(member.name)} of shard {shard} has {member.size} bytes; "
            f"the limit is {MAX_MEMBER_BYTES >> 20} MiB"
        )
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise DataError(
            f"member {quoted(member.name)} of shard {shard} has a name that leads out of the archive; "
            "expected a relative name without '..'"
        )


def read_label(where: str, file: BinaryIO, place: tuple[int, int]) -> int:
    """Return the label in a `.cls`.

    Args:
        where: the sample, for messages.
        file: its shard.
        place: offset and size of the member.

    Raises:
        DataError: it is not a number.
    """
    offset, size = place
    text = read_at(file, offset, min(size, MAX_LABEL_BYTES))
    if size > MAX_LABEL_BYTES or not re.fullmatch(rb"\s*[0-9]{1,9}\s*", text):
        raise DataError(f"{where} has the label {text[:40]!r}; expected an integer from 0 in ASCII")
    return int(text)
