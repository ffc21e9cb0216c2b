"""Shards, the order of the images, their random draws, and the loader that puts them together."""

import functools
import gzip
import hashlib
import io
import os
import pickle
import re
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffmoe_ds.data import shards
from diffmoe_ds.data.draws import TrainingDraws, image_stream, training_draws
from diffmoe_ds.data.embedded.make_shard import main as make_shard
from diffmoe_ds.data.loader import PositionLoader
from diffmoe_ds.data.order import epoch_order, locate, sample_index
from diffmoe_ds.data.shards import EMBEDDED, ShardDataset, expand
from diffmoe_ds.errors import DataError

SHAPE = (1, 8, 8)
IMAGES = 21  # fewer than two steps read, so that steps straddle epochs


def image_file(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=array.dtype == object)
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


GREY = np.arange(30, dtype=np.uint8).reshape(5, 6)
PNG = image_file(GREY)
LABELLED = [("a.cls", b"3"), ("a.png", PNG)]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> ShardDataset:
    """21 images of 5x6 with their number in the pixels, in a plain and a gzipped shard."""
    folder = tmp_path_factory.mktemp("small")
    for shard, name in enumerate(("s-0.tar", "s-1.tar.gz")):
        numbers = range(shard * 10, 10 if shard == 0 else IMAGES)
        files = [{"png": image_file(GREY + i), "cls": b"%d\n" % (i % 4)} for i in numbers]
        members = [(f"{i:03d}.{k}", data) for i, file in zip(numbers, files, strict=True) for k, data in file.items()]
        write_tar(folder / name, members)
    return ShardDataset(expand(folder))


def loader(dataset, **changes) -> PositionLoader:
    settings = {
        "dataset": dataset,
        "seed": 5,
        "global_batch": 16,
        "micro_batch": 16,
        "accumulation": 1,
        "rank": 0,
        "world": 1,
        "image_shape": SHAPE,
        "num_classes": 4,
        "draws": functools.partial(training_draws, 5, shape=SHAPE, label_dropout=0.3),
    }
    return PositionLoader(**{**settings, **changes})


def take(count: int, iterable) -> list:
    return [item for _, item in zip(range(count), iterable, strict=False)]


def by_position(batches) -> dict[int, list[torch.Tensor]]:
    """Every image's fields under its position; a position read twice is an error."""
    images = {}
    for batch in batches:
        for row, position in enumerate(batch.position.tolist()):
            assert position not in images
            images[position] = [field[row] for field in batch]
    return images


def assert_same(one: dict[int, list[torch.Tensor]], other: dict[int, list[torch.Tensor]]) -> None:
    assert one.keys() == other.keys()
    for position, fields in one.items():
        assert all(torch.equal(a, b) for a, b in zip(fields, other[position], strict=True)), position


# --- the embedded shard ---------------------------------------------------------------------------------------


def test_embedded_shard_is_the_documented_one():
    readme = (EMBEDDED.parent / "README.md").read_text()
    assert hashlib.sha256(EMBEDDED.read_bytes()).hexdigest() in readme
    dataset = ShardDataset([EMBEDDED])
    assert len(dataset) == 10_000
    assert dataset[0].key == "train-00000" and dataset[0].label == 9
    assert dataset[0].image.shape == (1, 28, 28) and dataset[0].image.dtype == np.uint8
    assert np.bincount([dataset[i].label for i in range(10_000)]).tolist() == [1000] * 10


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_make_shard_gives_the_same_bytes_again(tmp_path, suffix, capsys):
    images = np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8)
    labels = np.array([1, 0, 1, 1, 0, 2, 2, 2, 0, 1, 0, 2], np.uint8)
    opener = gzip.open if suffix else open
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        with opener(tmp_path / f"train-{name}-ubyte{suffix}", "wb") as file:
            file.write(struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes())
    for name in ("one.tar.gz", "two.tar.gz"):
        make_shard([str(tmp_path), str(tmp_path / name), "--per-class", "2"])
    assert (tmp_path / "one.tar.gz").read_bytes() == (tmp_path / "two.tar.gz").read_bytes()
    dataset = ShardDataset([tmp_path / "one.tar.gz"])
    kept = [0, 1, 2, 4, 5, 6]
    assert [dataset[i].key for i in range(len(dataset))] == [f"train-{i:05d}" for i in kept]
    assert all((dataset[row].image[0] == images[i]).all() for row, i in enumerate(kept))
    assert [dataset[row].label for row in range(6)] == labels[kept].tolist()


