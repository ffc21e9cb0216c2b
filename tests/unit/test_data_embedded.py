"""The embedded dataset and the script that builds it."""

import gzip
import hashlib
import struct
import tarfile

import numpy as np
import pytest

from diffmoe_ds.data.sources.shards import EMBEDDED, ShardDataset
from tools.make_fashion_shard import main as make_shard


def test_embedded_shard_is_the_documented_one():
    readme = (EMBEDDED.parent / "README.md").read_text()
    assert hashlib.sha256(EMBEDDED.read_bytes()).hexdigest() in readme
    dataset = ShardDataset([EMBEDDED])
    assert len(dataset) == 10_000
    assert dataset[0].key == "train-00000" and dataset[0].label == 9
    assert dataset[0].image.shape == (1, 28, 28) and dataset[0].image.dtype == np.uint8
    assert np.bincount([dataset[i].label for i in range(10_000)]).tolist() == [1000] * 10


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_make_shard_is_reproducible(tmp_path, suffix, capsys):
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


def test_make_shard_writes_all_test_images(tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    for name, array in (("images-idx3", images), ("labels-idx1", np.array([1, 1, 0, 1, 2], np.uint8))):
        header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        (tmp_path / f"t10k-{name}-ubyte").write_bytes(header + array.tobytes())
    make_shard([str(tmp_path), str(tmp_path / "test.tar"), "--split", "test", "--per-class", "0"])
    dataset = ShardDataset([tmp_path / "test.tar"])
    assert [dataset[i].key for i in range(len(dataset))] == [f"test-{i:05d}" for i in range(5)]
    assert all((dataset[i].image[0] == images[i]).all() for i in range(5))
    assert dataset.labels.tolist() == [1, 1, 0, 1, 2]
    with tarfile.open(tmp_path / "test.tar", "r:") as tar:  # not compressed
        assert len(tar.getnames()) == 10


@pytest.mark.parametrize("content", [None, b"", b"\0\0\x08\x01\0\0\0\x05abc", b"\0\0\x0d\x01\0\0\0\0"])
def test_make_shard_refuses_other_files(tmp_path, content, capsys):
    if content is not None:
        (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(SystemExit, match="4"):
        make_shard([str(tmp_path), str(tmp_path / "out.tar.gz")])
    assert "idx" in capsys.readouterr().err
