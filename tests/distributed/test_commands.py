"""Commands on several ranks: an error on one is reported once and all exit; every launcher trains the same."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import numpy as np
import pytest

from diffmoe_ds.checkpoint.load import CheckpointReader
from diffmoe_ds.checkpoint.verify import newest_valid
from tests.helpers.data import numbered_shard
from tests.helpers.processes import (
    LAUNCH_TIMEOUT,
    REPOSITORY,
    clean_environment,
    fork_server,
    free_port,
    rank_environment,
    run_processes,
    run_ranks,
    run_together,
)
from tests.helpers.sampling import sample
from tests.helpers.training import SMALLEST_MODEL, read_metrics, training_arguments, write_json


def test_all_ranks_exit_when_one_cannot_read_its_images(tmp_path):
    """One damaged image: exit code and file name, without a traceback or hung ranks. The steps before it are saved."""
    shard = numbered_shard(tmp_path / "broken.tar", 40, damaged=7)
    config = write_json(tmp_path / "ds.json", ep=2, zero=2, gradient_accumulation_steps=2)
    arguments = training_arguments(config, tmp_path / "run", f"data.path={shard}")
    finished = run_ranks(2, ["diffmoe_ds/train.py", *arguments])
    assert finished.code == 4 and "Traceback" not in finished.output, finished.output
    assert "sample '0007'" in finished.output and finished.output.count("diffmoe: error: ") == 1, finished.output
    images = read_metrics(tmp_path / "run")[-1]["images"]
    assert 0 < images == CheckpointReader(newest_valid(tmp_path / "run", full=True)).images


def test_an_error_that_every_rank_hits_before_joining_is_printed_once(tmp_path):
    config = write_json(tmp_path / "ds.json", ep=2, zero=1)
    arguments = training_arguments(config, tmp_path / "run", options=("--resume", "/nowhere"))
    finished = run_ranks(2, ["diffmoe_ds/train.py", *arguments])
    assert finished.code == 5 and finished.output.count("--resume /nowhere: not a checkpoint") == 1, finished.output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_process_that_joins_as_a_rank_for_the_second_time_blames_itself(tmp_path):
    """Not rank 0, which serves the others."""
    config, port = write_json(tmp_path / "ds.json", ep=2, zero=1), free_port()
    arguments = ["diffmoe_ds/train.py", *training_arguments(config, tmp_path / "run")]
    environments = [rank_environment(rank, 2, port) for rank in (1, 1, 0)]
    starts = [lambda file, e=e: fork_server().start(arguments, e, REPOSITORY, file) for e in environments]
    finished = run_together(starts, LAUNCH_TIMEOUT)
    assert finished.code == 1 and "Traceback" not in finished.output, finished.output
    name = f"rank 1 on {socket.gethostname()}: process "
    assert name in finished.output and "has already joined as this rank" in finished.output, finished.output
    assert finished.output.count("diffmoe: error: ") == 1, finished.output


def test_an_ep_size_that_does_not_fit_is_refused_before_the_rendezvous(tmp_path):
    config = write_json(tmp_path / "ds.json", ep=3, zero=1)
    finished = run_ranks(2, ["diffmoe_ds/train.py", *training_arguments(config, tmp_path / "r")])
    assert finished.code == 2 and "Traceback" not in finished.output
    assert finished.output.count("autoep_size must divide both the 2 rank(s) and the 4 expert(s), got 3") == 1
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_ddpm_trains_and_samples(train_tiny, tmp_path):
    run = train_tiny(2, 2, 1, "objective.kind=ddpm")
    for sampler in ("ddpm", "ddim"):
        options = ("--num-images", "2", "--sampler", sampler, "--cfg-scale", "2")
        sample(run.directory, tmp_path / sampler, *options)
        sample(run.directory, tmp_path / sampler, *options, "--guide-channels", "1")


@pytest.mark.slow
def test_deepspeed_torchrun_and_python_agree(tmp_path):
    """Three ways to start training: two launchers with two CPU ranks each, and plain Python with one."""
    config = write_json(tmp_path / "ds.json", ep="auto", zero=2)
    binaries = Path(sys.executable).parent
    rows = {}
    for name, start in {
        "deepspeed": [str(binaries / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())],
        "torchrun": [str(binaries / "torchrun"), "--nproc_per_node", "2", "--master_port", str(free_port())],
        "python": [sys.executable],
    }.items():
        directory = tmp_path / name
        command = [*start, "diffmoe_ds/train.py", *training_arguments(config, directory)]
        environment = clean_environment(PATH=f"{binaries}{os.pathsep}{os.environ['PATH']}")
        finished = run_processes([(command, environment)])
        assert finished.code == 0, finished.output
        rows[name] = read_metrics(directory)
    for key in ("loss", "grad_norm", "capacity_loss"):
        expected = [row[key] for row in rows["python"]]
        for name in ("deepspeed", "torchrun"):
            assert [row[key] for row in rows[name]] == pytest.approx(expected, abs=1e-5), (name, key)


@pytest.mark.slow
def test_a_non_finite_loss_exits_with_code_3(train_tiny):
    run = train_tiny(1, 1, 1, "optimizer.lr=1e30", code=3, gradient_clipping=0.0)
    assert "the loss is" in run.output and "Traceback" not in run.output


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((REPOSITORY / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_shipped_json_trains_a_step(path, tmp_path):
    """The README's command on two CPU ranks: one step of the embedded recipe with a tiny model."""
    arguments = training_arguments(path, tmp_path, "run.total_images=1", base=SMALLEST_MODEL)
    finished = run_ranks(2, ["diffmoe_ds/train.py", *arguments])
    assert finished.code == 0, finished.output
    assert np.isfinite(read_metrics(tmp_path)[0]["loss"])
