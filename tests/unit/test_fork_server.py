"""Forked ranks run and exit as if they had been started cold."""

from __future__ import annotations

import signal
import sys

import pytest

from tests.helpers import processes
from tests.helpers.processes import REPOSITORY, clean_environment, fork_server, run_processes, run_ranks, wait_for_end


@pytest.fixture
def script(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "script.py"
        path.write_text(text)
        return str(path)

    return write


DESCRIBE = """
import atexit, json, os, signal, sys
atexit.register(print, "at exit")
print(json.dumps([
    os.environ, os.getcwd(), sys.path, sys.argv, __name__, os.getpid() == os.getpgid(0), sys.stdin.read(),
    str(signal.getsignal(signal.SIGINT)), str(signal.getsignal(signal.SIGTERM)), len(os.listdir("/proc/self/task")),
    sys.modules["__main__"].__dict__ is globals(), sys.flags, sorted(os.listdir("/proc/self/fd")),
], default=str))
print("warning", file=sys.stderr)
sys.exit(int(os.environ["RANK"]) * 3)
"""


def test_a_forked_rank_sees_what_a_cold_one_sees(script, monkeypatch):
    monkeypatch.setattr(processes, "free_port", lambda: 12345)
    arguments = [script(DESCRIBE), "--a", "b c"]
    forked = run_ranks(2, arguments)
    monkeypatch.setattr(processes, "can_fork", lambda: False)
    assert forked == run_ranks(2, arguments)
    assert forked.code == 3 and forked.output.count("at exit") == forked.output.count("warning\n") == 2


def test_ranks_are_forked(script):
    finished = run_ranks(2, [script("import os, sys; print(os.getppid(), 'torch' in sys.modules)")])
    assert finished.code == 0 and finished.output == f"{fork_server().pid} True\n" * 2


def test_a_module_runs_as_main(tmp_path):
    forked = run_ranks(1, ["-m", "diffmoe_ds.cli", "config", "routing"])
    cold = run_processes([([sys.executable, "-m", "diffmoe_ds.cli", "config", "routing"], clean_environment())])
    assert forked == cold and forked.code == 0


def test_an_exception_gives_code_1_and_a_traceback(script):
    finished = run_ranks(1, [script("1 / 0")])
    assert finished.code == 1 and finished.output.endswith("ZeroDivisionError: division by zero\n")


def test_a_rank_killed_by_a_signal_is_a_failure(script):
    finished = run_ranks(2, [script("import os; os.environ['RANK'] == '1' and os.kill(os.getpid(), 11)")])
    assert finished.code == -signal.SIGSEGV


def test_a_timeout_kills_the_whole_process_group(script, tmp_path):
    text = (
        "import subprocess, sys, time; p = subprocess.Popen(['sleep', '99']); print(p.pid, flush=True); time.sleep(99)"
    )
    with pytest.raises(pytest.fail.Exception, match=r"hung for 1 s") as failure:
        run_ranks(1, [script(text)], timeout=1)
    wait_for_end(int(str(failure.value).split("\n")[1]))


def test_a_changed_environment_starts_cold(script, monkeypatch):
    monkeypatch.setenv("DS_BUILD_OPS", "0")
    arguments = [script("import os, sys; print('torch' in sys.modules, os.environ['DS_BUILD_OPS'])")]
    assert run_ranks(1, arguments).output == "False 0\n"
    monkeypatch.delenv("DS_BUILD_OPS")
    assert run_ranks(1, arguments, DS_BUILD_OPS="1").output == "False 1\n"
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    assert not processes.can_fork()


@pytest.fixture
def quick_servers(monkeypatch):
    """Servers that import nothing, in place of this process's server."""
    monkeypatch.setattr(processes, "_servers", [])
    monkeypatch.setattr(processes.ForkServer.__init__, "__defaults__", ((),))


def test_the_ranks_of_a_dead_server_die_with_it_and_it_is_replaced(script, tmp_path, quick_servers):
    path = tmp_path / "pid"
    text = f"""
import os, signal, time
with open({str(path)!r}, "w") as file:
    file.write(str(os.getpid()))
os.kill({fork_server().pid}, signal.SIGKILL)
time.sleep(99)
"""
    with pytest.raises(RuntimeError, match="the fork server has died"):
        run_ranks(1, [script(text)])
    wait_for_end(int(path.read_text()))
    assert run_ranks(1, [script("print(1)")]).output == "1\n"


@pytest.mark.parametrize("end", ("pass", "os.kill(os.getpid(), 9)"))
def test_the_server_exits_with_its_parent(end):
    text = (
        "from tests.helpers.processes import *; s = ForkServer(()); atexit.register(s.close); print(s.pid, flush=True)"
    )
    command = [sys.executable, "-c", f"{text}; {end}"]
    finished = run_processes([(command, clean_environment(PYTHONPATH=str(REPOSITORY)))])
    wait_for_end(int(finished.output))
