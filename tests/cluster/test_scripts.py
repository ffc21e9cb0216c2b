"""The shell scripts: shellcheck on each one, and the commands that they would run."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cluster.conftest import skip_or_fail
from tests.helpers.processes import REPOSITORY, clean_environment

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

LAUNCHERS = sorted((REPOSITORY / "launchers").glob("*.sh"))
SCRIPTS = sorted(
    path
    for path in REPOSITORY.rglob("*")
    if (path.suffix in (".sh", ".sbatch") or path == REPOSITORY / ".ci/run")
    and not any(part in (".venv", "runs", ".git") for part in path.relative_to(REPOSITORY).parts)
)


def test_every_script_passes_shellcheck():
    if shutil.which("shellcheck") is None:
        skip_or_fail("needs shellcheck: tests/cluster/install.sh installs it")
    assert len(SCRIPTS) >= 11
    command = ["shellcheck", *map(str, SCRIPTS), str(REPOSITORY / "slurm/env.example")]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stdout


@pytest.mark.parametrize("before", (0, 1, 2))
@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_dry_run_prints_the_command_and_documents_every_variable(path: Path, before: int):
    """Scripts are short, run from any directory, and pass options on unchanged."""
    variables = {
        "HOSTFILE": "my hosts", "NODES": "3", "NODE_RANK": "1", "PROCESSES": "5", "MASTER_ADDR": "node7",
        "MASTER_PORT": "29999", "PYTHON": "/opt/py thon", "LAUNCHER": "openmpi", "RANKS": "6",
        "LAUNCHER_ARGS": "--a --b", "MPI_OPTIONS": "--mca x y",
    }  # fmt: skip
    options = ["--set", "data.path=a b"]
    options.insert(before, "--dry-run")
    finished = subprocess.run(
        [str(path), *options], env=clean_environment(**variables), cwd="/",
        capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    words = shlex.split(finished.stdout)
    assert words[-2:] == ["--set", "data.path=a b"] and "diffmoe_ds.train" in words and "/opt/py thon" in words
    text = path.read_text()
    assert text.count("\n") < 50
    head = text.partition("set -euo")[0]
    for name, value in variables.items():
        used = f"{{{name}:-" in text
        assert used == (f"#   {name} " in head), f"{name} is used but not documented, or the other way round"
        if used and name not in ("MASTER_PORT",):
            assert value in words or any(value in word for word in words) or (name == "MPI_OPTIONS" and "x" in words)


STUBS = {
    "python": 'echo "        run  $PWD/run"',
    "srun": 'echo "$@" >>calls; exit 85',
    "squeue": 'echo squeue "$@" >>calls; [ "$(grep -c squeue calls)" -gt $SILENT ] || exit 1; echo $STATE',
    "scontrol": 'echo scontrol "$@" >>calls; [ "$(grep -c scontrol calls)" -gt 1 ]',
    "sleep": ":",
}


@pytest.mark.parametrize(
    ("silent", "state", "requeued"),
    (("1", "RUNNING", True), ("99", "", True), ("0", "COMPLETING", False), ("0", "", False)),
)
@pytest.mark.parametrize("resume", ("--resume none", "--resume=none", "--resume none_1"))
def test_a_controller_that_does_not_answer_is_asked_again(tmp_path, silent, state, requeued, resume):
    """After an array task has crashed, on a cluster whose setup script reads an unset variable."""
    for name, text in STUBS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/env.sh").write_text("[[ $NOT_SET == x ]]\n")
    environment = clean_environment(
        PATH=f"{tmp_path / 'bin'}:/usr/bin:/bin", SLURM_JOB_ID="36", SLURM_ARRAY_JOB_ID="36", SLURM_ARRAY_TASK_ID="1",
        SLURM_JOB_NUM_NODES="1", SLURM_JOB_NODELIST="node1", SLURM_CPUS_ON_NODE="2", SLURM_RESTART_COUNT="1",
        SLURM_SUBMIT_DIR=str(tmp_path), SILENT=silent, STATE=state,
    )  # fmt: skip
    script = [str(REPOSITORY / "slurm/train.sbatch"), *resume.split()]
    finished = subprocess.run(
        ["bash", *script], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    calls = (tmp_path / "calls").read_text().splitlines()
    assert finished.returncode == 85 and finished.stderr == "", finished.stdout + finished.stderr
    again = "" if resume.endswith("1") else " --resume auto"
    assert calls[0].endswith(f"-m diffmoe_ds.train {resume}{again}"), "a restart resumes from the checkpoint"
    assert all("36_1" in call for call in calls[1:]) and any("squeue" in call for call in calls)
    assert (calls[-1] == "scontrol requeue 36_1") == requeued


@pytest.mark.parametrize("code", (0, 1))
def test_sampling_continues_to_the_time_limit_if_the_requeue_fails(tmp_path, code):
    stubs = {"srun": "kill -USR1 $PPID; sleep 0.5; echo generated; exit 7", "scontrol": f'echo "$@"; exit {code}'}
    for name, text in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = clean_environment(PATH=f"{tmp_path}:/usr/bin:/bin", SLURM_JOB_ID="36", SECONDS="60", RETRY_S="0")
    command = ["bash", str(REPOSITORY / "slurm/sample.sbatch")]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    failed = ["requeue 36", "requeue 36", "sample.sbatch: requeue failed; submit again to resume"] if code else []
    assert finished.stdout.splitlines() == ["sample.sbatch: requeued", "requeue 36", *failed, "generated"]
    assert finished.returncode == 7 and finished.stderr == ""
