"""Runs that must stop or continue: non-finite values, full disks, signals."""

from __future__ import annotations

import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import IO

import pytest

from diffmoe_ds.checkpoint.load import CheckpointReader
from diffmoe_ds.checkpoint.verify import candidates, newest_valid
from tests.faults.shim import Rule, fault_environment
from tests.helpers.processes import (
    LAUNCH_TIMEOUT,
    REPOSITORY,
    WORKERS,
    ColdProcess,
    ForkedProcess,
    clean_environment,
    fork_server,
    run_ranks,
    wait_for_end,
)
from tests.helpers.training import read_metrics, training_arguments, write_json


def poisoned(tmp_path, where, steps, zero, *overrides, world=2, **changes):
    config = write_json(tmp_path / "ds.json", ep=world, zero=zero, **changes)
    arguments = ["train", *training_arguments(config, tmp_path / "run", *overrides)]
    finished = run_ranks(world, [str(WORKERS / "poison.py"), where, str(world - 1), steps, *arguments])
    assert "Traceback" not in finished.output, finished.output
    return finished


SLOW = [pytest.param(zero, bf16, marks=pytest.mark.slow) for zero, bf16 in ((0, False), (2, True))]


@pytest.mark.parametrize(("zero", "bf16"), [(3, True), *SLOW])
def test_an_infinite_gradient_stops_before_the_update(tmp_path, zero, bf16):
    """At step 3, with ZeRO 0, 2 and 3; what was trained before is saved, with finite weights."""
    changes = {"bf16": {"enabled": bf16}}
    finished = poisoned(tmp_path, "gradient", "3", zero, **changes)
    assert finished.code == 3, finished.output
    where = "on rank 1, first in the gradient of blocks.1.mlp.gate_weight, at step 3 (32 images seen)"
    assert where in finished.output, finished.output
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2]
    reader = CheckpointReader(newest_valid(tmp_path / "run", full=True))
    assert reader.metadata.images == 32
    for name, shape in reader.metadata.shapes.items():
        assert reader.read("fp32", name, 0, math.prod(shape)).isfinite().all(), name


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "bf16"), [(0, False), (0, True), (1, False), (2, True), (3, False)])
def test_allowed_skips_leave_no_trace(tmp_path, zero, bf16):
    """Steps 2 and 4 of 5 are non-finite and skipped: three updates, five batches of images, and finite weights."""
    scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_max_lr": 1e-3}}
    changes = {"bf16": {"enabled": bf16}, "scheduler": scheduler}
    finished = poisoned(tmp_path, "gradient", "2,4", zero, "run.nonfinite_skips=1", **changes)
    assert finished.code == 0, finished.output
    assert finished.output.count("(1 of 1 in a row)") == 2
    assert finished.output.count("on rank 1, first in the gradient of blocks.1.mlp.gate_weight") == 2, finished.output
    rows = read_metrics(tmp_path / "run")
    assert [(row["step"], row["images"]) for row in rows] == [(1, 16), (2, 48), (3, 80)]
    reader = CheckpointReader(newest_valid(tmp_path / "run", full=True))
    assert reader.metadata.adam_step == 3 and reader.metadata.lr_scheduler["last_batch_iteration"] == 2
    for name, shape in reader.metadata.shapes.items():
        numel = math.prod(shape)
        for kind in ("fp32", "exp_avg", "exp_avg_sq", "ema"):
            assert reader.read(kind, name, 0, numel).isfinite().all(), (kind, name)


@pytest.mark.parametrize("zero", (1, pytest.param(3, marks=pytest.mark.slow)))
def test_an_infinite_activation_is_traced_to_its_layer(tmp_path, zero):
    finished = poisoned(tmp_path, "forward", "2", zero, "model.activation_checkpointing=true")
    assert finished.code == 3
    assert "on rank 1, first in blocks.2.attn, at step 2 (16 images seen)" in finished.output, finished.output


@pytest.mark.parametrize("save_every", (48, pytest.param(0, marks=pytest.mark.slow)))
def test_a_run_whose_last_step_is_skipped_is_saved(tmp_path, save_every):
    """Also while the previous checkpoint is still being written."""
    length = ("run.total_images=64", "run.nonfinite_skips=2", f"run.save_every_images={save_every}")
    finished = poisoned(tmp_path, "gradient", "4", 1, *length)
    assert finished.code == 0 and "(1 of 2 in a row)" in finished.output, finished.output
    assert "already trained on" not in finished.output
    every = [CheckpointReader(path).metadata for path in candidates(tmp_path / "run")]
    expected = [(64, 3), (48, 3)] if save_every else [(64, 3)]
    assert [(saved.images, saved.step) for saved in every] == expected


