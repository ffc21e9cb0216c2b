"""The scripts themselves: shellcheck over every one, and what they would run."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cluster.conftest import skip_or_fail
from tests.conftest import REPOSITORY, clean_environment

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

LAUNCHERS = sorted((REPOSITORY / "launchers").glob("*.sh"))
SCRIPTS = sorted(
    path
    for path in REPOSITORY.rglob("*")
    if (path.suffix in (".sh", ".sbatch") or path == REPOSITORY / ".ci/run")
    and not any(part in (".venv", "runs", ".git") for part in path.relative_to(REPOSITORY).parts)
)


def test_shellcheck_over_every_script():
    if shutil.which("shellcheck") is None:
        skip_or_fail("needs shellcheck: tests/cluster/install.sh installs it")
    assert len(SCRIPTS) >= 11
    command = ["shellcheck", *map(str, SCRIPTS), str(REPOSITORY / "slurm/env.example")]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stdout


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_dry_run_prints_the_command_and_documents_every_variable(path: Path):
    """Short, runnable from anywhere, with the options as they were given."""
    variables = {
        "HOSTFILE": "my hosts", "NODES": "3", "NODE_RANK": "1", "PROCESSES": "5", "MASTER_ADDR": "node7",
        "MASTER_PORT": "29999", "PYTHON": "/opt/py thon", "LAUNCHER": "openmpi", "RANKS": "6",
        "LAUNCHER_ARGS": "--a --b", "MPI_OPTIONS": "--mca x y",
    }  # fmt: skip
    finished = subprocess.run(
        [str(path), "--dry-run", "--set", "data.path=a b"], env=clean_environment(**variables), cwd="/",
        capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    words = shlex.split(finished.stdout)
    assert words[-2:] == ["--set", "data.path=a b"] and "diffmoe_ds/train.py" in words and "/opt/py thon" in words
    text = path.read_text()
    assert text.count("\n") < 50
    head = text.partition("set -euo")[0]
    for name, value in variables.items():
        used = f"{{{name}:-" in text
        assert used == (f"#   {name} " in head), f"{name} is used but not documented, or the other way round"
        if used and name not in ("MASTER_PORT",):
            assert value in words or any(value in word for word in words) or (name == "MPI_OPTIONS" and "x" in words)