@pytest.mark.parametrize("content", [None, b"", b"\0\0\x08\x01\0\0\0\x05abc", b"\0\0\x0d\x01\0\0\0\0"])
def test_make_shard_refuses_other_files(tmp_path, content, capsys):
    if content is not None:
        (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(SystemExit, match="4"):
        make_shard([str(tmp_path), str(tmp_path / "out.tar.gz")])
    assert "idx" in capsys.readouterr().err


# --- shards ---------------------------------------------------------------------------------------------------


def test_expand(tmp_path, monkeypatch):
    for name in ("b.tar", "a.tar.gz", "s-01.tar", "s-00.tar", "notes.txt"):
        (tmp_path / name).touch()

    def names(path):
        return [p.name for p in expand(path)]

    assert names(tmp_path) == ["a.tar.gz", "b.tar", "s-00.tar", "s-01.tar"]
    assert names(f"{tmp_path}/s-{{01..00}}.tar") == ["s-01.tar", "s-00.tar"]
    assert names(f"{tmp_path}/{{s,a}}*.tar*") == ["s-00.tar", "s-01.tar", "a.tar.gz"]
    assert names(tmp_path / "notes.txt") == ["notes.txt"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert names("~/b.tar") == ["b.tar"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.tar", "no shard .*missing.tar exists; expected a file, a directory or a pattern of tar files"),
        ("empty", r"directory .*empty holds no shard; expected files named \*.tar or \*.tar.gz"),
        ("s-{00..02}.tar", "no shard .*s-01.tar exists"),
        ("t-*.tar", r"no shard .*t-\*.tar exists"),
        ("s-{00", r"pattern .*s-\{00 has unbalanced braces; write it like shards-\{000..127\}.tar"),
    ],
)
def test_expand_names_what_is_missing(tmp_path, path, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "s-00.tar").touch()
    with pytest.raises(DataError, match=message):
        expand(f"{tmp_path}/{path}")


def test_image_kinds(tmp_path):
    colour = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    alpha = np.dstack([colour, np.full((5, 6), 9, np.uint8)])
    latent = np.random.default_rng(1).standard_normal((4, 3, 2))
    files = {
        "grey.png": PNG,
        "colour.PNG": image_file(colour),
        "alpha.png": image_file(alpha),
        "lossless.webp": image_file(colour, "WEBP"),
        "jpg.jpg": image_file(colour, "JPEG"),
        "jpeg.jpeg": image_file(GREY, "JPEG"),
        "half.npy": npy(latent.astype(np.float16)),
        "fortran.npy": npy(np.asfortranarray(latent)),
    }
    members = [m for name, data in files.items() for m in ((name, data), (name.split(".")[0] + ".cls", b" 7\n"))]
    dataset = ShardDataset([write_tar(tmp_path / "a.tar", members)])
    images = {sample.key: sample.image for sample in (dataset[i] for i in range(len(dataset)))}
    assert {sample.label for sample in (dataset[i] for i in range(len(dataset)))} == {7}
    assert (images["grey"] == GREY).all() and images["grey"].shape == (1, 5, 6)
    for key in ("colour", "alpha", "lossless"):
        assert (images[key] == colour.transpose(2, 0, 1)).all(), key
    assert images["jpg"].shape == (3, 5, 6) and images["jpeg"].shape == (1, 5, 6)
    assert images["half"].dtype == np.float32 and (images["half"] == latent.astype(np.float16)).all()
    assert (images["fortran"] == latent.astype(np.float32)).all()


def test_groups_members_as_webdataset_does(tmp_path):
    names = ["x/a.png", "x/a.cls", "y/a.seg.png", "y/a.cls", "y/a.PNG", ".hidden.png", "nodot", "é" * 90 + ".png"]
    names += ["é" * 90 + ".cls", "x/a.cls", "x/a.txt", "x/a.png", "d.1/b.cls", "d.1/b.png"]
    path = write_tar(tmp_path / "a.tar", [(n, PNG if n.lower().endswith("png") else b"1") for n in names])
    theirs = [sample["__key__"] for sample in webdataset.WebDataset(str(path), shardshuffle=False)]
    dataset = ShardDataset([path])
    assert [dataset[i].key for i in range(len(dataset))] == theirs
    assert theirs == ["x/a", "y/a", "é" * 90, "x/a", "d.1/b"]


def test_links_and_devices_are_not_members(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("a.png", tarfile.SYMTYPE), ("a.cls", tarfile.LNKTYPE), ("b.png", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/hostname"
            tar.addfile(info)
    with pytest.raises(DataError, match="there is no sample"):
        ShardDataset([path])


NAN = np.full((1, 2, 2), np.nan, np.float32)
BAD_LABEL = r"sample 'a' of shard .*a.tar has the label {}; expected an integer from 0 in ASCII"
BAD_IMAGE = r"sample 'a' of shard .*a.tar has a {} that cannot be decoded: {}"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "there is no sample in .*a.tar; expected a .cls and an image for each"),
        ([("a.cls", b"1")], "sample 'a' of shard .*a.tar has no image among its members .cls; expected one of .png, "),
        ([("a.png", PNG)], "sample 'a' of shard .*a.tar has no label among its members .png; expected a .cls"),
        ([("a.png", PNG), ("b.cls", b"1"), ("a.cls", b"1")], "sample 'a' .* has no label .* stored next to them"),
        ([*LABELLED, ("a.npy", npy(NAN))], "has 2 images among its members .cls, .png, .npy; expected one of .png"),
        ([*LABELLED, ("a.PNG", PNG)], "sample 'a' of shard .*a.tar has two members .png; expected one"),
        ([("a.png", PNG), ("a.cls", b"cat")], BAD_LABEL.format("b'cat'")),
        ([("a.png", PNG), ("a.cls", b"")], BAD_LABEL.format("b''")),
        ([("a.png", PNG), ("a.cls", b"-1")], BAD_LABEL.format("b'-1'")),
        ([("a.png", PNG), ("a.cls", b"1.0")], BAD_LABEL.format("b'1.0'")),
        ([("a.png", PNG), ("a.cls", "\u0663".encode())], BAD_LABEL.format("b'.*'")),
        ([("a.png", PNG), ("a.cls", b"9" * 5000)], BAD_LABEL.format("b'9{40}'")),
        ([("a.png", PNG[:-30]), ("a.cls", b"1")], BAD_IMAGE.format(".png", "")),
        ([("a.jpg", PNG), ("a.cls", b"1")], BAD_IMAGE.format(".jpg", "it does not begin as a JPEG file")),
        ([("a.webp", b""), ("a.cls", b"1")], BAD_IMAGE.format(".webp", "it does not begin as a WEBP file")),
        (
            [("a.png", image_file(GREY.astype(np.uint16) * 999)), ("a.cls", b"1")],
            BAD_IMAGE.format(".png", "pixel mode I;16 is not supported, expected 8 bits a channel"),
        ),
        ([("a.npy", npy(NAN)), ("a.cls", b"1")], BAD_IMAGE.format(".npy", "float32 array of shape .* expected finite")),
        ([("a.npy", npy(GREY)), ("a.cls", b"1")], BAD_IMAGE.format(".npy", r"uint8 array of shape \(5, 6\), expected")),
        ([("a.npy", npy(NAN)[:-1]), ("a.cls", b"1")], BAD_IMAGE.format(".npy", "")),
        ([("a.npy", b"PK\3\4"), ("a.cls", b"1")], BAD_IMAGE.format(".npy", "")),
    ],
)
def test_samples_that_are_refused(tmp_path, members, message):
    path = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=message) as caught:
        ShardDataset([path])[0]
    assert "\n" not in str(caught.value)


