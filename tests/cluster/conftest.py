"""The cluster of a test session, started once and stopped at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import NODES, Cluster, unusable
from tests.helpers.processes import REPOSITORY


def skip_or_fail(reason: str) -> None:
    """Skip; in CI, which must run these tests, fail."""
    if os.environ.get("DIFFMOE_REQUIRE_CLUSTER") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def checkout(folder: Path) -> Path:
    """Link the repository's files into a folder, which gets a ``runs`` directory of its own."""
    for name in ("diffmoe_ds", "ds_configs", "launchers", "slurm"):
        (folder / name).symlink_to(REPOSITORY / name)
    return folder


@pytest.fixture(scope="session")
def hosts(tmp_path_factory) -> Iterator[Cluster]:
    """Four nodes and a login node."""
    reason = unusable()
    if reason is not None:
        skip_or_fail(reason)
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def cluster(hosts) -> Iterator[Cluster]:
    """The cluster, with all nodes powered on and idle before and after the test."""
    yield hosts
    hosts.run("scancel --state=PENDING --user=root; scancel --user=root")
    hosts.until_idle(NODES)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A separate checkout."""
    return checkout(tmp_path)
