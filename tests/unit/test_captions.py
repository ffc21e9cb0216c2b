"""Captions from files next to the images, from shards, and from tables."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffmoe_ds.data.captions import open_captions, read_table
from diffmoe_ds.data.sources.folder import ImageFolder
from diffmoe_ds.data.sources.shards import ShardDataset
from diffmoe_ds.errors import ConfigError, DataError
from tests.helpers.data import PNG, write_tar
from tests.helpers.fuzz import fuzz

IMAGES = ("cats/one.png", "cats/two.b.png", "dogs/one.png")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three images in two classes."""
    for name in IMAGES:
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PNG)
    return tmp_path / "images"


def shard(path: Path, *members: tuple[str, bytes], image: str = "x/a.png") -> ShardDataset:
    return ShardDataset([write_tar(path / "a.tar", [(image, PNG), *members])])


def from_table(folder: Path, text: str, name: str = "captions.csv") -> list[list[str]]:
    """The captions of each image, from a table."""
    path = folder.parent / name
    path.write_text(text)
    captions = open_captions(ImageFolder(folder), str(path))
    return [captions.captions(index) for index in range(len(IMAGES))]


def test_files_next_to_the_images(folder):
    (folder / "cats/one.txt").write_bytes("\ufeffa cat\n\n  two \t cats \r\na cat\n".encode())
    (folder / "cats/two.b.json").write_text(json.dumps({"width": 4, "captions": ["a\nb", " ", "c"]}))
    captions = open_captions(ImageFolder(folder))
    assert captions.captions(0) == ["a cat", "two cats"] and captions.captions(1) == ["a b", "c"]
    with pytest.raises(DataError, match=r"dogs/one.png has no caption; expected .*dogs/one.txt or .json$"):
        captions.captions(2)
    (folder / "dogs/one.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"dogs/one.png has no caption; expected one in .*dogs/one.txt$"):
        captions.captions(2)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff", "invalid start byte"),
        (b"x" * 70_000, "a caption of more than 65,536 bytes"),
        (b"a\n" * 65, "65 captions; the limit is 64"),
        (b"x" * (5 << 20), "larger than the limit of 4,194,304 bytes"),
    ],
)
def test_invalid_files_are_named(folder, data, message):
    (folder / "cats/one.txt").write_bytes(data)
    with pytest.raises(DataError, match=f"the captions .*cats/one.txt cannot be read: .*{message}"):
        open_captions(ImageFolder(folder)).captions(0)


def test_members_of_shards(tmp_path):
    assert open_captions(shard(tmp_path, ("x/a.txt", b"one\ntwo\n"))).captions(0) == ["one", "two"]
    without = open_captions(shard(tmp_path, ("x/a.cls", b"1")))
    with pytest.raises(DataError, match=r"'x/a' of shard .*a.tar has no caption; expected a .txt or .json member"):
        without.captions(0)


@pytest.mark.parametrize(
    "names",
    [
        ("cats/one.png", "cats/two.b.png", "dogs/one.png"),
        ("./cats/one.png", "cats//two.b.png", " dogs/one.png "),
        ("cats/one", "cats/two.b", "dogs/one"),
        ("cats/one", "cats/two_b", "dogs/one"),  # keys
        ("cats/one.png", "two.b.png", "dogs/one.png"),  # a base name that only one image has
        ("cats/one", "two_b", "dogs/one"),
    ],
)
def test_names_of_images_in_tables(folder, names):
    rows = "".join(f"{name},caption {number}\n" for number, name in enumerate(names))
    assert from_table(folder, f"file_name,caption\n{rows}") == [["caption 0"], ["caption 1"], ["caption 2"]]
    full = "".join(f"{folder / name},caption {number}\n" for number, name in enumerate(IMAGES))
    assert from_table(folder, f"file_name,caption\n{full}") == [["caption 0"], ["caption 1"], ["caption 2"]]


def test_names_of_samples_in_tables(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"key": "x/a", "text": "by key"}\n')
    source = shard(tmp_path)
    assert open_captions(source, str(tmp_path / "t.jsonl")).captions(0) == ["by key"]
    for name in ("a.png", "x/a.png", "a", "a.jpg", "x/a.JPEG"):
        (tmp_path / "t.jsonl").write_text(json.dumps({"image": name, "prompt": "by file"}))
        assert open_captions(source, str(tmp_path / "t.jsonl")).captions(0) == ["by file"]


def test_files_in_tables_have_the_keys_that_preparation_gives_them(tmp_path):
    """Dots become underscores, and the suffix is part of the key if another file has the same name without it."""
    rows = [{"image": name, "text": name} for name in ("x/b.c.jpg", "x/a.png", "x/a.webp", "notes.txt")]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for key, found in (("x/b_c", "x/b.c.jpg"), ("x/a_webp", "x/a.webp")):
        source = shard(tmp_path, image=f"{key}.png")
        assert open_captions(source, str(tmp_path / "t.jsonl")).captions(0) == [found]
    with pytest.raises(DataError, match=r"'x/notes' of shard .* has no caption; .* the file has captions for 4 images"):
        open_captions(shard(tmp_path, image="x/notes.png"), str(tmp_path / "t.jsonl")).captions(0)


