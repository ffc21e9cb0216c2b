"""Fixtures that many tests share: processes that cannot outlive a test, and runs of a tiny model."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
WORKERS = Path(__file__).resolve().parent / "distributed" / "workers"
LAUNCH_TIMEOUT = 240
"""Seconds after which a launch counts as hung."""
GRACE = 10
"""Seconds that the other processes have to end when one has failed."""

torch.set_num_threads(1)


@dataclass(frozen=True)
class Finished:
    """What became of a launch."""

    code: int
    """The first exit code that is not 0, or 0."""
    output: str
    """stdout and stderr of all processes."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def clean_environment(**extra: str) -> dict[str, str]:
    """This process's environment without any launcher's variables, one thread a process."""
    prefixes = ("SLURM_", "OMPI_", "PMI", "TORCHELASTIC")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(prefixes) and k not in names}
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **extra}


def run_processes(commands: list[tuple[list[str], dict[str, str]]], timeout: float = LAUNCH_TIMEOUT) -> Finished:
    """Start commands together and wait; when one fails or time is up, the others are ended, by process group."""
    deadline = time.monotonic() + timeout
    # not pipes, which a process could fill and block on
    files = [tempfile.TemporaryFile("w+") for _ in commands]  # noqa: SIM115 - closed below
    processes = [
        subprocess.Popen(
            command, env=environment, cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        for (command, environment), file in zip(commands, files, strict=True)
    ]
    failed_since = None
    try:
        while any(p.poll() is None for p in processes):
            now = time.monotonic()
            if failed_since is None and any(p.poll() for p in processes):
                failed_since = now
            if now > deadline or (failed_since is not None and now > failed_since + GRACE):
                break
            time.sleep(0.02)
    finally:
        late = [p for p in processes if p.poll() is None]
        for process in late:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    outputs = []
    for file in files:
        with file:
            file.seek(0)
            outputs.append(file.read())
    text = "".join(outputs)
    if late and failed_since is None:
        pytest.fail(f"hung for {timeout} s:\n{text[-5000:]}")
    return Finished(next((p.returncode for p in processes if p.returncode > 0), 0), text)


def run_ranks(world: int, arguments: list[str], timeout: float = LAUNCH_TIMEOUT, **extra: str) -> Finished:
    """Start a Python script or module on so many ranks of this machine."""
    port = str(free_port())
    commands = []
    for rank in range(world):
        environment = clean_environment(
            RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **extra,
        )  # fmt: skip
        commands.append(([sys.executable, *arguments], environment))
    return run_processes(commands, timeout)


@dataclass(frozen=True)
class Trained:
    """A finished run of the command line."""

    directory: Path
    metrics: list[dict]
    output: str

    def column(self, key: str) -> list[float]:
        return [row[key] for row in self.metrics]


TINY = (
    "model.name=nano-E4", "model.patch_size=8", "run.total_images=80", "run.log_every_images=16", "ema.decay=0.9",
    "optimizer.lr=1e-3", "run.sample_every_images=0",
)  # fmt: skip
"""A model of which a step of 16 images takes milliseconds."""


def write_json(path: Path, ep: int | str, zero: int, **changes: object) -> Path:
    """A DeepSpeed JSON for 16 images a step."""
    tree = {
        "train_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": zero},
        "expert_parallel": {"autoep_size": ep},
        "tensorboard": {"enabled": False},
        **changes,
    }
    path.write_text(json.dumps(tree))
    return path


def read_metrics(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def train_tiny(tmp_path: Path):
    """Train the tiny model on (world, ep, zero) through the command line."""
    count = 0

    def run(
        world: int, ep: int | str, zero: int, *overrides: str, directory: Path | None = None, code: int = 0,
        options: tuple[str, ...] = (), **changes: object,
    ) -> Trained:  # fmt: skip
        nonlocal count
        count += 1
        directory = directory or tmp_path / f"run_{count}"
        config = write_json(tmp_path / f"ds_{count}.json", ep, zero, **changes)
        arguments = ["--deepspeed_config", str(config), "--run-dir", str(directory), *options]
        finished = run_ranks(world, ["diffmoe_ds/train.py", "--set", *TINY, *overrides, *arguments])
        assert finished.code == code, finished.output
        return Trained(directory, read_metrics(directory) if code == 0 else [], finished.output)

    return run
