"""Remote shards: fetched once for all readers, never partially, and evicted when the cache is full."""

from __future__ import annotations

import gzip
import os
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from diffmoe_ds.cli import main
from diffmoe_ds.config.load import load_config
from diffmoe_ds.data.dataset import open_dataset
from diffmoe_ds.data.sources.cache import ShardCache
from diffmoe_ds.data.sources.remote import is_url
from diffmoe_ds.data.sources.shard_paths import expand
from diffmoe_ds.data.sources.shards import ShardDataset
from diffmoe_ds.errors import ConfigError, DataError
from tests.helpers.data import GREY, assert_same, by_position, image_file, loader, take, write_tar
from tests.helpers.web import serve
from tests.unit.test_data_latents import index_of

COUNT = 12


@pytest.fixture
def served(tmp_path) -> Path:
    """Four shards of three images."""
    folder = tmp_path / "served"
    folder.mkdir()
    for shard in range(4):
        numbers = range(shard * 3, shard * 3 + 3)
        members = [(f"{n:02d}.png", image_file(GREY + n)) for n in numbers]
        members += [(f"{n:02d}.cls", b"%d" % (n % 4)) for n in numbers]
        write_tar(folder / f"s-{shard}.tar", sorted(members))
    return folder


@pytest.fixture
def url(served):
    """The address of a web server that serves them."""
    with serve(served) as server:
        yield server.url


def pipes(folder: Path) -> list[str]:
    return [f"pipe:echo {n} >> {folder}/uses; cat {folder}/served/s-{n}.tar" for n in range(4)]


def uses(folder: Path) -> list[str]:
    return sorted((folder / "uses").read_text().split())


def test_what_is_a_url():
    for text in ("pipe:cat a.tar", "http://x/a.tar", "https://x/a-{0..3}.tar", "gs://b/a.tar", "hf://x/a.tar"):
        assert is_url(text)
    for text in ("a.tar", "/a/b.tar", "a:b.tar", "shards-{000..127}.tar", "~/a.tar", "C:/a.tar"):
        assert not is_url(text)
    assert expand("pipe:cat {0..1}.tar") == ["pipe:cat 0.tar", "pipe:cat 1.tar"]


@pytest.mark.parametrize("window", [0, 4])
def test_the_stream_is_the_same_as_from_local_files(served, url, tmp_path, window):
    local = by_position(take(3, loader(ShardDataset(expand(served)), shuffle_window=window)))
    for number, path in enumerate((f"{url}/s-{{0..3}}.tar", f"pipe:cat {served}/s-{{0..3}}.tar")):
        dataset = ShardDataset(expand(path), ShardCache(tmp_path / f"cache-{number}", 10**9))
        assert_same(by_position(take(3, loader(dataset, shuffle_window=window))), local)
        assert_same(by_position(take(3, loader(dataset, shuffle_window=window, num_workers=2))), local)
        assert dataset.remote_bytes() == sum(path.stat().st_size for path in served.glob("*.tar"))


