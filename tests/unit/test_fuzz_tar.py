"""Tar headers: each field of a header is changed, with a valid checksum, and extended headers are hostile."""

from __future__ import annotations

import tarfile

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.helpers.fuzz import fuzz
from tests.helpers.parsers import changing

pytestmark = pytest.mark.usefixtures("hang_limit")
FIELDS = {
    "name": (0, 100),
    "mode": (100, 8),
    "size": (124, 12),
    "mtime": (136, 12),
    "type": (156, 1),
    "magic": (257, 8),
}
NUMBERS = st.sampled_from(
    (b"-0000001", b"77777777777\0", b"00000000000\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"\xff" * 10 + b"\xf0\x00")
)
TYPES = st.sampled_from(tuple(b"%c" % code for code in b"0125634567xgXLKSDMNV\0\xff"))
VALUES = {
    "name": st.binary(max_size=100)
    | st.sampled_from((b"../../a.png", b"/a.png", b"a" * 100, b"__latents__", b"a.png")),
    "mode": st.binary(min_size=8, max_size=8),
    "size": NUMBERS | st.binary(min_size=12, max_size=12),
    "mtime": NUMBERS,
    "type": TYPES,
    "magic": st.sampled_from((b"ustar  \0", b"ustar\x0000", b"\0" * 8)),
}


def checked(header: bytes) -> bytes:
    """Return a header with its checksum."""
    header = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


def extended(kind: bytes, payload: bytes, size: int | None = None) -> bytes:
    """Return an extended header, which may lie about its size."""
    info = tarfile.TarInfo("./PaxHeaders/a")
    info.type, info.size = kind, len(payload) if size is None else size
    return info.tobuf(tarfile.GNU_FORMAT) + payload + bytes(-len(payload) % 512)


@fuzz(50)
@given(data=st.data())
def test_fields(data):
    with changing("shard") as path:
        content = bytearray(path.read_bytes())
        starts = [start for start in range(0, len(content), 512) if content[start + 257 : start + 262] == b"ustar"]
        for _ in range(data.draw(st.integers(1, 3))):
            start, name = data.draw(st.sampled_from(starts)), data.draw(st.sampled_from(list(FIELDS)))
            offset, size = FIELDS[name]
            value = data.draw(VALUES[name]).ljust(size, b"\0")[:size]
            header = bytes(content[start : start + 512])
            content[start : start + 512] = checked(header[:offset] + value + header[offset + size :])
        path.write_bytes(content)


RECORDS = st.lists(
    st.tuples(
        st.none() | st.integers(-9, 10**7),
        st.sampled_from(
            (
                b"path",
                b"size",
                b"linkpath",
                b"mtime",
                b"GNU.sparse.map",
                b"GNU.sparse.major",
                b"GNU.sparse.minor",
                b"GNU.sparse.realsize",
                b"GNU.sparse.size",
                b"hdrcharset",
                b"SCHILY.xattr.x",
                b"",
            )
        ),
        st.sampled_from(
            (
                b"",
                b"1",
                b"-1",
                b"-512",
                b"1e999",
                b"nan",
                b"9" * 60,
                b"9" * 5000,
                b"a.png",
                b"../a.png",
                b"\xff\xfe",
                b"BINARY",
                b"0,512,1024,9",
                b"x" * 70_000,
            )
        )
        | st.binary(max_size=30),
    ),
    max_size=4,
)


@fuzz(50)
@given(
    records=RECORDS,
    kind=st.sampled_from((b"x", b"g", b"X", b"L", b"K")),
    claimed=st.none() | st.integers(-(2**60), 2**60),
    count=st.sampled_from((1, 1, 1, 3, 700)),
)
@example(records=[(None, b"comment", b"9" * 65_000)], kind=b"x", claimed=None, count=1)
@example(records=[(None, b"path", b"a")], kind=b"x", claimed=None, count=700)
@example(records=[], kind=b"x", claimed=3 << 30, count=1)
@example(records=[], kind=b"L", claimed=3 << 30, count=1)
@example(records=[(None, b"size", b"-1024")], kind=b"x", claimed=None, count=1)
def test_extended_headers(records, kind, claimed, count):
    payload = b""
    for length, key, value in records:
        text = b" " + key + b"=" + value + b"\n"
        length = len(text) + len(str(len(text) + 2)) if length is None else length
        payload += str(length).encode() + text
    with changing("shard") as path:
        path.write_bytes(extended(kind, payload, claimed) * (count if len(payload) < 1000 else 1) + path.read_bytes())
