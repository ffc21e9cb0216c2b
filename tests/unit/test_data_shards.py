"""Shards: which ones a path names, how samples are found and decoded, what is refused."""

import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from diffmoe_ds.data.sources import shards
from diffmoe_ds.data.sources.shard_paths import expand
from diffmoe_ds.data.sources.shards import ShardDataset
from diffmoe_ds.errors import DataError
from tests.helpers.data import GREY, LABELLED, PNG, image_file, npy, write_tar


def test_expand(tmp_path, monkeypatch):
    for name in ("b.tar", "a.tar.gz", "s-01.tar", "s-00.tar", "notes.txt"):
        (tmp_path / name).touch()

    def names(path):
        return [Path(p).name for p in expand(path)]

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
        ("empty", r"directory .*empty holds no shards; expected files named \*.tar or \*.tar.gz"),
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
    for key in ("colour", "lossless"):
        assert (images[key] == colour.transpose(2, 0, 1)).all(), key
    assert images["alpha"].min() >= 245 and images["alpha"].shape == (3, 5, 6), "nearly transparent, on white"
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


def test_links_and_devices_are_not_followed(tmp_path):
    """An image that is a link or device cannot be read, and is not silently skipped; anything else is ignored."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (
            ("a.png", tarfile.SYMTYPE), ("a.cls", tarfile.LNKTYPE), ("b.png", tarfile.CHRTYPE),
            ("c.jpg", tarfile.LNKTYPE), ("d.png", tarfile.DIRTYPE), ("e.cls", tarfile.SYMTYPE),
        ):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/hostname"
            tar.addfile(info)
    dataset = ShardDataset([path])
    assert [dataset.key(i) for i in range(len(dataset))] == ["a", "b", "c"] and set(dataset.labels.tolist()) == {-1}
    for index in range(3):
        with pytest.raises(DataError, match=r"sample '.' of shard .*a.tar has a link or another special member for"):
            dataset[index]


def test_masks_next_to_photographs(tmp_path):
    """A file type that is rare in shards counts as the image only if the sample has no other image."""
    members = [("a.png", PNG), ("a.tif", b"a mask")]
    for name, kind in (("b.gif", "GIF"), ("c.BMP", "BMP"), ("d.tiff", "TIFF")):
        members.append((name, image_file(GREY, kind)))
    dataset = ShardDataset([write_tar(tmp_path / "a.tar", members)])
    assert [dataset.key(i) for i in range(len(dataset))] == ["a", "b", "c", "d"]
    for index in range(4):
        assert (dataset[index].image[0] == GREY).all()


NAN = np.full((1, 2, 2), np.nan, np.float32)
BAD_LABEL = r"sample 'a' of shard .*a.tar has the label {}; expected an integer from 0 in ASCII"
BAD_IMAGE = r"sample 'a' of shard .*a.tar has a {} that cannot be decoded: {}"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "there is no sample in .*a.tar; expected images, each with a .cls"),
        ([("a.cls", b"1")], "sample 'a' of shard .*a.tar has no image among its members .cls; expected one of .png, "),
        ([*LABELLED, ("b.png", PNG)], "sample 'b' of shard .*a.tar has no label, but others do; expected a .cls"),
        ([("a.png", PNG), ("b.cls", b"1"), ("a.cls", b"1")], "sample 'b' .* has no image .* stored next to the other"),
        ([*LABELLED, ("a.npy", npy(NAN))], "has 2 images among its members .cls, .png, .npy; expected one of .png"),
        ([*LABELLED, ("a.PNG", PNG)], "sample 'a' of shard .*a.tar has two .png members; expected one"),
        ([("a.png", PNG), ("a.cls", b"cat")], BAD_LABEL.format("b'cat'")),
        ([("a.png", PNG), ("a.cls", b"")], BAD_LABEL.format("b''")),
        ([("a.png", PNG), ("a.cls", b"-1")], BAD_LABEL.format("b'-1'")),
        ([("a.png", PNG), ("a.cls", b"1.0")], BAD_LABEL.format("b'1.0'")),
        ([("a.png", PNG), ("a.cls", "\u0663".encode())], BAD_LABEL.format("b'.*'")),
        ([("a.png", PNG), ("a.cls", b"9" * 5000)], BAD_LABEL.format("b'9{40}'")),
        ([("a.png", PNG[:-30]), ("a.cls", b"1")], BAD_IMAGE.format(".png", "")),
        ([("a.jpg", PNG), ("a.cls", b"1")], BAD_IMAGE.format(".jpg", "it does not start like a JPEG file")),
        ([("a.webp", b""), ("a.cls", b"1")], BAD_IMAGE.format(".webp", "it does not start like a WEBP file")),
        (
            [("a.png", image_file(GREY.astype(np.uint16) * 999)), ("a.cls", b"1")],
            BAD_IMAGE.format(".png", "pixel mode I;16 is not supported, expected 8 bits per channel"),
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
    with pytest.raises(DataError, match=BAD_IMAGE.format(".npy", "holds pickled objects").replace("'a'", "'b'")):
        dataset[1]
    with pytest.raises(DataError, match=r"sample 'c' .* cannot be decoded"):
        dataset[2]
    assert not (tmp_path / "exploded").exists()
    pickle.loads(bomb)
    assert (tmp_path / "exploded").exists()  # the bomb works


def test_few_files_are_open_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_OPEN_FILES", 2)
    paths = [write_tar(tmp_path / f"{i}.tar", [("a.png", PNG), ("a.cls", b"%d" % i)]) for i in range(5)]
    dataset = ShardDataset(paths)
    for i in (0, 1, 2, 3, 4, 3, 0, 3):
        assert dataset[i].label == i
        assert len(dataset._files) <= 2
    assert set(dataset._files) == {0, 3}


def test_shards_of_webdatasets_own_writer_are_read(tmp_path):
    with webdataset.ShardWriter(f"{tmp_path}/w-%02d.tar", maxcount=3, verbose=0) as writer:
        for number in range(5):
            writer.write(
                {"__key__": f"a/{number}", "png": image_file(GREY + number), "cls": number % 3, "txt": "words"}
            )
    dataset = ShardDataset(expand(tmp_path))
    assert dataset.shard_sizes == [3, 2] and [dataset.key(i) for i in range(5)] == [f"a/{n}" for n in range(5)]
    assert dataset.labels.tolist() == [0, 1, 2, 0, 1]
    assert all((dataset[n].image[0] == GREY + n).all() for n in range(5))