def test_nothing_is_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)

    array = np.empty(1, object)
    array[0] = Bomb()
    bomb = pickle.dumps(Bomb())
    members = [("a.pyd", bomb), ("a.pickle", bomb), *LABELLED]
    members += [("b.npy", npy(array)), ("b.cls", b"1"), ("c.npy", bomb), ("c.cls", b"1")]
    dataset = ShardDataset([write_tar(tmp_path / "a.tar", members)])
    assert dataset[0].label == 3
    with pytest.raises(
        DataError, match=BAD_IMAGE.format(".npy", "Object arrays cannot be loaded").replace("'a'", "'b'")
    ):
        dataset[1]
    with pytest.raises(DataError, match=r"sample 'c' .* cannot be decoded"):
        dataset[2]
    assert not (tmp_path / "exploded").exists()
    pickle.loads(bomb)
    assert (tmp_path / "exploded").exists()  # the bomb works


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_big_members_are_refused_unless_they_are_never_read(tmp_path, monkeypatch, name):
    monkeypatch.setattr(shards, "MAX_MEMBER_BYTES", 1 << 20)
    assert ShardDataset([write_tar(tmp_path / name, [*LABELLED, ("a.txt", bytes(1_048_577))])])[0].label == 3
    for big in ("a.png", "a.cls"):
        path = write_tar(tmp_path / name, [(big, bytes(1_048_577))])
        with pytest.raises(DataError, match=f"member '{big}' of shard .* has 1048577 bytes; at most 1 MiB are read"):
            ShardDataset([path])


