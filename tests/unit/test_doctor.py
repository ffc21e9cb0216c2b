"""``diffmoe doctor``: every fault that it knows is injected into a healthy report; two ranks run it for real."""

from __future__ import annotations

import copy
import json
import os
import stat
from pathlib import Path

import pytest

from diffmoe_ds.cli import main
from diffmoe_ds.doctor.findings import to_fix
from diffmoe_ds.doctor.hosts import check_hosts, read_hostfile
from diffmoe_ds.errors import ConfigError
from tests.helpers.processes import run_ranks


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    """What two ranks of this machine report."""
    folder = tmp_path_factory.mktemp("doctor")
    arguments = ["-m", "diffmoe_ds.cli", "doctor", "--json", "--run-dir", str(folder / "runs"), "--timeout", "60"]
    finished = run_ranks(2, arguments)
    line = next(line for line in finished.output.splitlines() if line.startswith("{"))
    found = json.loads(line)
    assert finished.code == (1 if found["to_fix"] else 0), finished.output
    assert list(folder.iterdir()) == [], "nothing is left behind"
    return found


def healthy(report: dict) -> dict:
    """The report as if the two ranks were on two hosts without any fault."""
    made = copy.deepcopy(report)
    for number, rank in enumerate(made["ranks"]):
        rank["host"], rank["local_rank"] = f"node{number + 1}", 0
        rank |= {"own_name_is": f"10.0.0.{number + 1}", "interface": "eth0", "shm_free_gb": 8.0}
        rank["disk"] |= {"free_gb": 500.0, "free_files": 1000}
    made["clock_ahead_s"] = {"node2": 0.01}
    assert to_fix(made) == []
    return made


def test_report_of_two_ranks(report):
    assert report["world"] == 2 and [rank["rank"] for rank in report["ranks"]] == [0, 1]
    for rank in report["ranks"]:
        assert rank["versions"]["deepspeed"] != "missing" and rank["shared"] == {"reads": True, "writes": True}
        assert set(rank["ops"]) == {"fused_adam", "cpu_adam", "fused_lion", "cpu_lion"} and rank["interface"] != "none"
    for name in ("all_reduce", "all_to_all"):
        assert report[name]["ms"] > 0 and report[name]["gb_per_s"] > 0
    assert report["sent_mb"] and all(sum(sent.values()) > 1 for sent in report["sent_mb"].values())
    healthy(report)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    (
        (("ranks", 1, "versions", "torch"), "2.9", "node2: torch is 2.9"),
        (("ranks", 1, "python"), "3.9 /usr/bin/python", "node2: Python is 3.9"),
        (("ranks", 1, "device"), {"kind": "cuda", "name": "H100", "count": 1}, "node1: no GPU visible"),
        (("ranks", 1, "shared", "reads"), False, "node2: does not see"),
        (("ranks", 1, "shared", "writes"), False, "node2: cannot write to"),
        (("ranks", 1, "disk", "free_gb"), 0.5, "node2: 0.5 GB free in"),
        (("ranks", 1, "disk", "free_files"), 0, "node2: no free file entry in"),
        (("ranks", 1, "own_name_is"), "127.0.1.1", "set GLOO_SOCKET_IFNAME=eth0"),
        (("ranks", 1, "interface"), "none", "node2: no route to"),
        (("ranks", 1, "shm_free_gb"), 0.06, "node2: only 0.06 GB free in /dev/shm"),
        (("clock_ahead_s", "node2"), -3.25, "node2 by -3.2 s"),
        (("collectives_failed",), "rank 1 on node2: timed out", "collectives fail: rank 1 on node2"),
    ),
)
def test_each_fault_gives_one_sentence_with_its_host(report, where, value, message):
    broken = healthy(report)
    *path, last = where
    node = broken
    for key in path:
        node = node[key]
    node[last] = value
    found = to_fix(broken)
    assert len(found) == 1 and message in found[0] and found[0].endswith("."), found


