"""``diffmoe prepare`` in several processes, some of which fail or are killed."""

from __future__ import annotations

import json
import sys

import pytest

from tests.helpers.data import photographs
from tests.helpers.processes import clean_environment, run_processes, run_ranks


def test_rank_0_notices_ranks_that_failed(tmp_path):
    bad = photographs(tmp_path / "photographs", 8, size=24)
    for path in (bad / "class-0").iterdir():
        path.write_bytes(b"")
    arguments = ["prepare", "images", "--images", str(bad), "--size", "16", "--shard-images", "4", "--out"]
    finished = run_ranks(2, ["-m", "diffmoe_ds.cli", *arguments, str(tmp_path / "failed")])
    assert finished.code == 4 and "images could not be read" in finished.output
    assert "Traceback" not in finished.output and not (tmp_path / "failed" / "index.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("latents", "text"))
@pytest.mark.parametrize(
    ("ranks", "kills"), (pytest.param(2, 2, id="short"), pytest.param(4, 5, id="long", marks=pytest.mark.long))
)
def test_killed_at_random_times_and_finished(tmp_path, kind, ranks, kills):
    """On one rank, on several ranks, and on several that are killed repeatedly; see the worker."""
    arguments = ["--kind", kind, "--images", "600", "--size", "32", "--shard-images", "12", "--ranks", str(ranks)]
    command = [sys.executable, "-m", "tests.distributed.workers.killed_prepare", *arguments, "--kills", str(kills)]
    finished = run_processes([(command, clean_environment())], timeout=1200)
    assert finished.code == 0, finished.output
    report = json.loads(finished.output.splitlines()[-1])
    assert report["same_on_more_ranks"] and report["same_after_kills"]
    assert len(report["shards_done_at_each_kill"]) == kills
    assert report["shards_done_at_each_kill"] == sorted(report["shards_done_at_each_kill"])