def test_big_gzipped_shards_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_UNPACKED_BYTES", 1 << 20)
    path = write_tar(tmp_path / "a.tar.gz", [("a.txt", bytes(2 << 20))])
    with pytest.raises(DataError, match=r"unpacks to more than 1 MiB of memory; store it as a plain .tar"):
        ShardDataset([path])


UNREADABLE = r"shard .*a.tar(.gz)? is not a readable, complete tar or tar.gz file: "
SIX_MEMBERS = [(f"{key}.{suffix}", PNG if suffix == "png" else b"1") for key in "abc" for suffix in ("png", "cls")]


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_truncated_shard_is_refused(tmp_path_factory, name, data):
    path = write_tar(tmp_path_factory.mktemp("truncated") / name, SIX_MEMBERS)
    # Of a plain tar only the zeros that fill up the file may be missing; each member takes two blocks of 512 bytes.
    needed = 6 * 1024 + 512 if name == "a.tar" else path.stat().st_size
    os.truncate(path, data.draw(st.integers(0, needed - 1)))
    with pytest.raises(DataError, match=UNREADABLE):
        ShardDataset([path])


@settings(max_examples=40, deadline=None)
@given(member=st.integers(0, 5), byte=st.integers(0, 99), change=st.integers(1, 127))
def test_a_damaged_header_is_refused(tmp_path_factory, member, byte, change):
    path = write_tar(tmp_path_factory.mktemp("damaged") / "a.tar", SIX_MEMBERS)
    content = bytearray(path.read_bytes())
    content[member * 1024 + byte] ^= change
    path.write_bytes(content)
    with pytest.raises(DataError, match=UNREADABLE):
        ShardDataset([path])


@pytest.mark.parametrize("content", [b"", b"hello", b"\x1f\x8bhello", bytes(100), os.urandom(2000)])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError, match=UNREADABLE):
        ShardDataset([tmp_path / "a.tar"])


def test_a_shard_that_changes_after_opening(tmp_path):
    path = write_tar(tmp_path / "a.tar", LABELLED)
    dataset = ShardDataset([path])
    os.truncate(path, 1000)
    with pytest.raises(DataError, match=r"shard .*a.tar ends before byte .*: it changed after opening"):
        dataset[0]
    path.unlink()
    with pytest.raises(DataError, match=r"shard .*a.tar can no longer be read: "):
        ShardDataset.__getitem__(pickle.loads(pickle.dumps(dataset)), 0)


