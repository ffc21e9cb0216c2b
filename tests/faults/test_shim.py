"""The shim fails exactly the calls that it is asked to."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from tests.faults.shim import Rule, fault_environment
from tests.helpers.processes import clean_environment

SCRIPT = """
import os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
def attempt(name, action):
    try:
        action()
        print(name, "done", flush=True)
    except OSError as error:
        print(name, error.errno, flush=True)
def write():
    with open(folder / "file", "wb", buffering=0) as file:
        file.write(b"12")
        os.fsync(file.fileno())
        file.truncate(1)
for number in range(3):
    attempt("write", write)
attempt("read", lambda: (folder / "file").read_bytes())
attempt("rename", lambda: (folder / "file").rename(folder / "other"))
attempt("mkdir", lambda: (folder / "folder").mkdir())
attempt("link", lambda: os.link(folder / "other", folder / "linked"))
attempt("unlink", lambda: (folder / "other").unlink())
print(time.time())
"""


def run(folder, *rules: Rule, clock_shift_s: int = 0) -> tuple[int, list[str]]:
    env = clean_environment(**fault_environment(*rules, log=folder / "log", clock_shift_s=clock_shift_s))
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    found = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert found.returncode < 0 or not found.stderr, found.stderr
    return found.returncode, found.stdout.splitlines()


def test_nothing_happens_without_rules(tmp_path):
    code, lines = run(tmp_path)
    assert code == 0 and all(line.endswith("done") for line in lines[:-1]) and len(lines) == 9
    assert abs(float(lines[-1]) - time.time()) < 3600


@pytest.mark.parametrize("operation", ("open", "write", "fsync", "truncate"))
def test_the_nth_call_fails(tmp_path, operation):
    _, lines = run(tmp_path, Rule(operation, "*/file", "EIO", n=2))
    assert lines[:3] == ["write done", "write 5", "write done"]
    fields = (tmp_path / "log").read_text().split()
    assert fields[1:] == [operation, "5", str(tmp_path / "file")]


@pytest.mark.parametrize("operation", ("read", "rename", "link", "unlink", "mkdir"))
def test_other_calls_fail(tmp_path, operation):
    _, lines = run(tmp_path, Rule(operation, f"{tmp_path}/*", "ENOSPC", repeats=True))
    before = lines[: lines.index(f"{operation} 28")]
    assert all(line.endswith("done") for line in before), lines


def test_a_process_is_killed_before_or_after_the_call(tmp_path):
    code, lines = run(tmp_path, Rule("rename", "*/other", "kill"))
    assert code == -signal.SIGKILL and (tmp_path / "file").exists() and len(lines) == 4
    code, _ = run(tmp_path, Rule("rename", "*/other", "after-kill"))
    assert code == -signal.SIGKILL and not (tmp_path / "file").exists() and (tmp_path / "other").exists()


def test_the_clock_is_shifted(tmp_path):
    _, lines = run(tmp_path, clock_shift_s=-86400)
    assert abs(float(lines[-1]) + 86400 - time.time()) < 3600
