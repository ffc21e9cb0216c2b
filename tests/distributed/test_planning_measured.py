"""Planned memory and bytes against those of real steps on two ranks."""

from __future__ import annotations

import json

import pytest

from diffmoe_ds.config.load import load_config
from diffmoe_ds.planning.layout import LayoutRequest, resolve_layout
from diffmoe_ds.planning.memory import step_memory
from diffmoe_ds.planning.messages import step_messages
from diffmoe_ds.planning.simulate import estimate_passes
from tests.helpers.processes import WORKERS, run_ranks
from tests.helpers.training import training_arguments, write_json

CASES = (
    (2, 0, False, ("routing.pool=rank",)),
    (1, 1, True, ("model.activation_checkpointing=true",)),
    (2, 2, False, ("routing.kind=token_choice",)),
    (2, 3, True, ("routing.kind=expert_choice", "routing.capacity_predictor=false")),
)
"""EP size, ZeRO stage, bf16, and overrides."""
BASE = ("model.name=tiny-E4", "run.total_images=48", "run.sample_every_images=0", "run.straggler_steps=0")


@pytest.mark.slow
def test_memory_and_bytes_of_real_steps(tmp_path):
    runs, planned = [], []
    for number, (ep, zero, bf16, overrides) in enumerate(CASES):
        zero_section = {"stage": zero, "reduce_bucket_size": 200_000, "stage3_param_persistence_threshold": 10_000}
        path = write_json(
            tmp_path / f"{number}.json", ep, zero, gradient_clipping=0.0, bf16={"enabled": bf16},
            zero_optimization=zero_section,
        )  # fmt: skip
        runs.append(training_arguments(path, tmp_path / f"run_{number}", *overrides, base=BASE))
        config = load_config("fashion", [*BASE, *overrides])
        planned.append(resolve_layout(LayoutRequest(2, 2), config, json.loads(path.read_text()), str(path)))
    finished = run_ranks(2, [str(WORKERS / "measure_steps.py"), str(tmp_path), json.dumps(runs)])
    assert finished.code == 0, finished.output
    measured = json.loads(next(line for line in finished.output.splitlines() if line.startswith("[{")))
    for case, layout, step in zip(CASES, planned, measured, strict=True):
        memory = step_memory(layout, estimate_passes(layout))
        assert memory.total == pytest.approx(step.pop("peak"), rel=0.1), case
        sums = {}
        for message in step_messages(layout):
            sums[message.collective] = sums.get(message.collective, 0) + message.bytes
        if "token_choice" in str(case):  # which rank holds how many of an expert's tokens depends on the data
            assert sums.pop("all_to_all") == pytest.approx(step.pop("all_to_all"), rel=0.3), case
        if layout.pool_ranks > 1 and layout.config.has_capacity_predictor:  # so does how a search of a new model ends
            assert sums.pop("all_reduce") == pytest.approx(step.pop("all_reduce"), rel=0.2), case
        assert sums == step, case