def test_few_files_are_open_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_OPEN_FILES", 2)
    paths = [write_tar(tmp_path / f"{i}.tar", [("a.png", PNG), ("a.cls", b"%d" % i)]) for i in range(5)]
    dataset = ShardDataset(paths)
    for i in (0, 1, 2, 3, 4, 3, 0, 3):
        assert dataset[i].label == i
        assert len(dataset._files) <= 2
    assert set(dataset._files) == {0, 3}


# --- order and draws ------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 2**40), n=st.integers(1, 300))
def test_order_is_a_pure_permutation(seed, epoch, n):
    order = epoch_order(seed, epoch, n)
    assert order.dtype == np.int64 and sorted(order.tolist()) == list(range(n))
    epoch_order.cache_clear()
    assert (epoch_order(seed, epoch, n) == order).all()
    assert locate(epoch * n + n - 1, n) == (epoch, n - 1)
    assert sample_index(seed, epoch * n + n - 1, n) == order[-1]


def test_every_image_once_an_epoch_in_another_order():
    epochs = [[sample_index(3, epoch * 50 + i, 50) for i in range(50)] for epoch in range(4)]
    assert all(sorted(order) == list(range(50)) for order in epochs)
    assert len({tuple(order) for order in epochs}) == 4
    assert not (epoch_order(3, 0, 50) == epoch_order(4, 0, 50)).all()


def test_old_runs_continue():
    """A release that changes these numbers cannot continue a run begun before it."""
    assert epoch_order(7, 3, 10).tolist() == [2, 8, 9, 4, 0, 6, 7, 5, 1, 3]
    draws = training_draws(7, 12348, (1, 1, 3), 0.5)
    assert (draws.flip, draws.drop, draws.time) == (True, False, 0.31956297159194946)
    np.testing.assert_allclose(draws.noise.ravel(), [0.2853857, -0.04999052, 1.9049188], 1e-6)
    np.testing.assert_allclose(image_stream(7).standard_normal(3, np.float32), [-0.4836463, -2.018093, 0.6625088], 1e-6)


@given(seed=st.integers(0, 2**64 - 1), position=st.integers(0, 2**63))
def test_switches_do_not_shift_the_other_draws(seed, position):
    on = training_draws(seed, position, SHAPE, label_dropout=1.0)
    off = training_draws(seed, position, SHAPE, label_dropout=0.0, flip=False)
    assert on.drop and not off.drop and not off.flip
    assert on.time == off.time and 0 <= on.time < 1 and np.float32(on.time) == on.time
    assert (on.noise == off.noise).all() and on.noise.dtype == np.float32 and on.noise.shape == SHAPE


def test_draws_have_their_distributions():
    draws = [training_draws(1, position, (1, 4, 4), 0.1) for position in range(4000)]
    noise = np.stack([d.noise for d in draws])
    assert abs(np.mean([d.flip for d in draws]) - 0.5) < 0.03
    assert abs(np.mean([d.drop for d in draws]) - 0.1) < 0.02
    assert abs(np.mean([d.time for d in draws]) - 0.5) < 0.02
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_streams_never_coincide():
    """Training noise, sampling noise and the order, of neighbouring seeds and positions, share no 64-bit word."""
    generators = [image_stream(seed).bit_generator for seed in range(4)]
    words = np.concatenate([generator.random_raw(1000) for generator in generators])
    noises = [training_draws(seed, position, SHAPE, 0.0).noise.ravel() for seed in range(4) for position in range(4)]
    noises += [image_stream(seed).standard_normal(64, np.float32) for seed in range(4)]
    assert len(np.unique(words)) == len(words)
    assert len({noise.tobytes() for noise in noises}) == len(noises)


# --- the loader -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "micro", "accumulation"), [(1, 16, 1), (2, 8, 1), (4, 2, 2), (1, 4, 4)])
def test_the_stream_does_not_depend_on_the_layout(small, world, micro, accumulation):
    whole = by_position(take(3, loader(small)))
    assert sorted(whole) == list(range(48))
    split = []
    for rank in range(world):
        layout = {"rank": rank, "world": world, "micro_batch": micro, "accumulation": accumulation}
        batches = take(3 * accumulation, loader(small, **layout))
        assert batches[1].position[0] == world * micro + rank * micro
        split += batches
    assert_same(by_position(split), whole)


