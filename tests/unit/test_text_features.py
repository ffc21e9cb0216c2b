"""Records, members and formats of text features: round trips, and `ValueError` for everything else."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmoe_ds.text_features import (
    MAX_CAPTION_BYTES,
    MAX_CAPTIONS,
    MAX_HEAD_BYTES,
    Caption,
    EncoderFeatures,
    EncoderInfo,
    TextFormat,
    decode_record,
    encode_member,
    encode_record,
    padded_row,
    record_ranges,
    text_format,
)
from diffmoe_ds.text_layout import EncoderShape, TextLayout

SHAPES = st.builds(EncoderShape, st.integers(1, 6), st.integers(1, 5), st.integers(1, 5))
LAYOUTS = st.lists(SHAPES, min_size=1, max_size=4).map(lambda shapes: TextLayout(tuple(shapes)))
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def floats(draw: st.DrawFn, *shape: int) -> np.ndarray:
    """Any finite fp16 numbers."""
    bits = np.random.default_rng(draw(st.integers(0, 2**32))).integers(0, 2**16, shape, np.uint16)
    values = bits.view(np.float16)
    return np.where(np.isfinite(values), values, np.float16(0))


@st.composite
def captions_of(draw: st.DrawFn, layout: TextLayout) -> Caption:
    features = []
    for encoder in layout.encoders:
        length = draw(st.integers(1, encoder.tokens))
        features.append(EncoderFeatures(floats(draw, encoder.pooled), floats(draw, length, encoder.width)))
    return Caption(draw(TEXTS), tuple(features))


def same(one: Caption, other: Caption) -> bool:
    pairs = zip(one.features, other.features, strict=True)
    return one.text == other.text and all(np.array_equal(a, b) for x, y in pairs for a, b in zip(x, y, strict=True))


@settings(max_examples=40, deadline=None)
@given(data=st.data(), layout=LAYOUTS)
def test_captions_survive_a_round_trip_through_a_member(data, layout):
    captions = data.draw(st.lists(captions_of(layout), min_size=1, max_size=3))
    member = encode_member(captions)
    ranges = record_ranges(member[:MAX_HEAD_BYTES], len(member))
    assert len(ranges) == len(captions) and ranges[-1].stop == len(member)
    for where, caption in zip(ranges, captions, strict=True):
        record = member[where.start : where.stop]
        assert record == encode_record(caption) and same(decode_record(record, layout), caption)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), layout=LAYOUTS)
def test_rows_hold_the_features_and_zeros(data, layout):
    caption = data.draw(captions_of(layout))
    row = padded_row(layout, caption.features)
    assert row.dtype == np.float16 and row.shape == (layout.values,) and layout.values % 2 == 0
    for text, (pooled, tokens) in zip(layout.unpack(torch.from_numpy(row)[None]), caption.features, strict=True):
        length = int(text.length_B[0])
        assert np.array_equal(text.pooled_BP[0].numpy(), pooled)
        assert np.array_equal(text.tokens_BLF[0, :length].numpy(), tokens) and not text.tokens_BLF[0, length:].any()


@settings(max_examples=40, deadline=None)
@given(data=st.data(), layout=LAYOUTS)
def test_formats_survive_json(data, layout):
    infos = tuple(EncoderInfo(e.tokens, e.width, e.pooled, data.draw(TEXTS), "ab12") for e in layout.encoders)
    null = data.draw(captions_of(layout))
    format_ = TextFormat(infos, encode_record(null))
    found = text_format(json.loads(json.dumps(format_.to_json())))
    assert found == format_ and found.layout == layout
    assert np.array_equal(found.null_row, padded_row(layout, null.features))


LAYOUT = TextLayout((EncoderShape(3, 2, 2), EncoderShape(2, 3, 1)))
CAPTION = Caption(
    "rot \u00e4",
    tuple(
        EncoderFeatures(np.ones(e.pooled, np.float16), np.ones((e.tokens, e.width), np.float16))
        for e in LAYOUT.encoders
    ),
)
FORMAT = TextFormat(
    tuple(EncoderInfo(e.tokens, e.width, e.pooled, "name", "sha") for e in LAYOUT.encoders), encode_record(CAPTION)
)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_hostile_records_and_members_give_value_errors(data):
    """Bytes at random, and valid ones of which a part was replaced, removed or repeated."""
    valid = data.draw(st.sampled_from((encode_record(CAPTION), encode_member([CAPTION, CAPTION]), b"")))
    start = data.draw(st.integers(0, len(valid)))
    stop = data.draw(st.integers(start, len(valid)))
    number = st.integers(-(2**31), 2**31 - 1).map(lambda value: value.to_bytes(4, "little", signed=True))
    content = valid[:start] + data.draw(st.binary(max_size=8) | number) + valid[stop:]
    try:
        decode_record(content, LAYOUT)
    except ValueError as error:
        assert str(error)
    try:
        ranges = record_ranges(content[:MAX_HEAD_BYTES], len(content))
    except ValueError as error:
        assert str(error)
    else:
        assert 1 <= len(ranges) <= MAX_CAPTIONS and ranges[-1].stop == len(content)
        assert all(0 <= r.start <= r.stop for r in ranges)


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (lambda record: record[:-1], "bytes expected where"),
        (lambda record: record + b"x", "1 bytes too many"),
        (lambda record: (MAX_CAPTION_BYTES + 1).to_bytes(4, "little") + record[4:], "a number from 0 to 65536"),
        (lambda record: record[:10] + bytes(4) + record[14:], "features without tokens"),
        (lambda record: record[:-2] + np.float16(np.inf).tobytes(), "NaN or Inf"),
        (lambda record: record[:4] + b"\xff" + record[5:], "utf-8"),
    ),
)
def test_what_is_wrong_with_a_record_is_said(change, message):
    record = encode_record(CAPTION)
    assert same(decode_record(record, LAYOUT), CAPTION)
    with pytest.raises(ValueError, match=message):
        decode_record(change(record), LAYOUT)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_hostile_formats_give_value_errors(data):
    tree = FORMAT.to_json()
    if data.draw(st.booleans()):
        tree[data.draw(st.sampled_from(sorted(tree)))] = data.draw(VALUES)
    else:
        entry = tree["encoders"][1]
        entry[data.draw(st.sampled_from(sorted(entry)))] = data.draw(VALUES)
    try:
        found = text_format(tree)
    except ValueError as error:
        assert str(error)
    else:
        assert found.null_row.shape == (found.layout.values,)
    try:
        text_format(data.draw(VALUES))
    except ValueError as error:
        assert str(error)


def test_an_encoder_that_lacks_a_key_is_refused():
    for key in ("tokens", "width", "pooled", "name", "sha256"):
        tree = FORMAT.to_json()
        del tree["encoders"][0][key]
        with pytest.raises(ValueError, match="lacks a key"):
            text_format(tree)
