"""Resuming reads every byte of a checkpoint once, keeps nothing open, and fails on all ranks if it fails on one."""

from __future__ import annotations

import json

import pytest
import torch

from diffmoe_ds.checkpoint.load import CheckpointReader
from diffmoe_ds.checkpoint.verify import newest_valid
from tests.helpers.processes import WORKERS, run_ranks
from tests.helpers.training import training_arguments, write_json

FLOAT = 4
KINDS = 4
"""Master weights, two moments, averaged weights."""


def resume(tmp_path, run, world, ep, zero, failing=-1):
    """Resume a run whose training is complete, and return how it ended and what its ranks recorded."""
    config = write_json(tmp_path / f"resume_{zero}.json", ep, zero)
    folder = tmp_path / f"read_{world}_{zero}_{failing}"
    arguments = training_arguments(config, run.directory, "run.total_images=16")
    worker = [str(WORKERS / "recorded_reads.py"), str(folder), str(failing), "train", *arguments]
    finished = run_ranks(world, worker)
    return finished, [json.loads(file.read_text()) for file in sorted(folder.glob("*"))]


def sizes(run):
    """Bytes of the parameters in fp32, and of the buffers."""
    reader = CheckpointReader(newest_valid(run.directory, full=True))
    weights = sum(torch.Size(shape).numel() for shape in reader.metadata.shapes.values())
    return FLOAT * weights, FLOAT * sum(reader.buffers().values())


@pytest.mark.parametrize(
    ("layout", "zero"), [((2, 1), 1), *(pytest.param((2, 1), z, marks=pytest.mark.slow) for z in (0, 3))]
)
def test_ranks_read_every_byte_once_and_close_the_checkpoint(train_tiny, tmp_path, layout, zero):
    """Once for the weights of the model, once for the state of the optimizer; both ranks need all of the weights."""
    run = train_tiny(*layout, zero, "run.total_images=16")
    finished, ranks = resume(tmp_path, run, *layout, zero)
    assert finished.code == 0 and "already trained on 16 images" in finished.output, finished.output
    weights, buffers = sizes(run)
    assert sum(sum(rank["read"].values()) for rank in ranks) == (1 + KINDS) * weights + buffers
    assert [rank["held"] for rank in ranks] == [[], []]
    if zero:
        assert [list(rank["read"]) for rank in ranks] == [["rank_00000.safetensors"], ["rank_00001.safetensors"]]


@pytest.mark.slow
def test_replicas_of_experts_read_them_once_in_other_layouts(train_tiny, tmp_path):
    run = train_tiny(2, 2, 2, "run.total_images=16")
    for world, ep, zero in ((4, 2, 3), (4, 1, 1), (1, 1, 0)):
        finished, ranks = resume(tmp_path, run, world, ep, zero)
        assert finished.code == 0 and "at 16 images, resharding: " in finished.output, finished.output
        weights, buffers = sizes(run)
        assert sum(sum(rank["read"].values()) for rank in ranks) == (1 + KINDS) * weights + buffers
        assert not any(rank["held"] for rank in ranks)


@pytest.mark.slow
def test_all_ranks_exit_when_one_cannot_read_its_part(train_tiny, tmp_path):
    """A disk error after the verification: the rank takes part in the collectives until all have voted."""
    run = train_tiny(2, 1, 1, "run.total_images=16")
    for failing in (0, 1):
        finished, ranks = resume(tmp_path, run, 2, 1, 1, failing)
        assert finished.code == 5 and not ranks and finished.output.count("diffmoe: error: ") == 1, finished.output
        assert "rank_0000" in finished.output and "Input/output error" in finished.output
        assert "Traceback" not in finished.output
