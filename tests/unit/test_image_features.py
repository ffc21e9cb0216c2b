"""Image features in shards: how they are found, indexed and read by mirror flag, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffmoe_ds.cli import main
from diffmoe_ds.data.shuffle import sample_index
from diffmoe_ds.data.sources.image_features import FeatureFormat, feature_format, parse_feature_format
from diffmoe_ds.data.sources.index_files import FEATURES as ARRAY
from diffmoe_ds.data.sources.index_files import INDEX, load_index, save_index
from diffmoe_ds.data.sources.latents import LatentFormat
from diffmoe_ds.data.sources.shards import ShardDataset
from diffmoe_ds.errors import DataError
from diffmoe_ds.files import sha256_of
from diffmoe_ds.rng import training_draws
from tests.helpers.data import (
    FEATURES,
    GREY,
    IMAGES,
    SHAPE,
    assert_same,
    by_position,
    features_format,
    features_member,
    image_features,
    image_file,
    loader,
    take,
    text_features,
    text_member,
    write_tar,
)
from tests.helpers.data import format_member as text_format_member

DRAWS = partial(training_draws, 5, shape=SHAPE, label_dropout=0.3, flip=True)


def shard(path, count=IMAGES, damaged=(), text=False, form=FEATURES):
    """Images of 5x6 with their number in the pixels, and features of it."""
    files = [features_format(form), *([text_format_member(text_features())] if text else [])]
    for number in range(count):
        key = f"{number:03d}"
        files.append((f"{key}.png", b"no picture" if number in damaged else image_file(GREY + number)))
        files.append(features_member(key, number, form))
        files += [text_member(key, "a car")] if text else []
    return write_tar(path, files)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> ShardDataset:
    return ShardDataset([shard(tmp_path_factory.mktemp("features") / "a.tar")])


def read(dataset, count=3, **changes):
    return take(count, loader(dataset, **{"reads_features": True, "num_classes": 1, "draws": DRAWS, **changes}))


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_each_half_is_read_by_the_mirror_flag(tmp_path, name):
    dataset = ShardDataset([shard(tmp_path / name, text=True)])
    assert dataset.features == FEATURES and dataset.text == text_features()
    found = dataset.read_features([4, 4, 0], [False, True, True])
    assert found.dtype == np.float16
    assert (found == [image_features(4)[0], image_features(4)[1], image_features(0)[1]]).all()
    assert dataset.features_bytes(3) == FEATURES.encode(image_features(3))
    assert dataset.captions(3) == ["a car"] and dataset[3].image.shape == (1, 5, 6)


def test_the_index_on_disk_has_features(tmp_path):
    pair = [shard(tmp_path / "a.tar", 3), shard(tmp_path / "b.tar", 2)]
    scanned = ShardDataset(pair, use_index=False)
    named = tuple(info._replace(name=path.name) for info, path in zip(scanned.index.shards, pair, strict=True))
    save_index(replace(scanned.index, shards=named), tmp_path)
    loaded = load_index(tmp_path)
    assert isinstance(loaded.features, np.memmap) and (loaded.features == scanned.index.features).all()
    assert loaded.feature_format == FEATURES
    second = ShardDataset(pair[1:])
    assert (second.read_features([1], [True]) == image_features(1)[1]).all(), "a part of the index"
    (tmp_path / ARRAY).unlink()
    with pytest.raises(DataError, match=r"index-features.npy"):
        load_index(tmp_path)


@pytest.mark.parametrize("row", [(0, 0), (512, 47), (1 << 60, 96), (-512, 96), (100, 96)])
def test_numbers_out_of_range_are_refused(tmp_path, row):
    index = ShardDataset([shard(tmp_path / "a.tar", 3)]).index
    index.features[1] = row
    save_index(index, tmp_path)
    with pytest.raises(DataError, match="numbers out of range for sample 1"):
        load_index(tmp_path)


def test_older_indices_have_none(tmp_path):
    dataset = ShardDataset([write_tar(tmp_path / "a.tar", [("a.png", image_file(GREY))])])
    save_index(dataset.index, tmp_path)
    tree = json.loads((tmp_path / INDEX).read_text())
    del tree["features"]
    (tmp_path / INDEX).write_text(json.dumps(tree))
    old = load_index(tmp_path)
    assert old.features is None and old.feature_format is None and dataset.features is None
    assert not (tmp_path / ARRAY).exists()
    plain = [("a.png", image_file(GREY)), ("a.features", b"not ours")]
    assert ShardDataset([write_tar(tmp_path / "b.tar", plain)]).features is None, "without a format"


def test_shards_that_do_not_fit_are_refused(tmp_path):
    files = [features_format(), ("a.png", image_file(GREY)), features_member("a", 0), ("b.png", image_file(GREY))]
    with pytest.raises(DataError, match=r"^sample 'b' of shard .* has no .features, but its shard has a __features__"):
        ShardDataset([write_tar(tmp_path / "a.tar", files)])
    with pytest.raises(DataError, match=r"^sample 'b' of .* has a .features of 5 bytes, .* expected .* of 96 bytes"):
        ShardDataset([write_tar(tmp_path / "a.tar", [*files, ("b.features", b"short")])])
    other = replace(FEATURES, sha256="ef" * 32)
    with pytest.raises(DataError, match=r"b.tar hold different image features"):
        ShardDataset([shard(tmp_path / "a.tar", 1), shard(tmp_path / "b.tar", 1, form=other)])
    with pytest.raises(DataError, match=r"has a __features__ of 100,000 bytes, which is out of range"):
        ShardDataset([write_tar(tmp_path / "c.tar", [("__features__", bytes(100_000))])])


@given(st.recursive(st.none() | st.integers() | st.text(), lambda each: st.dictionaries(st.text(), each), max_leaves=5))
def test_formats_of_any_contents_are_parsed_or_refused(tree):
    with pytest.raises(ValueError):
        feature_format(tree)
    with pytest.raises(DataError, match="has an invalid __features__"):
        parse_feature_format(json.dumps(tree).encode(), "shard a")


@given(st.integers(-1, 300), st.integers(-1, 1 << 17))
def test_formats_have_bounds(side, width):
    tree = {**FEATURES.to_json(), "side": side, "width": width}
    fits = 0 < side <= 256 and 0 < width <= 1 << 15 and width % 2 == 0 and 4 * side**2 * width <= 64 << 20
    if fits:
        assert feature_format(tree) == FeatureFormat(**tree) and feature_format(tree).to_json() == tree
    else:
        with pytest.raises(ValueError):
            feature_format(tree)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_micro_batches_hold_the_features_of_the_mirror_image(small, num_workers):
    plain, flips = take(3, loader(small, num_classes=1, draws=DRAWS)), set()
    for batch, other in zip(read(small, num_workers=num_workers), plain, strict=True):
        assert other.features is None
        assert batch.features.dtype == torch.float16 and batch.features.shape == (16, *FEATURES.shape)
        for field in ("x", "noise", "time", "drop", "position", "label"):
            assert torch.equal(getattr(batch, field), getattr(other, field)), "features change no draw"
        for position, features in zip(batch.position.tolist(), batch.features, strict=True):
            flip = DRAWS(position).flip
            flips.add(flip)
            expected = image_features(sample_index(5, position, IMAGES))[int(flip)]
            assert (features.numpy() == expected).all()
    assert flips == {False, True}


def test_features_do_not_depend_on_the_layout(small):
    whole, split = by_position(read(small)), []
    for rank in range(2):
        split += read(small, 6, rank=rank, world=2, micro_batch=4, accumulation=2)
    assert_same(by_position(split), whole)


def test_an_image_that_replaces_another_has_its_own_features(tmp_path):
    dataset = ShardDataset([shard(tmp_path / "a.tar", damaged=range(0, IMAGES, 2))])
    known = {image_features(number)[half].tobytes(): number for number in range(IMAGES) for half in (0, 1)}
    for batch in read(dataset, replaces_unreadable=True):
        for image, features in zip(batch.x, batch.features, strict=True):
            number = round(float((image[0, 1:6, 1:7].mean() + 1) * 127.5 - GREY.mean()))
            assert number % 2 == 1 and known[features.numpy().tobytes()] == number


def test_latents_and_text_come_with_features(tmp_path):
    latents = LatentFormat(1, 8, 64, "float16", 1.0, 0.0, "vae")
    head = [("__latents__", json.dumps(latents.to_json()).encode()), text_format_member(text_features())]
    moments = np.random.default_rng(0).standard_normal((2, 2, 1, 8, 8))
    sample = [("a.npy", latents.encode(moments)), text_member("a", "x"), features_member("a", 7)]
    dataset = ShardDataset([write_tar(tmp_path / "a.tar", [*head, features_format(), *sample])])
    (batch,) = read(dataset, 1, draws=partial(DRAWS, posterior=True), reads_text=True)
    flips = [DRAWS(position).flip for position in batch.position.tolist()]
    assert (batch.features.numpy() == image_features(7)[np.array(flips, int)]).all()
    assert batch.posterior is None and batch.text.shape == (16, text_features().layout.values)


def check(path, capsys):
    capsys.readouterr()
    code = main(["prepare", "check", str(path), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_prepare_check_reads_features(tmp_path, capsys):
    path = shard(tmp_path / "a.tar", 3)
    index = ShardDataset([path]).index
    named = replace(index, shards=(index.shards[0]._replace(name="a.tar"),))
    save_index(named, tmp_path, {"sha256": {"a.tar": sha256_of(path)}})
    code, report = check(tmp_path, capsys)
    assert code == 0 and report["features"] == FEATURES.to_json()
    main(["prepare", "check", str(tmp_path)])
    assert "image features of tiny: 2x2 tokens of width 6" in capsys.readouterr().out
    named.features[[0, 2]] = named.features[[2, 0]]
    save_index(named, tmp_path, {"sha256": {"a.tar": sha256_of(path)}})
    (problem,) = check(tmp_path, capsys)[1]["problems"]
    assert "2 samples of shard a.tar another offset, label, key, text or features than the shard" in problem
    for file in tmp_path.glob("index*"):
        file.unlink()
    place = path.read_bytes().index(image_features(1)[1].tobytes())
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(b"\xff\x7f")
    (problem,) = check(path, capsys)[1]["problems"]
    assert problem == f"sample '001' of shard {path} has a .features that contains NaN or Inf"
    shard(tmp_path / "b.tar", 1, form=replace(FEATURES, side=1))
    assert "b.tar holds other image features than the first" in "".join(check(tmp_path, capsys)[1]["problems"])
