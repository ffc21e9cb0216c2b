"""Reading checkpoints by offset: damaged headers, any partition of a tensor, what stays open."""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from diffmoe_ds.checkpoint import load
from diffmoe_ds.checkpoint.layout import KINDS, META, fragment_key, rank_file
from diffmoe_ds.checkpoint.load import CheckpointReader
from diffmoe_ds.checkpoint.metadata import CheckpointMetadata, ScheduledValues
from diffmoe_ds.checkpoint.pieces import NUMBER, ROW_BYTES
from diffmoe_ds.checkpoint.tensor_file import MAX_HEADER_BYTES, TensorFile
from diffmoe_ds.checkpoint.verify import newest_valid
from diffmoe_ds.config.schema import Config
from diffmoe_ds.errors import CheckpointError
from diffmoe_ds.files import write_json


def encoded(tree: object, size: int) -> bytes:
    """Return a safetensors file with this header and ``size`` bytes of tensors."""
    text = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


def entry(first: int, last: int, shape: object = None, dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": [(last - first) // 4] if shape is None else shape, "data_offsets": [first, last]}


DAMAGED = {
    "empty": (b"", "truncated"),
    "short": (b"\1\0\0", "truncated"),
    "header beyond the end": ((1 << 60).to_bytes(8, "little"), "its header has 1,152,921,504,606,846,976 bytes"),
    "large header": (encoded(b" " * (MAX_HEADER_BYTES + 1), 0), "its header has 16,777,217 bytes"),
    "not JSON": (encoded(b"{", 0), "its header is damaged"),
    "nested": (encoded(b"[" * 100_000, 0), "its header is damaged"),
    "digits": (encoded(b'{"a": ' + b"1" * 5000 + b"}", 0), "its header is damaged"),
    "list": (encoded([1], 0), "its header is damaged"),
    "no offsets": (encoded({"a": {"dtype": "F32", "shape": [0]}}, 0), "its header is damaged"),
    "gap": (encoded({"a": entry(0, 4), "b": entry(8, 12)}, 12), "'b' overlaps another tensor, or leaves a gap"),
    "overlap": (encoded({"a": entry(0, 8), "b": entry(4, 12)}, 12), "'b' overlaps another tensor"),
    "name twice": (encoded(b'{"a": %b, "a": %b}' % ((json.dumps(entry(0, 4)).encode(),) * 2), 8), "but 8 follow"),
    "more bytes": (encoded({"a": entry(0, 4)}, 8), "it describes 4 bytes, but 8 follow"),
    "fewer bytes": (encoded({"a": entry(0, 8)}, 4), "it describes 8 bytes, but 4 follow"),
    "shape": (encoded({"a": entry(0, 8, [3])}, 8), "it describes a tensor as"),
    "large shape": (encoded({"a": entry(0, 8, [10**18] * 8)}, 8), "it describes a tensor as"),
    "dimensions": (encoded({"a": entry(0, 4, [1] * 9)}, 4), "it describes a tensor as"),
    "negative": (encoded({"a": entry(0, 4, [-1, -1])}, 4), "it describes a tensor as"),
    "boolean": (encoded({"a": entry(0, 4, [True])}, 4), "it describes a tensor as"),
    "type": (encoded({"a": entry(0, 4, dtype=["F32"])}, 4), "it describes a tensor as"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_header_is_one_error_that_names_the_file(tmp_path, case):
    data, message = DAMAGED[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="cannot be read: ") as caught:
        TensorFile(path).header()
    assert message in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("make", (os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path), lambda path: None))
def test_what_is_not_a_file_is_refused_at_once(tmp_path, make):
    path = tmp_path / "x.safetensors"
    make(path)
    with pytest.raises(CheckpointError, match=r"cannot be read: (not a regular file|Is a directory|No such file)"):
        TensorFile(path)


def test_an_error_of_closing_a_file_that_was_read_is_ignored(tmp_path):
    path = tmp_path / "file"
    path.touch()
    file = TensorFile(path)
    os.close(next(int(link.name) for link in Path("/proc/self/fd").iterdir() if os.path.realpath(link) == str(path)))
    file.close()


def test_files_of_the_safetensors_library_are_read(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.zeros(0), "d": torch.tensor(2.5)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = TensorFile(tmp_path / "x.safetensors")
    header = file.header()
    assert {name: stored.shape for name, stored in header.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    for name, tensor in tensors.items():
        out = torch.empty_like(tensor.flatten())
        file.read(header[name].offset, out)
        assert torch.equal(out, tensor.flatten())
    with pytest.raises(CheckpointError, match="truncated"):
        file.read(header["a"].offset, torch.empty(1000))


def checkpoint(path, files, shape):
    """Write a checkpoint with one parameter; `files` are lists of (kind, start, tensor)."""
    path.mkdir()
    for number, fragments in enumerate(files):
        save_file({fragment_key(k, "w", start): t for k, start, t in fragments}, path / rank_file(number))
    metadata = CheckpointMetadata(len(files), 0, 0, 0, {"w": shape}, Config(), ScheduledValues(0.0, ()))
    write_json(path / META, metadata.to_json())
    return CheckpointReader(path)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.data())
def test_any_range_is_read_from_any_partition(tmp_path_factory, data):
    numel = data.draw(st.integers(1, 60))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, numel - 1)), max_size=8)) | {0, numel})
    pieces = list(pairwise(cuts))
    files = [[] for _ in range(data.draw(st.integers(1, 4)))]
    whole = {kind: torch.arange(numel) + 1000.0 * place for place, kind in enumerate(KINDS)}
    for kind in KINDS:
        for low, high in pieces:
            files[data.draw(st.integers(0, len(files) - 1))].append((kind, low, whole[kind][low:high].clone()))
    reader = checkpoint(tmp_path_factory.mktemp("partition") / "c", files, (numel,))
    for kind in KINDS:
        start = data.draw(st.integers(0, numel - 1))
        count = data.draw(st.integers(0, numel - start))
        assert torch.equal(reader.read(kind, "w", start, count), whole[kind][start : start + count])


