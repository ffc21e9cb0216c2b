"""Captions and text features in shards: how they are found, indexed and read, and what is refused."""

import json
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffmoe_ds.data.sources import cache, shard_paths, shards
from diffmoe_ds.data.sources.index_files import INDEX, TEXT, load_index, save_index
from diffmoe_ds.data.sources.shards import ShardDataset
from diffmoe_ds.data.sources.text_index import parse_captions
from diffmoe_ds.errors import DataError
from diffmoe_ds.text_features import MAX_CAPTIONS, difference, padded_row
from tests.helpers.data import PNG, caption, format_member, text_features, text_member, write_tar
from tests.helpers.fuzz import changed_bytes, changed_trees, fuzz, to_json

FORM = text_features()
CAPTIONS = {"a": ["red apple"], "b": ["car", "a blue car", "one of many cars"], "c": [""]}


def members(captions=CAPTIONS, form=FORM):
    """Members of a shard with text features: the format, then image and text of each key."""
    width = form.encoders[0].width
    pairs = [((f"{key}.png", PNG), text_member(key, *texts, width=width)) for key, texts in captions.items()]
    return [format_member(form), *(member for pair in pairs for member in pair)]


def save(index, folder):
    """Store the index next to its shards, as a preparation does."""
    shards = tuple(shard._replace(name=shard.name.rpartition("/")[2]) for shard in index.shards)
    save_index(replace(index, shards=shards), folder)


def row(text):
    return padded_row(FORM.layout, caption(text).features)


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_text_is_read_from_the_index(tmp_path, name):
    dataset = ShardDataset([write_tar(tmp_path / name, members())])
    assert dataset.text == FORM and [dataset.captions(i) for i in range(3)] == list(CAPTIONS.values())
    for each in (dataset, pickle.loads(pickle.dumps(dataset))):
        rows = each.text_rows([2, 1, 1, 1, 0], [0.5, 0, 0.34, 1 - 2**-53, 0.99])
        assert rows.dtype == np.float16 and rows.shape == (5, FORM.layout.values)
        expected = [row(text) for text in ("", "car", "a blue car", "one of many cars", "red apple")]
        np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(rows[0], FORM.null_row)
    assert (dataset[0].image == dataset[1].image).all() and dataset.image_bytes(2) == PNG


def test_the_index_on_disk_has_text(tmp_path):
    """The shards are joined, the index is stored and mapped, and any part of it fits its shards."""
    paths = [write_tar(tmp_path / "a.tar", members()), write_tar(tmp_path / "b.tar", members({"d": ["green door"]}))]
    scanned = ShardDataset(paths)
    save(scanned.index, tmp_path)
    loaded = load_index(tmp_path)
    assert isinstance(loaded.text, np.memmap) and (loaded.text == scanned.index.text).all()
    assert loaded.text_format == FORM
    both, second = ShardDataset(paths), ShardDataset(paths[1:])
    assert isinstance(both.index.text, np.memmap)
    assert both.captions(3) == second.captions(0) == ["green door"]
    np.testing.assert_array_equal(second.text_rows([0], [0]), [row("green door")])
    (tmp_path / TEXT).write_bytes((tmp_path / TEXT).read_bytes()[:-1] + b"\1")
    with pytest.raises(DataError, match="do not match each other"):
        load_index(tmp_path, rehash=True)


@pytest.mark.parametrize("column", range(5))
@pytest.mark.parametrize("number", [-1, 2, 2**62, -(2**63)])
def test_hostile_index(tmp_path, column, number):
    path = write_tar(tmp_path / "a.tar", members())
    index = ShardDataset([path]).index
    index.text[1, column] = number
    save(index, tmp_path)
    if (column, number) == (4, 2):  # within the shard, but too short for a record
        with pytest.raises(DataError, match=r"sample 'b' of shard .*a.tar has a .text that cannot be decoded"):
            ShardDataset([path]).text_rows([1], [0])
        return
    with pytest.raises(DataError, match="has numbers out of range for sample 1"):
        ShardDataset([path])


