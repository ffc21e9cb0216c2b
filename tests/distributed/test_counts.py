"""What a training step waits for and sends, counted while it runs."""

from __future__ import annotations

import json

import pytest

from tests.helpers.processes import WORKERS, run_ranks
from tests.helpers.training import write_json

EXCHANGE = "all_to_all_single float32"
SELECTION = {"all_reduce int32": 2}
"""Two small messages find the K-th score, once the search is warm."""


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> dict[str, dict]:
    """Counts of the fourth step of a run for each case, on two ranks with EP 2 and ZeRO 2."""
    folder = tmp_path_factory.mktemp("counts")
    config = write_json(folder / "ds.json", ep=2, zero=2)
    finished = run_ranks(2, [str(WORKERS / "counting.py"), str(folder), str(config)])
    assert finished.code == 0, finished.output
    (line,) = (line for line in finished.output.splitlines() if line.startswith("counted "))
    return json.loads(line.removeprefix("counted "))


@pytest.mark.parametrize(("case", "messages"), (("pool=rank", {}), ("expert_choice", {}), ("pool=world", SELECTION)))
def test_messages_of_a_layer(counted, case, messages):
    for layer in counted[case]["layers"]:
        assert layer == {**messages, EXCHANGE: 2}


def test_recomputed_blocks_send_nothing_again(counted):
    assert counted["pool=world, recomputed"]["step"] == counted["pool=world"]["step"]


def test_messages_of_a_step(counted):
    """2 layers; the thresholds of all; losses, flags, errors and the last part of the thresholds' search together."""
    step = counted["pool=world"]["step"]
    assert step == {"all_reduce int32": 2 * 2 + 1 + 1, EXCHANGE: 2 * 4}


@pytest.mark.parametrize("case", ("pool=rank", "expert_choice"))
def test_a_step_waits_once_for_the_device_where_the_rule_fixes_all_sizes(counted, case):
    waits = counted[case]["waits"]
    assert sum(waits.values()) == 1, waits