def test_text_report_of_one_process(capsys, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    code = main(["doctor", "--run-dir", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].split()[:2] == ["to", "fix"] and (code == 0) == lines[-1].endswith("nothing")


@pytest.mark.parametrize(
    ("text", "message"),
    (
        ("node1 slots=x", "line 1 must be HOST slots=NUMBER, got 'node1 slots=x'"),
        ("node1 slots=1\nnode1 slots=2", "duplicate host 'node1' in line 2"),
        ("# nobody\n", "the file lists no hosts"),
    ),
)
def test_hostfile_mistakes(tmp_path, text, message):
    path = tmp_path / "hostfile"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_hostfile(path)


SSH = """#!/bin/sh
while :; do
  case $1 in --) shift; break ;; -o) shift 2 ;; -*) touch injected; shift ;; *) break ;; esac
done
host=$1; shift
case $host in
  good) exec sh -c "$*" ;;
  down) echo "ssh: connect to host down port 22: No route to host" >&2; exit 255 ;;
  key) echo "root@key: Permission denied (publickey)." >&2; exit 255 ;;
  stranger) echo "Host key verification failed." >&2; exit 255 ;;
  bare) echo "sh: 1: python: not found" >&2; exit 127 ;;
  apart) echo "sh: 1: cd: can't cd to /x" >&2; exit 2 ;;
  loud) head -c 100000 /dev/zero | tr '\\0' x >&2; printf '\\033[31m\\351\\n' >&2; exit 255 ;;
  killed) kill -9 $$ ;;
  old) printf '\\351\\n'; echo 'probe ["0.0.1", "1.0", "0.1", true]' ;;
  other) echo 'probe ["0.0.1", "1.0", "0.1", false]' ;;
esac
"""


def test_every_host_is_checked_over_ssh(tmp_path, monkeypatch):
    ssh = tmp_path / "bin/ssh"
    ssh.parent.mkdir()
    ssh.write_text(SSH)
    ssh.chmod(ssh.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{ssh.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    expected = {
        "down": "cannot be reached over ssh (ssh: connect to host down port 22: No route to host)",
        "key": "refuses our ssh key", "stranger": "its host key has changed or is unknown",
        "loud": "xx [31m\N{REPLACEMENT CHARACTER}).", "killed": "ssh was killed by signal 9 on this host",
        "bare": "install Python at the same path", "apart": "has no directory", "old": "has diffmoe_ds 0.0.1",
        "other": "is not the same directory as on this host",
    }  # fmt: skip
    assert check_hosts(["good"]) == []
    assert len(check_hosts(["-oProxyCommand=true"])) == 1 and not Path("injected").exists()  # a host, not an option
    found = check_hosts(["good", *expected])
    assert len(found) == len(expected)
    for sentence, (host, message) in zip(found, expected.items(), strict=True):
        assert sentence.startswith(f"{host}: ") and message in sentence and len(sentence) < 600
    ssh.chmod(0)
    monkeypatch.setenv("PATH", str(ssh.parent))
    assert check_hosts(["good"]) == ["good: cannot be checked: ssh does not start on this host: Permission denied."]
    assert {path.name for path in Path.cwd().iterdir()} == {"bin"}


def test_nodes_must_be_in_the_hostfile(tmp_path, capsys):
    (tmp_path / "hostfile").write_text("node1 slots=8\nnode2 slots=8\n")
    assert main(["doctor", "--hostfile", str(tmp_path / "hostfile"), "--nodes", "3"]) == 2
    assert "--nodes must be at most 2, the hosts in" in capsys.readouterr().err


def test_a_run_directory_below_a_file_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["doctor", "--run-dir", str(tmp_path / "file" / "runs")]) == 1
    assert f"cannot write to {tmp_path / 'file'};" in capsys.readouterr().out


@pytest.mark.parametrize("nodes", ("0", "-1"))
def test_nodes_must_be_positive(tmp_path, capsys, nodes):
    (tmp_path / "hostfile").write_text("node1 slots=1\n")
    assert main(["doctor", "--hostfile", str(tmp_path / "hostfile"), "--nodes", nodes]) == 2
    assert f"--nodes must be positive, got {nodes}" in capsys.readouterr().err