def test_checkpoints_by_time(tmp_path):
    """Rank 0's clock decides, and another save postpones the next one."""
    config = write_json(tmp_path / "ds.json", ep=2, zero=1)
    length = (
        "run.total_images=64",
        "run.save_every_minutes=1e-6",
        "checkpoint.async_save=false",
        "checkpoint.keep_last=0",
    )
    arguments = training_arguments(config, tmp_path / "run", *length)
    finished = run_ranks(2, ["diffmoe_ds/train.py", *arguments])
    assert finished.code == 0, finished.output
    every = [CheckpointReader(path).images for path in candidates(tmp_path / "run")]
    assert every == [64, 48, 32, 16] and finished.output.count("training waited") == 4, finished.output


@pytest.mark.slow
def test_two_skips_in_a_row_exceed_the_limit_of_one(tmp_path):
    finished = poisoned(tmp_path, "forward", "2,3", 2, "run.nonfinite_skips=1", gradient_accumulation_steps=2)
    assert finished.code == 3 and "(1 of 1 in a row)" in finished.output, finished.output


def test_a_full_disk_on_another_rank_is_reported(tmp_path):
    """By a single warning while the run continues, and by the error if its last save also fails."""
    config = write_json(tmp_path / "ds.json", ep=2, zero=1)
    length = ("run.total_images=48", "run.save_every_images=32", "checkpoint.on_error=continue")
    arguments = training_arguments(config, tmp_path / "run", *length)
    finished = run_ranks(2, [str(WORKERS / "full_disk.py"), "1", "train", *arguments])
    assert finished.code == 5, finished.output
    root, output = tmp_path / "run" / "checkpoints", re.sub(r"\.writing-[0-9a-f]{16}", "OWN", finished.output)
    file = root / "OWN" / "images_0000000000{}" / "rank_00001.safetensors"
    why = f"rank 1 on {socket.gethostname()}: {file}: cannot be written: No space left on device."
    warning = f"*** WARNING: the checkpoint images_000000000032 was not saved: {why.format(32)} Training continues"
    assert output.count(warning) == 1, output
    assert f"error: the checkpoint images_000000000048 was not saved: {why.format(48)}" in output
    assert not list(tmp_path.rglob(".writing-*")), "nothing is left"


@pytest.mark.parametrize(
    ("number", "resume", "again"),
    (
        (signal.SIGUSR1, "none", "the same command with --resume auto continues"),
        pytest.param(signal.SIGTERM, "auto", "the same command continues", marks=pytest.mark.slow),
    ),
)
def test_a_signal_saves_and_requests_a_requeue(tmp_path, number, resume, again):
    run, directory = _start(tmp_path, "run.total_images=100000", options=("--resume", resume))
    _wait_for_rows(directory)
    run.send(number)
    code, output = run.wait()
    assert code == 85, output
    rows = read_metrics(directory)
    assert CheckpointReader(newest_valid(directory, full=True)).metadata.images == rows[-1]["images"]
    assert f"asked to stop ({number.name})" in output and again in output


@pytest.mark.slow
def test_a_requeue_waits_until_older_checkpoints_are_removed(tmp_path):
    """Also if the last one was started before the signal."""
    slow_disk = fault_environment(Rule("rename", "*/.removing-images_*", "sleep:1", repeats=True))
    keep = ("run.total_images=100000", "run.save_every_images=16", "checkpoint.keep_last=1")
    run, directory = _start(tmp_path, *keep, **slow_disk)
    _wait_for_rows(directory)
    run.send(signal.SIGUSR1)
    code, output = run.wait()
    assert code == 85 and "WARNING" not in output, output
    newest = newest_valid(directory, full=True)
    assert {path.name for path in (directory / "checkpoints").iterdir()} == {"latest", newest.name}


@pytest.mark.slow
def test_a_signal_after_the_end_changes_nothing(tmp_path):
    """Signals are sent from the last step until the process has exited."""
    run, directory = _start(tmp_path, "run.total_images=160")
    deadline = time.monotonic() + LAUNCH_TIMEOUT
    while not (directory / "checkpoints" / "latest").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    while run.process.poll() is None and time.monotonic() < deadline:
        run.send(signal.SIGUSR1)
        time.sleep(0.002)
    code, output = run.wait()
    assert code == 0, output


