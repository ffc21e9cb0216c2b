"""Jobs of `slurm/train.sbatch` with a tiny model, and the curve that they must reproduce."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, Job
from tests.helpers.processes import run_ranks
from tests.helpers.training import read_metrics, training_arguments, write_json

STEP = 16
STEPS = 400
"""Several times as many as a run trains between the moment that a test waits for and `Cluster.freeze`."""
EXACT = 20
"""Steps after a change of layout over which losses agree to 1e-5; later a nearly tied selection may have flipped."""
SMALL = "--gpus-per-node=1 --cpus-per-gpu=1 --time=10 --output=log"
LIMIT = 240


def overrides(steps: int, save_every: int) -> list[str]:
    """Return the settings of a run of that length; 0 saves only at the end."""
    return [
        f"run.total_images={steps * STEP}", f"run.save_every_images={save_every * STEP}",
        f"run.log_every_images={20 * STEP}",
    ]  # fmt: skip


class Sbatch:
    """The shipped script in a project, with a tiny model and the cluster's size on sbatch's command line."""

    def __init__(self, cluster: Cluster, project: Path, steps: int = STEPS, save_every: int = 0) -> None:
        self.cluster, self.project = cluster, project
        self.log, self.run = project / "log", project / "runs/test"
        config = write_json(project / "ds.json", ep="auto", zero=2, tensorboard={"enabled": True})
        self.options = shlex.join(training_arguments(config.name, "runs/test", *overrides(steps, save_every)))

    def submit(self, nodes: str, before: str = "", after: str = "") -> int:
        arguments = f"--nodes={nodes} {SMALL} {before} slurm/train.sbatch {self.options} {after}"
        return self.cluster.submit(arguments, self.project)

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def rows(self) -> list[dict]:
        try:
            return read_metrics(self.run)
        except (FileNotFoundError, ValueError):  # not there yet, or its last line is being written
            return []

    def until_steps(self, steps: int) -> int:
        """Wait until a number of steps is reached; return the current number."""
        self.cluster.until(lambda: len(self.rows()) >= steps, LIMIT, f"{steps} steps", lambda: self.text()[-4000:])
        return len(self.rows())

    def until_ended(self, job: int) -> Job:
        return self.cluster.until_ended(job, LIMIT, self.log)


def undisturbed_run(folder: Path, steps: int) -> list[dict]:
    """Train on two ranks without interruptions and return the rows."""
    config = write_json(folder / "ds.json", ep=1, zero=2)
    finished = run_ranks(2, ["diffmoe_ds/train.py", *training_arguments(config, folder / "run", *overrides(steps, 0))])
    assert finished.code == 0, finished.output
    return read_metrics(folder / "run")


def assert_undisturbed(rows: list[dict], undisturbed: list[dict], exact: int) -> None:
    """Every step and image once, with the losses of the uninterrupted run (the first ones to 1e-5)."""
    undisturbed = undisturbed[: len(rows)]
    assert [row["step"] for row in rows] == [row["step"] for row in undisturbed]
    assert [row["images"] for row in rows] == [row["images"] for row in undisturbed]
    ours, theirs = ([row["loss"] for row in table] for table in (rows, undisturbed))
    assert ours[:exact] == pytest.approx(theirs[:exact], abs=1e-5)
    assert ours == pytest.approx(theirs, rel=0.1)
