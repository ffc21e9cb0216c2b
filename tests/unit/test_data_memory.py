"""Memory that grows with the dataset, in ranks and in loader workers."""

import errno
import gc
import io
import json
import multiprocessing
import os
import pickle
import re
import tarfile
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from benchmarks import memory
from diffmoe_ds.data.sources import folder
from diffmoe_ds.data.sources.compressed import StoredBytes
from diffmoe_ds.data.sources.folder import ImageFolder
from diffmoe_ds.data.sources.shards import Sample, ShardDataset
from diffmoe_ds.errors import DataError
from diffmoe_ds.training.host_memory import HostMemory, describe_largest, measure_host_memory
from tests.helpers.data import PNG, loader, take

MB = 2**20


def private_mb() -> float:
    """The memory that this process shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 2**10


class Collecting:
    """Images labelled with the memory of their worker in MB; a full garbage collection precedes all but the first."""

    labels, latents = np.zeros(1000, np.int64), None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        return Sample(np.zeros((1, 8, 8), np.uint8), 0, "")

    def describe(self, index: int) -> str:
        return f"{private_mb():.0f}"

    def prefetch(self, shards) -> None:
        self.labels = np.full(1000, private_mb(), np.int64)
        gc.collect()


def test_a_garbage_collection_in_a_worker_copies_nothing():
    objects = [[number] for number in range(10**6)]  # as many as torch and DeepSpeed have
    before, after = (
        batch.label[0].item()
        for batch in take(2, loader(Collecting(), num_workers=1, num_classes=10**6, global_batch=1, micro_batch=1))
    )
    assert len(objects) and before > 0 and after - before < 20


def test_the_names_of_image_files_take_little_memory(tmp_path, monkeypatch):
    def labelled(_):
        files = [f"n{number // 100:08d}/n{number // 100:08d}_{number:08d}.JPEG" for number in range(20_000)]
        return None, files, [0] * len(files)

    monkeypatch.setattr(folder, "_labelled", labelled)
    tracemalloc.start()
    try:
        images = ImageFolder(tmp_path)
        gc.collect()
        current, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert current / len(images) < 60, "bytes per image: 34 of its name, 8 of its place, 8 of its label"
    assert images.key(12_345) == "n00000123/n00000123_00012345"
    assert images.describe(19_999).endswith("n00000199/n00000199_00019999.JPEG")


def test_only_the_images_of_a_compressed_shard_are_kept(tmp_path):
    names = [f"{number}.{suffix}" for number in range(50) for suffix in ("xml", "png", "cls")]
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        for name in names:
            data = {"png": PNG + bytes([int(name[:-4])]), "cls": b"3", "xml": bytes(10**4)}[name[-3:]]
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "0.png"
        tar.addfile(link)
        label = tarfile.TarInfo("link.cls")
        label.size = 1
        tar.addfile(label, io.BytesIO(b"4"))
    dataset = ShardDataset([tmp_path / "a.tar.gz"])
    assert [dataset.image_bytes(number) for number in range(50)] == [PNG + bytes([number]) for number in range(50)]
    assert dataset[49].label == 3 and dataset.labels.tolist() == [3] * 50 + [4]
    with pytest.raises(DataError, match="has a link"):
        dataset.image_bytes(50)
    (stored,) = dataset._unpacked.values()
    assert os.fstat(stored._file.fileno()).st_size <= 50 * (len(PNG) + 1) + 1


def anonymous_mb() -> float:
    """The memory of this process that no file backs."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"Anonymous:\s+(\d+)", text)[1]) / 2**10


def test_decompressed_images_are_in_a_file_if_there_is_room_for_one(tmp_path, monkeypatch):
    data = np.random.default_rng(0).bytes(64 * MB)
    before = anonymous_mb()
    stored = [StoredBytes(data)]
    assert anonymous_mb() - before < 32 and stored[0]._data is None
    stored.append(pickle.loads(pickle.dumps(stored[0])))

    class Full(io.FileIO):
        """A file on a full disk."""

        def write(self, data) -> int:
            if self.tell():
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data[:1000])

    full = Full(tmp_path / "full", "w+")
    for opened in (lambda **_: full, lambda **_: io.FileIO("/nowhere/file", "w+")):
        monkeypatch.setattr(tempfile, "TemporaryFile", opened)
        stored.append(StoredBytes(data))
    assert full.closed
    for each in stored:
        buffers = bytearray(1000), np.empty(24, np.uint8)
        each.read(12_345, buffers)
        assert b"".join(buffers) == data[12_345 : 12_345 + 1024]


def test_the_log_describes_the_memory_of_the_rank_that_takes_most():
    alone = measure_host_memory()
    context = multiprocessing.get_context("fork")
    end = context.Event()
    worker = context.Process(target=end.wait)
    worker.start()
    try:
        both = measure_host_memory()
    finally:
        end.set()
        worker.join(60)
    assert both.workers == alone.workers + 1 and 0 < both.worker_mb < both.total_mb
    ranks = [HostMemory(377.6, 0, 0), HostMemory(1400.2, 2, 10.4), HostMemory(0, 0, 0)]
    assert describe_largest(ranks[:1]) == "rank 0 takes 378 MB of host memory"
    assert describe_largest(ranks) == (
        "rank 1 takes 1,400 MB of host memory with 2 loader workers, 10 MB for each of them; the most of 3 ranks"
    )


@pytest.mark.slow
def test_the_benchmark_compares_a_rank_with_its_imports(capsys):
    assert memory.main(["--json", "--workers", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {
        "imports_mb", "rank_mb", "rank_above_imports_mb", "workers_private_mb", "idle_worker_private_mb",
    }  # fmt: skip
    assert report["rank_mb"] > report["imports_mb"] > 50 and len(report["workers_private_mb"]) == 1
    assert report["idle_worker_private_mb"] > 0