@pytest.mark.slow
def test_ctrl_c_saves_first_and_exits_immediately_the_second_time(tmp_path):
    run, directory = _start(tmp_path, "run.total_images=100000")
    _wait_for_rows(directory)
    run.send(signal.SIGINT)
    code, output = run.wait()
    assert code == 85 and "press Ctrl-C again to exit now" in output
    assert newest_valid(directory, full=True) is not None

    # The second time, in a run whose step never ends.
    stuck = "import time\nfrom diffmoe_ds.distributed.signals import listen\nlisten()\n"
    stuck += "print('ready', flush=True)\ntime.sleep(100)\ntime.sleep(100)"
    process = subprocess.Popen(
        [sys.executable, "-c", stuck], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, env=clean_environment()
    )
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)  # forwarded by a launcher: counts as the same press
        time.sleep(0.4)  # long enough for the next one to count as a second press
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(LAUNCH_TIMEOUT) == 130
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@dataclass(frozen=True)
class Started:
    """A run of one process."""

    process: ColdProcess | ForkedProcess
    file: IO[str]

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def wait(self) -> tuple[int, str]:
        """Return the exit code and the output; kill a process that hangs."""
        deadline = time.monotonic() + LAUNCH_TIMEOUT
        while (code := self.process.poll()) is None:
            if time.monotonic() > deadline:
                self.process.kill()
                pytest.fail("the run hangs")
            time.sleep(0.02)
        with self.file as file:
            file.seek(0)
            return code, file.read()


def _start(tmp_path, *overrides, options=(), **environment):
    config = write_json(tmp_path / "ds.json", ep=1, zero=1)
    directory = tmp_path / "run"
    arguments = ["-m", "diffmoe_ds.cli", "train", *training_arguments(config, directory, *overrides, options=options)]
    file = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `wait`
    if environment:
        process = ColdProcess([sys.executable, *arguments], clean_environment(**environment), file)
    else:
        process = fork_server().start(arguments, clean_environment(), REPOSITORY, file)
    return Started(process, file), directory


def _wait_for_rows(directory):
    deadline = time.monotonic() + LAUNCH_TIMEOUT
    while time.monotonic() < deadline:
        path = directory / "metrics.jsonl"
        if path.exists() and os.path.getsize(path) > 500:
            return
        time.sleep(0.02)
    pytest.fail("no step was completed")


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "where"), ((1, "start"), pytest.param(0, "3", marks=pytest.mark.long)))
def test_a_worker_that_stops_responding_ends_the_run(tmp_path, rank, where):
    """At its start or in a micro-batch: its rank is named, prints where it waits, and takes the worker along."""
    config = write_json(tmp_path / "ds.json", ep=1, zero=1)
    arguments = ["train", *training_arguments(config, tmp_path / "run", "run.rank_timeout_s=15")]
    finished = run_ranks(2, [str(WORKERS / "stuck_loader.py"), str(rank), where, *arguments])
    assert finished.code == 85, finished.output
    step = 1 if where == "start" else int(where)
    name = f"rank {rank} on {socket.gethostname()}"
    assert f"error: {name} has been stuck for 15 s in step {step}; rank {rank} exits." in finished.output
    assert f"rank {rank} is stuck here:" in finished.output and "self._next = next(self._batches)" in finished.output
    assert f"rank {1 - rank} is stuck here:" not in finished.output
    wait_for_end(int(re.search(r"worker (\d+) is stuck", finished.output)[1]))


@pytest.mark.parametrize(
    ("where", "number"),
    [
        ("step", signal.SIGKILL),
        pytest.param("read", signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param("read", signal.SIGBUS, marks=pytest.mark.slow),
    ],
)
def test_a_killed_loader_worker_is_a_reason_to_restart(tmp_path, where, number):
    """Wherever its rank is when it dies: the save in progress is finished, and all ranks exit with code 85."""
    config = write_json(tmp_path / "ds.json", ep=2, zero=1)
    length = ("run.total_images=1600", "run.save_every_images=48", "data.num_workers=2")
    arguments = ["train", *training_arguments(config, tmp_path / "run", *length)]
    finished = run_ranks(2, [str(WORKERS / "killed_worker.py"), "1", where, str(int(number)), *arguments])
    assert finished.code == 85 and "Traceback" not in finished.output, finished.output
    (found,) = re.findall("error: a loader worker of rank 1 [(]process .*", finished.output)
    assert f"was killed by {number.name}, probably because" in found and "data.num_workers" in found
    rows = read_metrics(tmp_path / "run")
    assert CheckpointReader(newest_valid(tmp_path / "run", full=True)).images == rows[-1]["images"]