def test_several_rows_and_lists_are_several_captions(folder):
    found = from_table(folder, "﻿Path,split,Text\ncats/one.png,t,x\nother.png,t,z\n\ncats/one.png,v,\"y,\n y\"\n"
                       "cats/one.png,v,x\ntwo.b,v,2\ndogs/one,v,3\n")  # fmt: skip
    assert found == [["x", "y, y"], ["2"], ["3"]]
    rows = ({"file": "cats/one", "caption": ["x", "y"]}, {"file": "cats/one", "caption": "z"},
            {"file": "two.b", "captions": ["2"]}, {"file": "dogs/one", "prompt": "3"})  # fmt: skip
    text = "\n\n".join(map(json.dumps, rows))
    assert from_table(folder, text, "c.JSONL") == [["x", "y", "z"], ["2"], ["3"]]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.csv", "file_name,caption\nb.png,x\n", r"cats/one.png has no caption; expected a row of .*c.csv for "
         r"'cats/one.png'; the file has captions for 1 image, such as 'b.png'"),
        ("c.csv", "file_name,caption\ncats/one.png,\n", "has no caption; .* the file has captions for 0 images$"),
        ("c.csv", "file_name,caption\none.png,x\n", "cats/one.png and other images match 'one.png', a row of .*c.csv"
         "; name images by path, such as 'cats/one.png'"),
        ("c.csv", "", r"cannot be read: expected one of file_name, file, .* among its columns, got \[\]"),
        ("c.csv", "file_name,title\n", r"expected one of caption, .* its columns, got \[\"file_name\", \"title\"\]"),
        ("c.csv", "file_name,caption\na,b\na,b,c\n", "after 1 row: line 3 has 3 columns, but the header has 2"),
        ("c.csv", 'file_name,caption\na,"b\n', "unexpected end of data"),
        ("c.csv", "file_name,caption\n,b\n", "the name of an image must be a string, got ''"),
        ("c.csv", f"file_name,caption\na,{'x' * (1 << 20)}\n", "a line is longer than the limit of 1,048,576 char"),
        ("c.csv", "file_name,caption\n" + "".join(f"a,{n}\n" for n in range(65)), "65 captions; the limit is 64"),
        ("c.jsonl", "[]\n", r"cannot be read: line 1: must be an object, got '\[\]'"),
        ("c.jsonl", '{"image": "a", "caption": {}}', "line 1: a caption must be a string or a list of strings"),
        ("c.jsonl", '{"image": 3, "caption": "x"}', "the name of an image must be a string, got '3'"),
        ("c.jsonl", '{"image": "a", "caption": "\\ud800"}', "surrogates not allowed"),
        ("c.jsonl", "\n{", "cannot be read: line 2: Expecting property name .* at column 2"),
        ("c.jsonl", '{"image": "a", "caption": "x"}\n{"image":\n', "after 1 row: line 2: Expecting value at column 10"),
        ("c.jsonl", '\n{"image": "a"}', "cannot be read: line 2: expected one of caption, .* among its columns"),
    ],
)  # fmt: skip
def test_invalid_tables_are_errors_of_one_sentence(folder, name, text, message):
    with pytest.raises(DataError, match=message):
        from_table(folder, text, name)


def test_tables_of_other_kinds_and_missing_ones(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"c.parquet must be a .csv or .jsonl file"):
        from_table(folder, "", "c.parquet")
    with pytest.raises(DataError, match=r"none.csv cannot be read: No such file"):
        read_table(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes("file_name,caption\na,é\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.csv cannot be read: 'utf-8' codec"):
        read_table(tmp_path / "latin.csv")


NAMES = st.from_regex(r"[a-z]{1,3}(/[a-z]{1,3})?\.png", fullmatch=True)
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
ROWS = st.lists(st.tuples(NAMES, TEXTS), max_size=12)


def expected(rows: list[tuple[str, str]]) -> dict[str, list[str]]:
    table: dict[str, list[str]] = {}
    for name, text in rows:
        line = " ".join(text.split())
        if line and line not in table.setdefault(name, []):
            table[name].append(line)
    return {name: texts for name, texts in table.items() if texts}


@fuzz(60)
@given(rows=ROWS, ends=st.sampled_from(("\n", "\r\n")))
def test_tables_are_read_as_they_were_written(tmp_path_factory, rows, ends):
    folder = tmp_path_factory.getbasetemp()
    buffer = io.StringIO()
    csv.writer(buffer, quoting=csv.QUOTE_ALL, lineterminator=ends).writerows([("file_name", "caption"), *rows])
    (folder / "c.csv").write_bytes(buffer.getvalue().encode())
    assert read_table(folder / "c.csv") == expected(rows)
    lines = [json.dumps({"file_name": name, "caption": text}, ensure_ascii=False) for name, text in rows]
    (folder / "c.jsonl").write_bytes(ends.join(lines).encode())
    assert read_table(folder / "c.jsonl") == expected(rows)


@fuzz(150)
@given(
    data=st.one_of(st.binary(max_size=60), st.text(',"\n\r{}[]:ab', max_size=40).map(str.encode)),
    head=st.sampled_from((b"", b"file_name,caption\n", b'{"file_name": "a", "caption": ')),
    suffix=st.sampled_from((".csv", ".jsonl")),
)
def test_any_bytes_are_a_table_or_an_error_of_one_sentence(tmp_path_factory, data, head, suffix):
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(head + data)
    try:
        table = read_table(path)
    except DataError as error:
        message = str(error)
        assert re.search(rf"the captions {path} cannot be read( after \d+ rows?)?: .", message) and "\n" not in message
    else:
        assert all(captions and all(caption.strip() for caption in captions) for captions in table.values())
