"""`sbatch slurm/train.sbatch`: one loss curve across every stop and requeue."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cluster.board import open_tensorboard
from tests.cluster.cluster import Cluster
from tests.cluster.conftest import checkout
from tests.cluster.sbatch import LIMIT, SMALL, STEP, STEPS, Sbatch, assert_undisturbed, undisturbed_run
from tests.helpers.processes import REPOSITORY
from tests.helpers.training import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.cluster]


REQUEUED = pytest.mark.xdist_group("requeued")
"""Of the tests that use the run `requeued`, so that one process runs them all."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list[dict]:
    return undisturbed_run(tmp_path_factory.mktemp("undisturbed"), STEPS)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "slurm").glob("*.sbatch")), ids=lambda path: path.name)
def test_every_sbatch_file_can_be_submitted_as_it_is(cluster: Cluster, path: Path):
    finished = cluster.run(f"sbatch --test-only slurm/{path.name}", cwd=REPOSITORY)
    assert finished.code == 0 and "to start at" in finished.output, finished.output


def test_an_invalid_configuration_is_not_requeued(cluster: Cluster, project: Path):
    sbatch = Sbatch(cluster, project)
    ended = sbatch.until_ended(sbatch.submit("2", after="model.nme=x"))
    assert (ended.state, ended.exit_code, ended.restarts) == ("FAILED", "2", 0)
    assert sbatch.text().count("did you mean 'name'?") == 1 and "Traceback" not in sbatch.text()
    assert not sbatch.run.exists()


def test_a_non_finite_loss_is_not_requeued(cluster: Cluster, project: Path):
    """A mistake that shows up only during training."""
    sbatch = Sbatch(cluster, project)
    ended = sbatch.until_ended(sbatch.submit("2", after="optimizer.lr=1e30"))
    assert (ended.state, ended.exit_code, ended.restarts) == ("FAILED", "3", 0), sbatch.text()
    assert "exit code 3: not requeued, a restart would fail in the same way" in sbatch.text()


@pytest.fixture(scope="module")
def requeued(hosts: Cluster, tmp_path_factory) -> Sbatch:
    """A run is stopped by USR1, then preempted; in between, a second job is rejected by the run lock."""
    project = checkout(tmp_path_factory.mktemp("requeued"))
    pictures = " run.sample_every_images=1600 sample.num_images=4 sample.steps=1"
    sbatch = Sbatch(hosts, project)
    sbatch.options += pictures
    job = sbatch.submit("2")
    sbatch.until_steps(5)
    hosts.freeze("node2")  # rank 0 on node1 keeps the run lock
    second = hosts.submit(f"--nodes=2 {SMALL} --output=second slurm/train.sbatch {sbatch.options}", project)
    refused = hosts.until_ended(second, LIMIT, project / "second")
    assert (refused.state, refused.exit_code, refused.restarts) == ("FAILED", "2", 0)
    told = (project / "second").read_text()
    assert told.count("diffmoe: error: runs/test: is in use by job") == 1 and f"job {job}, process" in told, told
    assert "Traceback" not in told
    assert hosts.job(job).restarts == 0, "the first job keeps running"

    hosts.output(f"scancel --batch --signal=USR1 {job}")
    hosts.thaw("node2")
    hosts.until(lambda: hosts.job(job).restarts == 1, 60, "the requeue", sbatch.text)
    before = len(sbatch.rows())
    assert before < STEPS, "the run ended before it could be stopped"
    newest = max((sbatch.run / "checkpoints").glob("images_*/meta.json"))
    assert f'"step": {before},' in newest.read_text(), "saved where it stopped"
    assert not (sbatch.run / "lock.json").exists()
    sbatch.until_steps(before + 20)
    hosts.freeze("node2")  # Slurm sends SIGCONT before SIGTERM

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


