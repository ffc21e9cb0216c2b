"""`sbatch slurm/train.sbatch`: one curve over every stop, requeue and loss of a node."""

from __future__ import annotations

import json
import re
import shlex
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cluster.board import open_tensorboard
from tests.cluster.cluster import Cluster, Job
from tests.cluster.conftest import checkout
from tests.helpers.processes import REPOSITORY, run_ranks
from tests.helpers.training import read_metrics, training_arguments, write_json

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

STEP = 16
STEPS = 600
"""So many that a run is still going when a test disturbs it."""
EXACT = 20
"""Steps after a change of layout over which losses agree to 1e-5; later a nearly tied selection may have flipped."""
SMALL = "--gpus-per-node=1 --cpus-per-gpu=1 --time=10 --output=log"
LIMIT = 240


def overrides(steps: int, save_every: int) -> list[str]:
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


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list[dict]:
    """The same run on two ranks without interruptions."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = write_json(folder / "ds.json", ep=1, zero=2)
    finished = run_ranks(2, ["diffmoe_ds/train.py", *training_arguments(config, folder / "run", *overrides(STEPS, 0))])
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


@pytest.mark.parametrize("path", sorted((REPOSITORY / "slurm").glob("*.sbatch")), ids=lambda path: path.name)
def test_every_sbatch_file_can_be_submitted_as_it_is(cluster: Cluster, path: Path):
    finished = cluster.run(f"sbatch --test-only slurm/{path.name}", cwd=REPOSITORY)
    assert finished.code == 0 and "to start at" in finished.output, finished.output


def test_a_failing_configuration_is_not_requeued(cluster: Cluster, project: Path):
    sbatch = Sbatch(cluster, project)
    ended = sbatch.until_ended(sbatch.submit("2", after="model.nme=x"))
    assert (ended.state, ended.exit_code, ended.restarts) == ("FAILED", "2", 0)
    assert sbatch.text().count("did you mean 'name'?") == 1 and "Traceback" not in sbatch.text()
    assert not sbatch.run.exists()


def test_a_loss_that_is_no_number_is_not_requeued(cluster: Cluster, project: Path):
    """A mistake that shows up only during training."""
    sbatch = Sbatch(cluster, project)
    ended = sbatch.until_ended(sbatch.submit("2", after="optimizer.lr=1e30"))
    assert (ended.state, ended.exit_code, ended.restarts) == ("FAILED", "3", 0), sbatch.text()
    assert "exit code 3: not requeued, a restart would fail in the same way" in sbatch.text()


@pytest.fixture(scope="module")
def requeued(hosts: Cluster, tmp_path_factory) -> Sbatch:
    """A run is stopped by USR1, then preempted; in between, a second job is rejected by the run lock."""
    project = checkout(tmp_path_factory.mktemp("requeued"))
    pictures = " run.sample_every_images=3200 sample.num_images=4 sample.steps=1"
    sbatch = Sbatch(hosts, project)
    sbatch.options += pictures
    job = sbatch.submit("2")
    hosts.until((sbatch.run / "lock.json").exists, LIMIT, "the first job", sbatch.text)
    second = hosts.submit(f"--nodes=2 {SMALL} --output=second slurm/train.sbatch {sbatch.options}", project)
    refused = hosts.until_ended(second, LIMIT, project / "second")
    assert (refused.state, refused.exit_code, refused.restarts) == ("FAILED", "2", 0)
    told = (project / "second").read_text()
    assert told.count("diffmoe: error: runs/test: is in use by job") == 1 and f"job {job}, process" in told, told
    assert "Traceback" not in told
    assert hosts.job(job).restarts == 0, "the first goes on"

    hosts.output(f"scancel --batch --signal=USR1 {job}")
    hosts.until(lambda: hosts.job(job).restarts == 1, 60, "the requeue", sbatch.text)
    before = len(sbatch.rows())
    assert before < STEPS, "the run was too fast to be stopped"
    newest = max((sbatch.run / "checkpoints").glob("images_*/meta.json"))
    assert f'"step": {before},' in newest.read_text(), "saved where it stopped"
    assert not (sbatch.run / "lock.json").exists()
    sbatch.until_steps(before + 20)

    options = "--partition=urgent --nodes=4 --exclusive --time=1 --output=urgent"
    urgent = hosts.submit(f"{options} --wrap 'sleep 3'", project)
    hosts.until(lambda: hosts.job(job).restarts == 2, 120, "the preemption", sbatch.text)
    between = len(sbatch.rows())
    assert before < between < STEPS
    assert hosts.until_ended(urgent, 120).state == "COMPLETED"
    ended = sbatch.until_ended(job)
    assert (ended.state, ended.exit_code, ended.restarts) == ("COMPLETED", "0", 2), sbatch.text()
    resumed = [int(found.replace(",", "")) for found in re.findall(r"continues .* at ([\d,]+) images", sbatch.text())]
    assert resumed == [before * STEP, between * STEP]
    return sbatch


def test_usr1_and_preemption_leave_the_curve_of_an_undisturbed_run(requeued: Sbatch, undisturbed):
    assert len(requeued.rows()) == STEPS
    assert_undisturbed(requeued.rows(), undisturbed, STEPS)
    assert requeued.text().count("starting from scratch") == requeued.text().count("train.sbatch: complete") == 1


def test_chained_job_finds_nothing_left_to_do(cluster: Cluster, requeued: Sbatch):
    again = cluster.submit(f"--nodes=2 {SMALL} --output=again slurm/train.sbatch {requeued.options}", requeued.project)
    assert cluster.until_ended(again, LIMIT).state == "COMPLETED"
    assert "already trained on" in (requeued.project / "again").read_text()
    assert len(requeued.rows()) == STEPS


def test_tensorboard_shows_one_curve_in_a_browser(requeued: Sbatch):
    """Chromium renders one monotonic line over all steps, histograms and images."""
    with open_tensorboard(requeued.project / "runs") as board:
        steps = board.steps("scalars", "loss/loss")
        assert steps == sorted(set(steps)) and steps[-1] == STEPS * STEP and len(steps) >= STEPS // 20
        line = board.drawn_line("loss/loss")
        # TensorBoard leaves out points that lie on the way between others
        assert len(steps) / 2 < len(line) <= len(steps) and all(left < right for left, right in pairwise(line))
        assert board.drawn_histograms("load/block_01") > 5
        assert board.steps("histograms", "load/block_01") == sorted(set(board.steps("histograms", "load/block_01")))
        assert all(width > 0 for width in board.image_widths("samples"))


TASKS = "--nodes=2 --ntasks-per-node=2 --gpus-per-node=2 --cpus-per-task=1 --time=10"


def test_samples_of_four_tasks_are_those_of_one_process(cluster: Cluster, requeued: Sbatch):
    """`slurm/sample.sbatch`, and mpirun with a rendezvous through mpi4py."""
    options = "--checkpoint runs/test --num-images 8 --steps 2 --routing per_token --out"
    job = cluster.submit(f"{TASKS} --output=drawing slurm/sample.sbatch {options} drawn", requeued.project)
    ended = cluster.until_ended(job, LIMIT, requeued.project / "drawing")
    assert ended.state == "COMPLETED", (requeued.project / "drawing").read_text()
    sample = f"-m diffmoe_ds.cli sample {options}"
    mpirun = f"mpirun --allow-run-as-root -n 2 --host node1:1,node4:1 -x PYTHONPATH {cluster.python} {sample} moved"
    cluster.output(f"python {sample} alone && {mpirun}", cwd=requeued.project, timeout=LIMIT)
    alone, drawn, moved = (np.load(requeued.project / name / "samples.npz") for name in ("alone", "drawn", "moved"))
    for other in (drawn, moved):
        assert np.array_equal(other["arr_1"], alone["arr_1"]) and other["arr_0"].shape == alone["arr_0"].shape
        assert np.abs(other["arr_0"].astype(int) - alone["arr_0"]).max() <= 1


def test_prepare_on_four_tasks(cluster: Cluster, project: Path):
    """`slurm/prepare.sbatch`: the tasks share the shards, and the dataset is complete."""
    for number in range(24):
        folder = project / f"images/class_{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (48, 40), (10 * number, 90, 200)).save(folder / f"{number}.png")
    options = "images --images images --size 32 --shard-images 3 --out shards"
    job = cluster.submit(f"{TASKS} --output=log slurm/prepare.sbatch {options}", project)
    ended = cluster.until_ended(job, LIMIT, project / "log")
    assert ended.state == "COMPLETED", (project / "log").read_text()
    assert "24 samples in 8 shards" in (project / "log").read_text()
    checked = cluster.output("python -m diffmoe_ds.cli prepare check shards --json", cwd=project)
    assert json.loads(checked.splitlines()[-1])["samples"] == 24


def test_a_task_of_an_array_is_requeued_alone(cluster: Cluster, project: Path):
    """`slurm/sweep.sbatch`: USR1 to the task whose job number is also the whole array's."""
    sbatch = Sbatch(cluster, project, steps=200)
    options = SMALL.replace("=log", "=log-%a")
    array = cluster.submit(f"--array=0-1 --nodes=1 {options} slurm/sweep.sbatch {sbatch.options}", project)
    tasks = [f"{array}_{number}" for number in range(2)]
    runs = [project / "runs/sweep" / name for name in ("lr-1e-4", "lr-3e-4")]
    cluster.until(lambda: all((run / "metrics.jsonl").exists() for run in runs), LIMIT, "both tasks")
    same = next(task for task in tasks if f"JobId={array} " in cluster.output(f"scontrol show job {task}"))
    cluster.output(f"scancel --batch --signal=USR1 {same}")
    for number, task in enumerate(tasks):
        ended = cluster.until_ended(task, LIMIT, project / f"log-{number}")
        text = (project / f"log-{number}").read_text()
        assert (ended.state, ended.exit_code, ended.restarts) == ("COMPLETED", "0", int(task == same)), text
        assert len(read_metrics(runs[number])) == 200 and ("continues" in text) == (task == same)


