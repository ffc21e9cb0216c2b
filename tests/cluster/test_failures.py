"""A fault on one host soon gives one message that names the host, under any launcher."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster
from tests.helpers.training import training_arguments, write_json

pytestmark = [pytest.mark.slow, pytest.mark.cluster]


@contextmanager
def unreachable(cluster: Cluster) -> Iterator[None]:
    cluster.power("node3", "off")
    try:
        yield
    finally:
        cluster.power("node3", "on")


@contextmanager
def wrong_key(cluster: Cluster) -> Iterator[None]:
    """node3 lacks the ssh key of the other nodes."""
    cluster.inside("node3", "mount -t tmpfs tmpfs /root/.ssh")
    try:
        yield
    finally:
        cluster.inside("node3", "umount /root/.ssh")


@contextmanager
def no_python(cluster: Cluster) -> Iterator[None]:
    folder = Path(cluster.python).parent
    cluster.inside("node3", f"mount -t tmpfs tmpfs {folder}")
    try:
        yield
    finally:
        cluster.inside("node3", f"umount {folder}")


START_S = 30
"""Seconds within which ranks must join; two cores start four of them, and another cluster may be running."""

FAULTS = {
    unreachable: "cannot be reached over ssh",
    wrong_key: "refuses our ssh key",
    no_python: "has no ",
}


def options(project: Path, run_dir: str = "runs/test") -> str:
    config = write_json(project / "ds.json", ep=1, zero=2)
    return shlex.join(training_arguments(config, run_dir, f"run.start_timeout_s={START_S}"))


@pytest.mark.parametrize(
    ("launcher", "fault"),
    (*(("deepspeed.sh", fault) for fault in FAULTS), ("mpirun.sh", unreachable)),
    ids=lambda value: getattr(value, "__name__", value),
)
def test_launchers_name_the_host_before_they_start_anything(
    cluster: Cluster, project: Path, fault: Callable, launcher: str
):
    with fault(cluster):
        command = f"PYTHON={cluster.python} launchers/{launcher} {options(project)}"
        finished = cluster.run(command, cwd=project, timeout=60)
    assert finished.code == 1, finished.output
    said = [line for line in finished.output.splitlines() if line]
    assert len(said) == 1 and said[0].startswith(f"diffmoe: error: node3: {FAULTS[fault]}"), finished.output
    assert not (project / "runs").exists()


def test_plain_deepspeed_does_not_wait_for_a_host_that_cannot_join(cluster: Cluster, project: Path):
    """Without the ssh check, the joined ranks name the missing ones and exit."""
    with no_python(cluster):
        command = f"deepspeed --num_nodes 4 diffmoe_ds/train.py {options(project)}"
        finished = cluster.run(command, cwd=project, timeout=150)
    assert finished.code != 0
    message = f"diffmoe: error: rank(s) 2 (nothing from node3) of 4 did not join within {START_S} s"
    assert finished.output.count("diffmoe: error: ") == 1 and message in finished.output, finished.output
    assert "Traceback" not in finished.output
    assert not (project / "runs").exists()


def test_missing_python_under_srun(cluster: Cluster, project: Path):
    with no_python(cluster):
        command = f"srun --nodes=4 --ntasks-per-node=1 --kill-on-bad-exit=1 {cluster.python} diffmoe_ds/train.py"
        finished = cluster.run(f"{command} {options(project)}", cwd=project, timeout=60)
    assert finished.code != 0 and "error: node3: task 2" in finished.output, finished.output
    assert "Traceback" not in finished.output


@pytest.mark.parametrize("when", ("at the start", "at a checkpoint"))
def test_a_full_shared_disk(cluster: Cluster, project: Path, when: str):
    """Every rank exits with code 5, one message names the host, and incomplete files are removed."""
    small = cluster.dir / "small"
    room = 0 if when == "at the start" else 200
    cluster.output(
        f"df --output=avail -k {small} | tail -1 | {{ read -r k; head -c $((k - {room}))K /dev/zero > {small}/fill; }}"
    )
    try:
        command = (
            f"srun --nodes=2 --ntasks-per-node=1 python -u diffmoe_ds/train.py {options(project, str(small / 'run'))}"
        )
        finished = cluster.run(command, cwd=project, timeout=100)
        assert "Traceback" not in finished.output, finished.output
        assert finished.code == 5, finished.output
        said = [line for line in finished.output.splitlines() if "diffmoe: error: " in line]
        assert "No space left on device" in finished.output, finished.output
        if when == "at the start":
            assert len(said) == 1 and "cannot be written on node1" in said[0]
        left = cluster.output(f"find {small} -name '*.safetensors' -o -name '.writing*' -o -name lock.json")
        assert left == "", left
    finally:
        cluster.output(f"rm -rf {small}/*")


def printed_report(output: str) -> dict:
    """Rank 0's JSON object, without the prefix that launchers add to each line."""
    line = next(line for line in output.splitlines() if '{"launch"' in line)
    return json.loads(line[line.index('{"launch"') :])


def test_doctor_over_four_nodes(cluster: Cluster, project: Path):
    """Under two launchers; node4 lacks the shared file system."""
    doctor = "-m diffmoe_ds.cli doctor --json --timeout 30 --run-dir"
    finished = cluster.run(f"OMP_NUM_THREADS=1 srun -N4 -n4 python {doctor} runs", cwd=project, timeout=100)
    assert finished.code == 0, finished.output
    report = printed_report(finished.output)
    assert report["to_fix"] == [] and list(report["hosts"]) == ["node1", "node2", "node3", "node4"]
    assert {rank["interface"] for rank in report["ranks"]} == {"eth0"}
    assert all(sent["eth0"] > 10 for sent in report["sent_mb"].values())
    assert all(abs(ahead) < 0.05 for ahead in report["clock_ahead_s"].values()) and len(report["clock_ahead_s"]) == 3

    cluster.inside("node4", f"mount -t tmpfs tmpfs {cluster.dir}/small")
    try:
        command = f"deepspeed --num_nodes 4 --module {doctor.removeprefix('-m ')}"
        finished = cluster.run(f"{command} {cluster.dir}/small", cwd=project, timeout=100)
    finally:
        cluster.inside("node4", f"umount {cluster.dir}/small")
    report = printed_report(finished.output)
    assert finished.code == 1 and any(text.startswith("node4: does not see") for text in report["to_fix"]), report
