"""The rank that the others wait for is named, and traffic between hosts is estimated."""

from __future__ import annotations

import re

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffmoe_ds.distributed.stragglers import slowest
from tests.helpers.processes import WORKERS, run_ranks
from tests.helpers.training import training_arguments, write_json


@pytest.mark.parametrize(
    ("seconds", "rank", "is_straggler"),
    (([1.0, 1.0, 1.0, 1.6], 3, True), ([2.0, 1.9, 1.8, 1.7], 0, False), ([0.1, 0.3], 1, True), ([0.0, 0.0], 0, False)),
)
def test_slowest_against_the_median_of_the_others(seconds, rank, is_straggler):
    found = slowest(seconds, ("a", "b", "c", "d"), ratio=1.5)
    assert (found.rank, found.host, found.is_straggler) == (rank, "abcd"[rank], is_straggler)


def test_slow_rank_and_traffic_between_hosts(tmp_path):
    """Two ranks on different hosts, EP 2; rank 1 has a slow forward pass."""
    steps, images = 14, 16
    config = write_json(tmp_path / "ds.json", ep=2, zero=1, tensorboard={"enabled": True})
    overrides = [f"run.total_images={steps * images}", "run.straggler_steps=7", "run.straggler_ratio=2"]
    arguments = training_arguments(config, tmp_path / "run", *overrides)
    finished = run_ranks(2, [str(WORKERS / "slow_rank.py"), *arguments])
    assert finished.code == 0, finished.output
    said = re.findall(r"straggler  rank 1 on host1 takes 0\.0\d+ s per step for data loading", finished.output)
    assert len(said) == 2, finished.output
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("ranks/slowest_rank")] == [1, 1]
    assert all(event.value > 2 for event in events.Scalars("ranks/slowest_over_others"))
    assert "ranks/straggler/text_summary" in events.Tags()["tensors"]

    warned = re.search(r"EP groups of 2 span nodes: about ([\d.]+) (kB|MB)", finished.output)
    estimate = float(warned[1]) * {"kB": 1e3, "MB": 1e6}[warned[2]]
    counted = sum(map(int, re.findall(r"rank \d sent (\d+) bytes", finished.output))) / steps
    assert counted == pytest.approx(estimate, rel=0.2)
