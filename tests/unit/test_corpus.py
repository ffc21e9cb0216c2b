"""Hostile files that stay: each is read within bounded time and memory, or refused by an error of ours.

``tests/corpus/FORMAT/CASE`` replaces the valid file of a format in `tests.helpers.parsers`; `tests.helpers.limits` adds
what is too large to be kept, and what can be in the place of any file. To add a case, write a file.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from tests.helpers.fuzz import EXAMPLES
from tests.helpers.limits import CORPUS, HANG_S
from tests.helpers.parsers import PARSERS, outcome
from tests.helpers.processes import REPOSITORY, clean_environment

MAX_SECONDS = 20
"""CPU time of a case: ten times what is documented, as machines differ."""


def test_every_format_has_a_parser():
    assert {path.name for path in CORPUS.iterdir()} <= PARSERS.keys()
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < 200_000


@pytest.mark.usefixtures("hang_limit")
@pytest.mark.parametrize("name", PARSERS)
def test_small_files(tmp_path, name):
    for path in sorted((CORPUS / name).glob("*")):
        (tmp_path / path.name).mkdir()
        target = PARSERS[name].write(tmp_path / path.name)
        shutil.copyfile(path, target)
        outcome(PARSERS[name], target)


@pytest.mark.slow
def test_hostile_files_are_bounded():
    command = [sys.executable, "-m", "tests.helpers.limits", *PARSERS]
    environment = clean_environment(MALLOC_ARENA_MAX="1", PYTHONPATH=str(REPOSITORY))  # arenas only reserve memory
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True, timeout=900)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"ended by {done.returncode} (a hang of {HANG_S} s is -14) at {lines[-1]}"
    found = {}
    for line in lines:
        case, _, result = line.partition("} ")
        found[json.loads(case + "}")["case"]] = json.loads(result)
    assert len(found) > 300
    failed = [f"{case}: {result['error']}" for case, result in found.items() if result["error"]]
    assert not failed, "\n".join(failed)
    assert max(result["seconds"] for result in found.values()) < MAX_SECONDS


@pytest.mark.long
@pytest.mark.skipif(bool(EXAMPLES), reason="is the test that starts this run")
def test_many_examples():
    """The fuzz tests with new examples at every run."""
    command = [sys.executable, "-m", "pytest", "tests/unit", "-k", "test_fuzz"]
    environment = clean_environment(DIFFMOE_FUZZ_EXAMPLES="2000", PYTHONPATH=str(REPOSITORY))
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=14_400)
    assert done.returncode == 0, done.stdout[-5000:]