def test_cancelled_job_stays_cancelled(cluster: Cluster, project: Path):
    sbatch = Sbatch(cluster, project, steps=10_000)
    job = sbatch.submit("1")
    sbatch.until_steps(5)
    cluster.output(f"scancel {job}")
    ended = sbatch.until_ended(job)
    assert (ended.state, ended.restarts) == ("CANCELLED", 0), sbatch.text()


@pytest.mark.parametrize("lost", ("node2", "node1"), ids=("another node", "the batch node with rank 0"))
def test_a_node_without_power(cluster: Cluster, project: Path, undisturbed, lost: str):
    """Three of four nodes remain; a batch of 16 images uses two of them."""
    steps = 200
    sbatch = Sbatch(cluster, project, steps, save_every=20)
    job = sbatch.submit("2-4")
    sbatch.until_steps(50)
    cluster.power(lost, "off")
    try:
        cluster.until(lambda: cluster.job(job).restarts >= 1, LIMIT, "the restart", sbatch.text)
        before = len(sbatch.rows())
        assert before < steps, "the run was too fast to be disturbed"
        ended = sbatch.until_ended(job)
    finally:
        cluster.power(lost, "on")
    assert (ended.state, ended.exit_code) == ("COMPLETED", "0"), sbatch.text()
    assert "cannot train on 3 nodes, using 2" in sbatch.text()
    assert "world  4 =" in sbatch.text() and "world  2 =" in sbatch.text()
    resumed = int(re.findall(r"continues .* at ([\d,]+) images", sbatch.text())[0].replace(",", ""))
    assert 20 * STEP <= resumed <= before * STEP, "goes on from the last checkpoint, or from the one before"
    assert len(sbatch.rows()) == steps
    assert_undisturbed(sbatch.rows(), undisturbed, EXACT)