def test_an_index_without_the_table_of_its_format(tmp_path):
    path = write_tar(tmp_path / "a.tar", members())
    save(ShardDataset([path]).index, tmp_path)
    tree = json.loads((tmp_path / INDEX).read_text())
    del tree["index_sha256"][TEXT]
    (tmp_path / INDEX).write_text(json.dumps(tree))
    with pytest.raises(DataError, match="do not match each other"):
        ShardDataset([path])


def test_captions_without_features(tmp_path, monkeypatch):
    listed = json.dumps({"captions": ["x", "y"], "prompt": "z"}).encode()
    files = [("a.png", PNG), ("a.TXT", "\ufeffone \r\n\n zwei ü\n".encode()), ("a.json", listed)]
    files += [("b.png", PNG), ("b.json", listed), ("c.png", PNG), ("c.json", b'{"width": 3}'), ("d.png", PNG)]
    files += [("e.png", PNG), ("e.txt", b"\xff"), ("f.png", PNG), ("f.json", b'{"text": 3}'), ("g.png", PNG)]
    files += [("g.text", b"not ours")]
    path = write_tar(tmp_path / "a.tar", files)
    dataset = ShardDataset([path])
    assert dataset.text is None and dataset.index.text is not None
    assert [dataset.captions(i) for i in (0, 1, 2, 3, 6)] == [["one", "zwei ü"], ["x", "y"], [], [], []]
    with pytest.raises(DataError, match=r"^sample 'e' of shard .*a.tar has a .txt with invalid captions: 'utf-8'"):
        dataset.captions(4)
    with pytest.raises(DataError, match=r"'f' .* has a .json with invalid captions: a caption must be a string or"):
        dataset.captions(5)
    # An index from before captions were indexed: the shards are scanned once, when a caption is needed.
    save(replace(dataset.index, text=None), tmp_path)
    old = ShardDataset([path])
    assert old.index.text is None and old[0].key == "a"
    assert old.captions(0) == ["one", "zwei ü"]
    monkeypatch.setattr(shards, "scan", None)
    assert old.captions(1) == ["x", "y"]


def test_sets_without_text_have_no_table(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.png", PNG), ("a.cls", b"1")])
    dataset = ShardDataset([path])
    assert dataset.index.text is None and dataset.captions(0) == []
    save(dataset.index, tmp_path)
    assert not (tmp_path / TEXT).exists() and isinstance(load_index(tmp_path).samples, np.memmap)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": text_features(width=5)}, r"text encoder 1 \(tiny\) has width 5 instead of 3 \(tiny\)"),
        ({"form": text_features(sha256="cd" * 32)}, r"encoder 1 \(tiny\) has the sha256 cdcdcdcdcdcd instead of abab"),
        ({"form": text_features(tokens=5)}, r"has token limit 5 instead of 4"),
        (None, "only one of them holds any"),
    ],
)
def test_different_formats_do_not_join(tmp_path, changes, message):
    other = [("a.png", PNG)] if changes is None else members({"d": ["x"]}, **changes)
    paths = [write_tar(tmp_path / "a.tar", members()), write_tar(tmp_path / "b.tar", other)]
    with pytest.raises(DataError, match=f"^shards .*a.tar and .*b.tar hold different text features: .*{message}"):
        ShardDataset(paths)


def test_an_encoder_that_was_moved_is_the_same():
    assert difference(text_features(name="/here"), text_features(name="/there")) is None


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([("d.png", PNG)], r"^sample 'd' of shard .*a.tar has no .text, but its shard has a __text__"),
        ([("d.png", PNG), ("d.text", b"")], "no .text|cannot be decoded"),
        ([("d.png", PNG), ("d.text", b"\1\0\0\0\1\0\0\0")], r"^sample 'd' .* has a .text that cannot be decoded"),
        ([("d.png", PNG), ("d.text", text_member("d", "x")[1] + b"x")], "bytes in a member of"),
        ([("d.png", PNG), text_member("d", "x", width=4)], "cannot be decoded"),
    ],
)
def test_damaged_members(tmp_path, extra, message):
    path = write_tar(tmp_path / "a.tar", [*members(), *extra])
    with pytest.raises(DataError, match=message):
        ShardDataset([path]).text_rows([3], [0.0])


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b"{" * 999, b"\xff", b" " * (4 << 20) + b"{}"], ids=range(6))
def test_invalid_formats(tmp_path, data):
    path = write_tar(tmp_path / "a.tar", [("__text__", data), *members()[1:]])
    with pytest.raises(DataError, match=r"shard .*a.tar has (an invalid __text__|a __text__ of 4,194,306 bytes)"):
        ShardDataset([path])


TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=4)


@fuzz(25)
@given(samples=st.lists(st.tuples(TEXTS, st.sampled_from([None, "txt", "json"])), min_size=1, max_size=5))
def test_any_captions(tmp_path_factory, samples):
    """Whatever captions samples have, and in whatever member: what was stored is read."""
    folder = tmp_path_factory.mktemp("text")
    files = [format_member(FORM)]
    for number, (texts, suffix) in enumerate(samples):
        plain = {"txt": "\n".join(texts), "json": json.dumps({"caption": texts})}
        extra = [] if suffix is None else [(f"{number}.{suffix}", plain[suffix].encode())]
        files += [text_member(str(number), *texts), *extra, (f"{number}.png", PNG)]
    dataset = ShardDataset([write_tar(folder / "a.tar", files)])
    for number, (texts, suffix) in enumerate(samples):
        lines = [line for text in texts for line in (text.split("\n") if suffix == "txt" else [text])]
        expected = texts if suffix is None else [line.strip() for line in lines if line.strip()]
        assert dataset.captions(number) == expected
        choices = [(place + 0.5) / len(texts) for place in range(len(texts))]
        np.testing.assert_array_equal(dataset.text_rows([number] * len(texts), choices), [row(text) for text in texts])
    shutil.rmtree(folder)


@fuzz(60)
@given(data=st.binary(max_size=40) | st.text(max_size=40).map(lambda text: json.dumps({"text": text}).encode()))
def test_any_caption_file(data):
    for suffix in ("txt", "json"):
        try:
            found = parse_captions(suffix, data)
        except ValueError:
            continue
        assert all(text == text.strip() != "" for text in found)


def test_limits_of_captions():
    assert len(parse_captions("txt", b"x\n" * MAX_CAPTIONS)) == MAX_CAPTIONS
    with pytest.raises(ValueError, match="65 captions; the limit is 64"):
        parse_captions("txt", b"x\n" * 65)
    with pytest.raises(ValueError, match="more than 65,536 bytes"):
        parse_captions("txt", b"x" * 65537)


def test_the_index_behind_a_url_is_fetched_with_its_text(tmp_path, monkeypatch):
    served, fetched = tmp_path / "served", []
    served.mkdir()
    path = write_tar(served / "a.tar", members())
    save(ShardDataset([path]).index, served)

    def fetch(url, target):
        fetched.append(url.rpartition("/")[2])
        shutil.copyfile(served / fetched[-1], target)

    for module in (cache, shard_paths):
        monkeypatch.setattr(module, "fetch", fetch)
    dataset = ShardDataset(["https://host/a.tar"], cache.ShardCache(tmp_path / "cache", 1 << 30))
    assert fetched == ["index.json", "index-samples.npy", "index-keys.npy", "index-text.npy"]
    assert dataset.text == FORM and dataset.captions(1) == CAPTIONS["b"] and fetched[4:] == ["a.tar"]


@fuzz(40)
@given(tree=changed_trees(FORM.to_json()))
def test_hostile_formats(tmp_path_factory, tree):
    read_anything(tmp_path_factory.mktemp("format"), [("__text__", to_json(tree).encode("utf-8", "replace"))])


@fuzz(40)
@given(data=changed_bytes(text_member("x", "red apple", "car")[1]))
def test_hostile_members(tmp_path_factory, data):
    read_anything(tmp_path_factory.mktemp("member"), [format_member(FORM), ("x.png", PNG), ("x.text", data)])


def read_anything(folder, files):
    """Read the samples of a hostile shard, which gives features of the right shape or a `DataError`."""
    try:
        dataset = ShardDataset([write_tar(folder / "a.tar", [*files, *members()[1:]])])
        for index in range(len(dataset)):
            dataset.captions(index)
            if dataset.text is not None:
                rows = dataset.text_rows([index], [0.9])
                assert rows.shape == (1, dataset.text.layout.values) and np.isfinite(rows).all()
    except DataError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
    shutil.rmtree(folder)
