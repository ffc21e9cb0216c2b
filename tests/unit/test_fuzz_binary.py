"""Parsers of binary formats, on files whose headers are valid in form and hostile in content."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.fuzz import changed_bytes, changed_trees, fuzz, to_json
from tests.helpers.parsers import changing

pytestmark = pytest.mark.usefixtures("hang_limit")
SIZES = st.sampled_from((-1, 0, 1, 2, 2**31, 2**40, 2**62, 2**63 - 1)) | st.integers(-(2**63), 2**63 - 1)


@pytest.mark.parametrize("name", ("safetensors", "model-weights"))
@fuzz(20)
@given(data=st.data())
def test_safetensors_headers(name, data):
    with changing(name) as path:
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = to_json(data.draw(changed_trees(json.loads(content[8 : 8 + size])))).encode("utf-8", "replace")
        size = data.draw(st.just(len(header)) | st.integers(0, 2**64 - 1))
        path.write_bytes(size.to_bytes(8, "little") + header + content[8 + size :][: 1 << 16])


@fuzz(20)
@given(data=st.data())
def test_rows_of_an_index(data):
    with changing("index-samples") as path:
        rows = np.load(path)
        for _ in range(data.draw(st.integers(1, 3))):
            place = data.draw(st.tuples(*(st.integers(0, side - 1) for side in rows.shape)))
            rows[place] = data.draw(SIZES)
        np.save(path, rows)


HEADERS = (
    "{'descr': '<i8', 'fortran_order': False, 'shape': (2, 7)}",
    "{'descr': '|O', 'fortran_order': False, 'shape': (2,)}",
    "{'descr': '<i8', 'fortran_order': True, 'shape': (7, 2)}",
    "{'descr': '<f4', 'fortran_order': 1, 'shape': [2]}",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (1099511627776,)}",
    "(" * 5000,
    "[" * 300 + "]" * 300,
    "{'descr': '|V0', 'fortran_order': False, 'shape': (9223372036854775807, 9223372036854775807)}",
    "{}",
    "9" * 6000,
    "{'descr': '<U99999999', 'fortran_order': False, 'shape': (9, 0)}",
    "__import__('os')",
    "",
    "{'descr': [('a', '<i8')]}",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (-1,)}",
    "{'descr': '|u1', 'fortran_order': False, 'shape': ()}",
)


@pytest.mark.parametrize("name", ("index-samples", "index-keys", "images"))
@fuzz(20)
@given(
    text=st.sampled_from(HEADERS), version=st.sampled_from((1, 2, 3, 9)), claimed=st.none() | st.integers(0, 2**16 - 1)
)
def test_npy_headers(name, text, version, claimed):
    with changing(name) as path:
        header = text.encode()
        size = (len(header) if claimed is None else claimed).to_bytes(2 if version == 1 else 4, "little")
        path.write_bytes(b"\x93NUMPY" + bytes((version, 0)) + size + header + path.read_bytes()[-48:])


@fuzz(20)
@given(data=st.data())
def test_zip_members_of_an_npz(data):
    """The list at the end of the archive lies about members that are there."""
    with changing("npz") as path:
        content = path.read_bytes()
        start = struct.unpack("<I", content[-6:-2])[0]
        listed = data.draw(changed_bytes(content[start:-22]))
        end = struct.pack(
            "<4s4H2IH",
            b"PK\5\6",
            0,
            0,
            *data.draw(st.tuples(*[st.integers(0, 2**16 - 1)] * 2)),
            data.draw(st.just(len(listed)) | st.integers(0, 2**32 - 1)),
            data.draw(st.just(start) | st.integers(0, 2**32 - 1)),
            0,
        )
        path.write_bytes(content[:start] + listed + data.draw(st.just(end) | st.just(content[-22:])))
