"""What a training step waits for and sends, counted while it runs; and the numbers of padded dispatch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.processes import WORKERS, run_ranks
from tests.helpers.training import read_metrics, write_json

EXCHANGE = "all_to_all_single float32"
SELECTION = {"all_reduce int32": 2}
"""Two small messages find the K-th score, once the search is warm."""


def count(folder: Path, *cases: str) -> dict[str, dict]:
    """Return counts of the fourth step of a run for each case, on two ranks with EP 2, and all steps' metrics."""
    write_json(folder / "zero2.json", ep=2, zero=2)
    write_json(folder / "zero3.json", ep=2, zero=3, gradient_accumulation_steps=2)
    finished = run_ranks(2, [str(WORKERS / "counting.py"), str(folder), *cases])
    assert finished.code == 0, finished.output
    (line,) = (line for line in finished.output.splitlines() if line.startswith("counted "))
    counts = json.loads(line.removeprefix("counted "))
    return {case: {**found, "metrics": read_metrics(folder / case)} for case, found in counts.items()}


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> dict[str, dict]:
    cases = ("pool=rank", "pool=world", "pool=world, recomputed", "pool=world, padded", "expert_choice")
    return count(tmp_path_factory.mktemp("counts"), *cases)


@pytest.fixture(scope="module")
def counted_more(tmp_path_factory) -> dict[str, dict]:
    cases = ("pool=world", "pool=world, overflowing", "ZeRO 3", "ZeRO 3, padded")
    cases += ("token_choice", "token_choice, padded")
    return count(tmp_path_factory.mktemp("counts"), *cases)


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


@pytest.mark.parametrize("case", ("pool=rank", "expert_choice", "pool=world, padded"))
def test_a_step_waits_once_for_the_device_where_sizes_are_fixed(counted, case):
    waits = counted[case]["waits"]
    assert sum(waits.values()) == 1, waits


@pytest.mark.slow
def test_a_step_with_padded_token_choice_waits_once_for_the_device(counted_more):
    waits = counted_more["token_choice, padded"]["waits"]
    assert sum(waits.values()) == 1, waits


def test_padding_needs_no_other_messages(counted):
    assert counted["pool=world, padded"]["step"] == counted["pool=world"]["step"]


KEYS = ("loss", "diffusion_loss", "capacity_loss", "grad_norm")


def test_padding_does_not_change_the_numbers(counted):
    check_same_numbers(counted, "pool=world", "padded", (0,))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "padding", "redone"), (("pool=world", "overflowing", (4,)), ("ZeRO 3", "padded", range(1, 8)))
)
def test_repeated_micro_steps_do_not_change_the_numbers(counted_more, case, padding, redone):
    check_same_numbers(counted_more, case, padding, redone)


def check_same_numbers(counted, case, padding, redone):
    """Bit for bit, whether ranks compute with padding in the 4 or 8 micro-steps or lose rows and repeat them."""
    exact, padded = counted[case]["metrics"], counted[f"{case}, {padding}"]["metrics"]
    assert len(exact) == 4
    assert [[row[key] for key in KEYS] for row in padded] == [[row[key] for key in KEYS] for row in exact]
    assert sum(row["redone"] for row in padded) in redone
    assert "redone" not in exact[0]


@pytest.mark.slow
def test_computed_padding_does_not_change_the_numbers(counted_more):
    """Experts under token_choice do not know how many of their rows are padding, so sums are rounded differently."""
    exact, padded = (counted_more[case]["metrics"] for case in ("token_choice", "token_choice, padded"))
    assert [row["redone"] for row in padded] == [0] * 4
    for key in (*KEYS, "balance_loss"):
        assert [row[key] for row in padded] == pytest.approx([row[key] for row in exact], abs=1e-6), key
