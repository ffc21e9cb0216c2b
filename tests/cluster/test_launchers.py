"""The same command line trains the same on several hosts, under every launcher, as in one process."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster
from tests.helpers.processes import REPOSITORY, run_ranks
from tests.helpers.training import read_metrics, training_arguments

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

STEPS = 3
BATCH = 16
KEYS = ("loss", "diffusion_loss", "capacity_loss", "grad_norm")
LENGTH = f"run.total_images={STEPS * BATCH}"
OPTIONS = shlex.join(training_arguments("ds.json", None, LENGTH, base=()))
TRAIN = f"diffmoe_ds/train.py {OPTIONS}"
LIMIT = 150


def few_steps(project: Path, ep: int) -> None:
    """The shipped JSON with an EP size and a batch small enough for two cores."""
    tree = json.loads((REPOSITORY / "ds_configs/zero2.json").read_text())
    assert tree["zero_optimization"]["stage"] == 2
    tree |= {"train_batch_size": BATCH, "expert_parallel": {"autoep_size": ep}}
    (project / "ds.json").write_text(json.dumps(tree))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> list[dict]:
    """The embedded recipe for a few steps without any launcher."""
    folder = tmp_path_factory.mktemp("one")
    few_steps(folder, 1)
    finished = run_ranks(1, ["diffmoe_ds/train.py", *training_arguments(folder / "ds.json", folder, LENGTH, base=())])
    assert finished.code == 0, finished.output
    return read_metrics(folder)


def assert_trained(rows: list[dict], one_process: list[dict]) -> None:
    assert [row["step"] for row in rows] == [row["step"] for row in one_process] == list(range(1, STEPS + 1))
    for key in KEYS:
        assert [row[key] for row in rows] == pytest.approx([row[key] for row in one_process], abs=1e-5), key


def test_deepspeed_on_four_nodes_with_the_readme_command(cluster: Cluster, project: Path, one_process):
    """Training runs until its launcher is interrupted, and leaves no processes behind."""
    command = "deepspeed --num_nodes 4 diffmoe_ds/train.py --deepspeed_config ds_configs/zero2.json"
    assert command in (REPOSITORY / "README.md").read_text()
    few_steps(project, 4)
    (project / "ds_configs").unlink()
    (project / "ds_configs").mkdir()
    (project / "ds.json").rename(project / "ds_configs/zero2.json")
    line, environment = cluster.command(f"exec {command}", project)
    with (project / "log").open("w") as log:
        launcher = subprocess.Popen(
            line, env=environment, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
    metrics = project / "runs/fashion/metrics.jsonl"
    try:
        cluster.until(
            lambda: (metrics.exists() and metrics.read_text().count("\n") > STEPS) or launcher.poll() is not None,
            LIMIT, "some steps", lambda: (project / "log").read_text()[-3000:],
        )  # fmt: skip
        text = (project / "log").read_text()
        assert launcher.poll() is None, text
        assert "world  4 = EP 4 x EDP 1, ZeRO 2" in text and "(deepspeed's RANK)" in text
        assert text.count("parameters  ") == 1, "one banner"
        assert "EP groups of 4 span nodes: about" in text
    finally:
        cluster.run("kill -INT $(pgrep -of '[d]eepspeed --num_nodes 4')")
        launcher.wait(timeout=60)
    cluster.until(
        lambda: not cluster.run("pdsh -R ssh -w node[1-4] 'pgrep -f [d]iffmoe_ds/train.py || true'").output.strip(),
        60, "the ranks to end",
    )  # fmt: skip
    assert_trained(read_metrics(project / "runs/fashion")[:STEPS], one_process)


@pytest.mark.parametrize(
    "start",
    (
        "launchers/mpirun.sh",
        "LAUNCHER=openmpi launchers/deepspeed.sh",
        "LAUNCHER=slurm LAUNCHER_ARGS=--ntasks-per-node=1 launchers/deepspeed.sh",
    ),
)
def test_four_nodes(cluster: Cluster, project: Path, one_process, start: str):
    """DeepSpeed's Slurm and Open MPI launchers set neither RANK nor MASTER_ADDR."""
    few_steps(project, 4)
    root = "OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"
    finished = cluster.run(f"{root} PYTHON={cluster.python} {start} {OPTIONS}", cwd=project, timeout=LIMIT)
    assert finished.code == 0, finished.output
    assert_trained(read_metrics(project / "runs/fashion"), one_process)
    assert "EP groups of 4 span nodes: about" in finished.output
    source = "srun's SLURM_PROCID" if "slurm" in start else "mpirun's OMPI_COMM_WORLD_RANK"
    assert finished.output.count(f"({source})") == 1


def test_mpi4py_provides_the_rank_if_no_variable_does(cluster: Cluster, project: Path, one_process):
    few_steps(project, 2)
    hide = "env -u OMPI_COMM_WORLD_RANK -u OMPI_COMM_WORLD_SIZE"
    command = f"mpirun --allow-run-as-root -n 2 --host node1:1,node2:1 -x PYTHONPATH {hide} {cluster.python} {TRAIN}"
    finished = cluster.run(command, cwd=project, timeout=LIMIT)
    assert finished.code == 0, finished.output
    assert "MPI through mpi4py" in finished.output
    assert_trained(read_metrics(project / "runs/fashion"), one_process)


def test_torchrun_two_by_two(cluster: Cluster, project: Path, one_process):
    few_steps(project, 2)
    variables = f"NODES=2 MASTER_ADDR=node2 PROCESSES=2 PYTHON={cluster.python} PYTHONPATH={REPOSITORY}"
    starts = [
        f"ssh {node} 'cd {project} && NODE_RANK={rank} {variables} launchers/torchrun.sh {OPTIONS}'"
        for rank, node in enumerate(("node2", "node3"))
    ]
    finished = cluster.run(f"{starts[0]} & {starts[1]}; a=$?; wait $!; b=$?; exit $((a + b))", project, timeout=LIMIT)
    assert finished.code == 0, finished.output
    assert_trained(read_metrics(project / "runs/fashion"), one_process)
    assert "torchrun's RANK" in finished.output and "span nodes" not in finished.output


def test_srun_two_by_two(cluster: Cluster, project: Path, one_process):
    few_steps(project, 2)
    finished = cluster.run(f"srun --nodes=2 --ntasks-per-node=2 python -u {TRAIN}", cwd=project, timeout=LIMIT)
    assert finished.code == 0, finished.output
    assert_trained(read_metrics(project / "runs/fashion"), one_process)
    assert "srun's SLURM_PROCID" in finished.output and "first of SLURM_STEP_NODELIST" in finished.output


def test_contradictions_are_found_before_the_rendezvous(cluster: Cluster, project: Path):
    few_steps(project, 4)
    finished = cluster.run(f"RANK=0 WORLD_SIZE=2 srun -N2 -n2 python -u {TRAIN}", cwd=project, timeout=60)
    assert finished.code == 2 and "Traceback" not in finished.output, finished.output
    assert finished.output.count("diffmoe: error: RANK is 0, but SLURM_PROCID is '1'") == 1
    finished = cluster.run(f"srun -N2 -n2 python -u {TRAIN}", cwd=project, timeout=60)
    assert finished.code == 2 and "Traceback" not in finished.output, finished.output
    wide = "autoep_size must divide both the 2 rank(s) and the 8 expert(s), got 4; valid: 1, 2."
    assert finished.output.count(wide) == 1
    assert not (project / "runs").exists()