@REQUEUED
def test_usr1_and_preemption_do_not_change_the_loss_curve(requeued: Sbatch, undisturbed):
    assert len(requeued.rows()) == STEPS
    assert_undisturbed(requeued.rows(), undisturbed, STEPS)
    assert requeued.text().count("starting from scratch") == requeued.text().count("train.sbatch: complete") == 1


@REQUEUED
def test_chained_job_finds_nothing_left_to_do(cluster: Cluster, requeued: Sbatch):
    again = cluster.submit(f"--nodes=2 {SMALL} --output=again slurm/train.sbatch {requeued.options}", requeued.project)
    assert cluster.until_ended(again, LIMIT).state == "COMPLETED"
    assert "already trained on" in (requeued.project / "again").read_text()
    assert len(requeued.rows()) == STEPS


@REQUEUED
def test_tensorboard_shows_one_curve_in_a_browser(requeued: Sbatch):
    """Chromium renders one monotonic line over all steps, histograms and images."""
    with open_tensorboard(requeued.project / "runs") as board:
        steps = board.steps("scalars", "loss/loss")
        assert steps == sorted(set(steps)) and steps[-1] == STEPS * STEP and len(steps) >= STEPS // 20
        line = board.drawn_line("loss/loss")
        # TensorBoard omits points that are on the line between their neighbours
        assert len(steps) / 2 < len(line) <= len(steps) and all(left < right for left, right in pairwise(line))
        assert board.drawn_histograms("load/block_01") > 5
        assert board.steps("histograms", "load/block_01") == sorted(set(board.steps("histograms", "load/block_01")))
        assert all(width > 0 for width in board.image_widths("samples"))


TASKS = "--nodes=2 --ntasks-per-node=2 --gpus-per-node=2 --cpus-per-task=1 --time=10"


@REQUEUED
def test_four_tasks_generate_the_same_images_as_one_process(cluster: Cluster, requeued: Sbatch):
    """`slurm/sample.sbatch`, and mpirun with a rendezvous through mpi4py."""
    options = "--checkpoint runs/test --num-images 8 --batch-size 2 --steps 2 --routing per_token --out"
    job = cluster.submit(f"{TASKS} --output=sample.log slurm/sample.sbatch {options} tasks", requeued.project)
    ended = cluster.until_ended(job, LIMIT, requeued.project / "sample.log")
    assert ended.state == "COMPLETED", (requeued.project / "sample.log").read_text()
    sample = f"-m diffmoe_ds.cli sample {options}"
    mpirun = f"mpirun --allow-run-as-root -n 2 --host node1:1,node4:1 -x PYTHONPATH {cluster.python} {sample} moved"
    cluster.output(f"python {sample} alone && {mpirun}", cwd=requeued.project, timeout=LIMIT)
    alone, tasks, moved = (np.load(requeued.project / name / "samples.npz") for name in ("alone", "tasks", "moved"))
    for other in (tasks, moved):
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


def test_an_array_task_is_requeued_alone(cluster: Cluster, project: Path):
    """`slurm/sweep.sbatch`: USR1 to the task whose job ID is also that of the whole array."""
    sbatch = Sbatch(cluster, project, steps=200)
    options = SMALL.replace("=log", "=log-%a")
    array = cluster.submit(f"--array=0-1 --nodes=1 {options} slurm/sweep.sbatch {sbatch.options}", project)
    tasks = [f"{array}_{number}" for number in range(2)]
    runs = [project / "runs/sweep" / name for name in ("lr-1e-4", "lr-3e-4")]
    same = next(task for task in tasks if f"JobId={array} " in cluster.output(f"scontrol show job {task}"))
    started = [run / "metrics.jsonl" for run in runs]
    cluster.until(started[tasks.index(same)].exists, LIMIT, "the task with the array's job ID")
    cluster.output(f"scancel --signal=STOP {same}")  # `freeze` would stop both tasks if they share a node
    cluster.until(lambda: all(path.exists() for path in started), LIMIT, "both tasks")
    cluster.output(f"scancel --batch --signal=USR1 {same}")
    cluster.output(f"scancel --signal=CONT {same}")
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