@pytest.mark.parametrize("start", [16, 20, 45])
def test_a_later_start_continues_exactly(small, start):
    whole = by_position(take(5, loader(small)))
    tail = by_position(take(2, loader(small, start_position=start)))
    assert_same(tail, {position: whole[position] for position in range(start, start + 32)})


def test_workers_change_nothing(small):
    alone = take(12, loader(small, micro_batch=4, accumulation=4))
    with_workers = take(12, loader(small, micro_batch=4, accumulation=4, num_workers=2))
    for one, other in zip(alone, with_workers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_micro_batch_contents(small):
    batch = take(1, loader(small))[0]
    assert [field.dtype for field in batch] == [
        torch.float32,
        torch.int64,
        torch.float32,
        torch.float32,
        torch.bool,
        torch.int64,
    ]
    assert batch.x.shape == batch.noise.shape == (16, *SHAPE)
    for row in range(16):
        number = sample_index(5, row, IMAGES)
        draws = training_draws(5, row, SHAPE, 0.3)
        pixels = GREY + number
        expected = np.full(SHAPE, -1.0, np.float32)
        expected[0, 1:6, 1:7] = (pixels[:, ::-1] if draws.flip else pixels) / 127.5 - 1
        np.testing.assert_allclose(batch.x[row], expected, atol=1e-6)
        assert (batch.noise[row].numpy() == draws.noise).all()
        assert (batch.label[row], batch.time[row], batch.drop[row]) == (number % 4, draws.time, draws.drop)
    assert {training_draws(5, row, SHAPE, 0.3).flip for row in range(16)} == {True, False}


def test_white_is_one_and_latents_are_kept(tmp_path):
    latent = np.random.default_rng(0).standard_normal((4, 2, 2)).astype(np.float32)
    still = TrainingDraws(False, False, 0.5, np.zeros((4, 2, 2), np.float32))
    one = {"global_batch": 1, "micro_batch": 1}
    dataset = ShardDataset([write_tar(tmp_path / "a.tar", [("a.npy", npy(latent)), ("a.cls", b"0")])])
    assert (
        take(1, loader(dataset, image_shape=(4, 2, 2), draws=lambda _: still, **one))[0].x[0].numpy() == latent
    ).all()
    white = image_file(np.full((8, 8), 255, np.uint8))
    dataset = ShardDataset([write_tar(tmp_path / "b.tar", [("b.png", white), ("b.cls", b"0")])])
    assert (take(1, loader(dataset, **one))[0].x == 1).all()


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        (image_file(GREY), 4, "the label 4; the model has 4 classes, 0 to 3"),
        (
            image_file(np.zeros((9, 8), np.uint8)),
            0,
            "an image of shape (1, 9, 8); the model takes 1 channels of at most 8x8",
        ),
        (
            image_file(np.zeros((8, 8, 3), np.uint8)),
            0,
            "an image of shape (3, 8, 8); the model takes 1 channels of at most 8x8",
        ),
        (
            npy(np.zeros((1, 8, 7), np.float32)),
            0,
            "an image of shape (1, 8, 7); the model takes 1 channels of exactly 8x8",
        ),
    ],
    ids=["label", "size", "channels", "latent"],
)
def test_images_that_do_not_fit_the_model(tmp_path, image, label, message, num_workers):
    name = "a.npy" if image.startswith(b"\x93NUMPY") else "a.png"
    dataset = ShardDataset([write_tar(tmp_path / "a.tar", [(name, image), ("a.cls", b"%d" % label)])])
    pattern = f"^sample 'a' of shard .*a.tar has {re.escape(message)}$"
    with pytest.raises(DataError, match=pattern) as caught:
        take(1, loader(dataset, num_workers=num_workers))
    assert "\n" not in str(caught.value)


def test_layouts_that_do_not_add_up_are_bugs(small):
    with pytest.raises(AssertionError):
        loader(small, micro_batch=8)
    with pytest.raises(AssertionError):
        loader(small, rank=1)


def test_global_random_state_is_left_alone(small):
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    take(2, loader(small))
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