def test_an_index_next_to_the_shards_is_used_and_shards_are_fetched_on_demand(served, url, tmp_path):
    index_of(served)
    cache = ShardCache(tmp_path / "cache", 10**9)
    dataset = ShardDataset(expand(f"{url}/s-{{0..3}}.tar"), cache)
    assert len(dataset) == COUNT and not list(cache.folder.glob("*.tar"))
    assert dataset[4].label == 0 and len(list(cache.folder.glob("*.tar"))) == 1
    dataset.prefetch([0, 1, 3])
    deadline = time.monotonic() + 120
    while len(list(cache.folder.glob("*.tar"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(list(cache.folder.glob("*.tar"))) == 3
    with open(served / "s-2.tar", "ab") as file:
        file.write(bytes(512))
    with pytest.raises(DataError, match=r"s-2.tar has \d+ bytes where \d+ were indexed"):
        dataset[7]


def test_a_cached_shard_whose_size_differs_from_the_index_is_fetched_again(served, url, tmp_path):
    cache = ShardCache(tmp_path / "cache", 10**9)
    assert len(ShardDataset(expand(f"{url}/s-{{0..3}}.tar"), cache)) == COUNT  # fetches all
    members = []
    for n in range(4):
        members += [(f"{n}.png", image_file(GREY + 100 + n)), (f"{n}.cls", b"3"), (f"{n}.txt", bytes(4096))]
    write_tar(served / "s-2.tar", members)
    index_of(served)
    dataset = ShardDataset(expand(f"{url}/s-{{0..3}}.tar"), cache)
    for number in range(4):
        assert dataset[6 + number].label == 3 and (dataset[6 + number].image == GREY + 100 + number).all()


def read_all(folder: Path) -> None:
    dataset = ShardDataset(pipes(folder), ShardCache(folder / "cache", 10**9))
    assert [dataset[i].label for i in range(COUNT)] == [n % 4 for n in range(COUNT)]


def test_processes_on_a_host_fetch_each_shard_once(served, tmp_path):
    context = get_context("fork")
    processes = [context.Process(target=read_all, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert uses(tmp_path) == ["0", "1", "2", "3"]


def test_room_is_made_for_new_shards(served, tmp_path):
    one = (served / "s-0.tar").stat().st_size
    cache = ShardCache(tmp_path / "cache", 2 * one)
    dataset = ShardDataset(pipes(tmp_path), cache)
    for index in (0, 3, 0, 6, 0, 9, 0, 3):
        assert dataset[index].label == index % 4
        assert len(list(cache.folder.glob("*.tar"))) <= 2
    files = list(cache.folder.glob("*.tar"))
    for path in files:
        path.unlink()
    assert dataset[0].label == 0, "a reader keeps what it has open"


def test_a_gzipped_shard_is_stored_unpacked(served, tmp_path):
    packed = tmp_path / "s.tar.gz"
    packed.write_bytes(gzip.compress((served / "s-1.tar").read_bytes()))
    dataset = ShardDataset([f"pipe:cat {packed}"], ShardCache(tmp_path / "cache", 10**9))
    assert dataset[2].key == "05" and (dataset[2].image == GREY + 5).all()
    packed.write_bytes(packed.read_bytes()[:-30])
    with pytest.raises(DataError, match="is not a complete gzip file"):
        ShardDataset([f"pipe:cat  {packed}"], ShardCache(tmp_path / "cache", 10**9))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("pipe:false", "shard pipe:false cannot be fetched"),
        ("pipe:cat /nowhere/a.tar", "cannot be fetched"),
        ("pipe:head -c 700 SERVED/s-0.tar", "is not a readable, complete tar"),
        ("pipe:head -c 700 SERVED/s-0.tar; exit 3", "cannot be fetched"),
        ("URL/missing.tar", "missing.tar cannot be fetched"),
        ("nosuch://a/b.tar", "nosuch://a/b.tar cannot be fetched: unknown scheme 'nosuch'; .* or pipe:COMMAND"),
    ],
)
def test_what_cannot_be_fetched_is_named_and_not_kept(served, url, tmp_path, path, message):
    path = path.replace("SERVED", str(served)).replace("URL", url)
    with pytest.raises(DataError, match=message) as caught:
        ShardDataset([path], ShardCache(tmp_path / "cache", 10**9))
    assert "\n" not in str(caught.value)
    if "complete tar" not in message:
        assert not list((tmp_path / "cache").glob("*.tar"))
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_file() and p.suffix not in (".tar", ".lock")]


def test_the_cache_must_hold_what_is_read_at_once(served, tmp_path, capsys):
    path = f"data.path=pipe:cat {served}/s-{{0..3}}.tar"
    small = ["data.cache_gb=1e-5", f"data.cache_dir={tmp_path / 'cache'}", "model.num_classes=4"]
    with pytest.raises(ConfigError, match=r"data.cache_gb is 1e-05, .* or set data.shuffle=window"):
        open_dataset(load_config("fashion", [path, *small]))
    arguments = ["prepare", "images", "--images", path.removeprefix("data.path="), "--size", "4", "--cache-gb", "1e-5"]
    arguments += ["--cache-dir", str(tmp_path / "other"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2 and not (tmp_path / "out").exists()
    assert "--cache-gb is 1e-05, but preparation mixes the images of all shards, 4.1e-05 GB" in capsys.readouterr().err
    arguments[arguments.index("1e-5")] = "1e-4"
    assert main(arguments) == 0 and len(list((tmp_path / "other").glob("*.tar"))) == 4
    small[0] = f"data.cache_gb={4 * os.path.getsize(served / 's-0.tar') / 1e9}"
    open_dataset(load_config("fashion", [path, *small, "data.shuffle=window", "data.shuffle_window=3"]))
