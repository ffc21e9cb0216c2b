"""Downloads through fsspec: https and s3, retries, and one sentence for every failure."""

from __future__ import annotations

import sys
from multiprocessing import get_context
from pathlib import Path

import pytest

from diffmoe_ds.data.sources import remote
from diffmoe_ds.data.sources.remote import fetch
from diffmoe_ds.errors import DataError
from tests.helpers.web import serve

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.01)
    folder = tmp_path / "served"
    (folder / "bucket").mkdir(parents=True)
    (folder / "bucket" / "a.tar").write_bytes(CONTENT)
    with serve(folder) as server:
        yield server


@pytest.mark.parametrize("faults", [[503, 500], [429], ["cut", 502, "cut"]])
def test_transient_failures_are_retried(server, tmp_path, faults):
    server.faults = list(faults)
    fetch(f"{server.url}/bucket/a.tar", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert len(server.requests) == len(faults) + 1


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_refusal_is_not_retried(server, tmp_path, status):
    server.faults = [status]
    with pytest.raises(DataError, match=r"a.tar cannot be fetched: \S"):
        fetch(f"{server.url}/bucket/a.tar", tmp_path / "a")
    assert len(server.requests) == 1


def test_retries_end(server, tmp_path):
    server.faults = ["cut"] * 20
    with pytest.raises(DataError, match=r"a.tar cannot be fetched: \S"):
        fetch(f"{server.url}/bucket/a.tar", tmp_path / "a")
    assert len(server.requests) == remote.ATTEMPTS


def test_a_stalled_download_is_retried(server, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "READ_TIMEOUT", 0.3)
    server.faults = ["stall"]
    fetch(f"{server.url}/bucket/a.tar", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT and len(server.requests) == 2


def test_a_download_may_take_as_long_as_it_needs():
    assert remote._options("https")["client_kwargs"]["timeout"].total is None


def test_a_signed_url_is_sent_as_it_is(server, tmp_path):
    fetch(f"{server.url}/bucket/a.tar?signature=a%2Fb%3D&x=1%2B1", tmp_path / "a")
    assert server.requests == [("GET", "/bucket/a.tar?signature=a%2Fb%3D&x=1%2B1")]


def test_an_unreachable_server_is_an_error(server, tmp_path):
    port = server.server_port
    server.shutdown()
    server.server_close()
    with pytest.raises(DataError, match="cannot be fetched: Cannot connect to host"):
        fetch(f"http://127.0.0.1:{port}/a.tar", tmp_path / "a")


def _fetch_in_child(url: str, target: Path) -> None:
    fetch(url, target)


def test_a_forked_worker_downloads_after_its_parent_did(server, tmp_path):
    url = f"{server.url}/bucket/a.tar"
    fetch(url, tmp_path / "parent")
    process = get_context("fork").Process(target=_fetch_in_child, args=(url, tmp_path / "child"))
    process.start()
    process.join(60)
    assert process.exitcode == 0 and (tmp_path / "child").read_bytes() == CONTENT


def test_s3(server, tmp_path, monkeypatch):
    for name, value in {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    fetch("s3://bucket/a.tar", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert ("GET", "/bucket/a.tar") in server.requests
    with pytest.raises(DataError, match=r"shard s3://bucket/b.tar cannot be fetched: not found"):
        fetch("s3://bucket/b.tar", tmp_path / "b")


@pytest.mark.parametrize(
    ("url", "module", "message"),
    [
        ("s3://b/a.tar", "s3fs", r"s3:// needs s3fs, which is not installed: pip install 'diffmoe_ds\[s3\]'"),
        ("gs://b/a.tar", "gcsfs", r"gs:// needs gcsfs, which is not installed: pip install 'diffmoe_ds\[gcs\]'"),
        ("hf://datasets/o/n/a.tar", "huggingface_hub", r"hf:// needs .*: pip install huggingface_hub"),
        ("ais://b/a.tar", None, r"unknown scheme 'ais'; use https://, s3://, gs:// or hf://, or pipe:COMMAND"),
    ],
)
def test_a_missing_library_and_an_unknown_scheme_are_named(tmp_path, monkeypatch, url, module, message):
    known = sys.modules["fsspec.registry"]._registry  # forget what was imported before
    monkeypatch.delitem(known, url.partition("://")[0], raising=False)
    if module is not None:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=message) as caught:
        fetch(url, tmp_path / "a")
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_not_the_servers_fault(server, tmp_path, monkeypatch):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        fetch(f"{server.url}/bucket/a.tar", Path("/dev/full"))
    assert len(server.requests) == 1