def test_gaps_are_errors_and_unknown_tensors_are_ignored(tmp_path):
    ones = torch.ones(4)
    reader = checkpoint(tmp_path / "c", [[("fp32", 0, ones), ("later", 0, ones + 1)], [("fp32", 6, ones)]], (10,))
    assert reader.kinds() == ["fp32"]
    assert torch.equal(reader.read("fp32", "w", 6, 4), ones)
    for kind, start, numel, held in (("fp32", 0, 10, 4), ("fp32", 4, 4, 0), ("ema", 0, 4, 0), ("fp32", 8, 4, 2)):
        with pytest.raises(CheckpointError, match=f"holds {held} of the {numel} elements requested of {kind} 'w'"):
            reader.read(kind, "w", start, numel)
    for key in ("fp32/w@", f"fp32/w@1{'0' * 30}"):
        save_file({key: ones}, tmp_path / "c" / rank_file(1))
        with pytest.raises(CheckpointError, match=r"rank_00001\.safetensors: cannot be read: "):
            CheckpointReader(tmp_path / "c").kinds()


def opened(reader):
    prefix = str(reader.path)
    return [link for link in map(os.readlink, (f"/proc/self/fd/{n}" for n in numbers())) if link.startswith(prefix)]


def numbers():
    return [name for name in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{name}")]


def test_few_files_are_open_and_none_after_closing(tmp_path, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (12, 12))
    reader = checkpoint(tmp_path / "c", [[("fp32", 2 * n, torch.full((2,), float(n)))] for n in range(9)], (18,))
    assert opened(reader) == []
    for _ in range(2):
        assert reader.read("fp32", "w", 0, 18).tolist() == [n // 2 for n in range(18)]
        assert len(opened(reader)) == 3
        reader.close()
        assert opened(reader) == []
    with open("/proc/self/maps") as maps:
        assert str(reader.path) not in maps.read()


@pytest.mark.parametrize("start, numel", ((3, 4), (6, 1), (0, 7)))
def test_a_piece_that_ends_beyond_its_tensor_is_refused(tmp_path, start, numel):
    pieces = [[("ema", 0, torch.ones(6)), ("ema", start, torch.ones(numel))]]
    reader = checkpoint(tmp_path / "c", pieces, (2, 3))
    with pytest.raises(CheckpointError, match=rf"cannot be read: 'ema/w@{start}' ends beyond w\.$"):
        reader.read("ema", "w", 0, 6)


def test_every_file_of_many_is_opened_once(tmp_path, monkeypatch):
    """A tensor of ZeRO 3 is in all files, so reading tensor after tensor would open them again and again."""
    limits, files = [(256, 4096)], []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, values: limits.append(values))
    monkeypatch.setattr(load, "TensorFile", lambda path: files.append(path) or TensorFile(path))
    pieces = [[(kind, n, torch.ones(1)) for kind in ("fp32", "ema")] for n in range(300)]
    reader = checkpoint(tmp_path / "c", pieces, (300,))
    for kind in ("fp32", "ema"):
        assert torch.equal(reader.read(kind, "w", 0, 300), torch.ones(300))
    assert len(files) == 300 and limits == [(256, 4096), (4096, 4096)]
    reader.close()


def test_the_garbage_collector_is_paused_while_headers_are_read(tmp_path, monkeypatch):
    checkpoint(tmp_path / "a", [[("fp32", 0, torch.zeros(3))], [("fp32", 3, torch.zeros(3))]], (6,))
    header, enabled = TensorFile.header, []
    monkeypatch.setattr(TensorFile, "header", lambda file: (enabled.append(gc.isenabled()), header(file))[1])
    assert CheckpointReader(tmp_path / "a").kinds() == ["fp32"]
    assert enabled == [False, False] and gc.isenabled()
    os.truncate(tmp_path / "a" / rank_file(1), 100)
    with pytest.raises(CheckpointError, match=rank_file(1)):
        CheckpointReader(tmp_path / "a").kinds()
    assert gc.isenabled()


def test_constructing_a_reader_reads_the_metadata_only(run_copy):
    path = newest_valid(run_copy, full=True)
    (path / rank_file(0)).unlink()
    reader = CheckpointReader(path)
    assert reader.images == 96 and reader.is_current()
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors: cannot be read: No such file or directory"):
        reader.kinds()


def test_another_checkpoint_of_the_same_name_is_noticed(run_copy):
    path = newest_valid(run_copy, full=True)
    reader = CheckpointReader(path)
    shutil.copytree(path, path.with_name("copy"))
    shutil.rmtree(path)
    assert not reader.is_current()
    path.with_name("copy").rename(path)
    assert not reader.is_current() and CheckpointReader(path).is_current()


def test_an_index_takes_64_bytes_per_piece_whatever_their_kinds(tmp_path):
    fragments = [[(kind, 2 * n, torch.ones(2)) for kind in KINDS] for n in range(5)]
    rows = checkpoint(tmp_path / "c", fragments, (10,)).scan(range(5))
    assert len(rows) == 5 and rows.nbytes == 5 * ROW_BYTES == 5 * 64 and set(rows[:, NUMBER]) == {0}
