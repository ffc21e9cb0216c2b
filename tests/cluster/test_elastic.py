"""torchrun restarts the rest by itself after a node was lost, and the run goes on in the new layout."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.cluster import NODES, Cluster
from tests.helpers.processes import REPOSITORY, run_ranks
from tests.helpers.training import read_metrics, training_arguments, write_json

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

STEPS = 120
SAVE_EVERY = 20
LIMIT = 240
OVERRIDES = (f"run.total_images={16 * STEPS}", f"run.save_every_images={16 * SAVE_EVERY}", "run.rank_timeout_s=20")
TORCHRUN = (
    "torchrun --nnodes 1:4 --nproc_per_node 1 --max-restarts 3 --rdzv_backend c10d --rdzv_endpoint node1:29400 "
    "-m diffmoe_ds.train"
)
SCRIPT = "NODES=1:4 MASTER_ADDR=node4 launchers/torchrun.sh"


def options(folder: Path, run_dir: Path) -> list[str]:
    """A batch of 16 images, which three ranks cannot share."""
    return training_arguments(write_json(folder / "ds.json", ep="auto", zero=2), run_dir, *OVERRIDES)


@contextmanager
def agents(cluster: Cluster, project: Path, command: str) -> Iterator[dict[str, subprocess.Popen]]:
    """Start torchrun on four nodes, and yield the processes by node; each writes to ``log.NODE``."""
    path = f"{Path(cluster.python).parent}:/usr/bin:/bin"
    variables = f"export PATH={path} OMP_NUM_THREADS=1 PYTHONPATH={REPOSITORY}"
    train = f"cd {project} && {variables} && {command} {shlex.join(options(project, project / 'run'))}"
    processes = {}
    try:
        for node in NODES:
            line, env = cluster.command(f"exec ssh {node} {shlex.quote(train)}", project)
            with (project / f"log.{node}").open("w") as log:
                processes[node] = subprocess.Popen(line, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        yield processes
    finally:
        cluster.run("pdsh -R ssh -w node[1-4] 'pkill -KILL -f [d]iffmoe_ds.train || true'")
        for process in processes.values():
            process.kill()
            process.wait(timeout=20)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list[dict]:
    """The same run in one process."""
    folder = tmp_path_factory.mktemp("one")
    finished = run_ranks(1, ["-m", "diffmoe_ds.train", *options(folder, folder / "run")])
    assert finished.code == 0, finished.output
    return read_metrics(folder / "run")


@pytest.mark.parametrize(("command", "lost"), ((TORCHRUN, "node3"), (SCRIPT, "node1")), ids=("torchrun", "script"))
def test_a_lost_node_restarts_the_rest(cluster: Cluster, project: Path, undisturbed, command: str, lost: str):
    """Of the three ranks that are left, two train and one waits. The script's torchrun survives the loss of rank 0."""

    def note() -> str:
        return "\n".join(path.read_text()[-2500:] for path in sorted(project.glob("log.*")))

    with agents(cluster, project, command) as started:
        saved = project / f"run/checkpoints/images_{16 * SAVE_EVERY:012d}"
        cluster.until(saved.exists, LIMIT, "a checkpoint", note)
        cluster.power(lost, "off")
        try:
            rest = [process for node, process in started.items() if node != lost]
            cluster.until(lambda: all(process.poll() is not None for process in rest), LIMIT, "torchrun to end", note)
            assert [process.poll() for process in rest] == [0, 0, 0], note()
        finally:
            cluster.power(lost, "on")
        output = "".join(path.read_text() for path in project.glob("log.*"))
    assert re.search(r"2 of 3 ranks, the others wait \(torchrun's RANK\)", output), output
    assert "waiting  rank 2, until the run ends" in output and "resharding: world 4 -> 2" in output, output
    rows = read_metrics(project / "run")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), "every step once"
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in rows] == pytest.approx([row[key] for row in undisturbed], rel=1e-5), key
