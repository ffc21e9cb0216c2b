"""One job at a time in a run directory: who holds it, who waits, who takes over."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from diffmoe_ds.distributed import run_lock as lock_module
from diffmoe_ds.distributed.ownership import Owner
from diffmoe_ds.distributed.run_lock import RunLock
from diffmoe_ds.errors import CheckpointError, RunDirectoryBusyError
from tests.helpers.processes import clean_environment

HOLD = """
import sys, time
from pathlib import Path
from diffmoe_ds.distributed.run_lock import RunLock
with RunLock(Path(sys.argv[1]), Path(sys.argv[1], "checkpoints")):
    print("held", flush=True)
    time.sleep(60)
"""


def lock(directory: Path, environ: dict[str, str] | None = None) -> RunLock:
    return RunLock(directory, directory / "checkpoints", environ)


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    for name, seconds in (("BEAT_S", 0.05), ("STALE_S", 0.6), ("SETTLE_S", 0.1)):
        monkeypatch.setattr(lock_module, name, seconds)


def elsewhere(directory: Path, **changes: object) -> Path:
    """The lock as left behind by a process on another host."""
    holder = {
        "token": "theirs", "host": "node9", "pid": 7, "process": {"started": "1", "boot": "b", "namespace": "n"},
        "since": "then", "job": None, "restarts": 0, "beat": 3, **changes,
    }  # fmt: skip
    path = directory / "lock.json"
    path.write_text(json.dumps(holder))
    return path


def test_second_process_is_refused_until_the_first_exits(tmp_path):
    with lock(tmp_path, {"SLURM_JOB_ID": "12"}):
        with pytest.raises(RunDirectoryBusyError, match=rf"is in use by job 12, process {os.getpid()} on "):
            lock(tmp_path, {"SLURM_JOB_ID": "13"}).__enter__()
        assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["checkpoints", "lock.json"]
        assert len(list(tmp_path.rglob(".writing-*"))) == 2, "the holder's"
    assert list(tmp_path.iterdir()) == []
    with lock(tmp_path):
        pass


def test_lock_of_a_killed_process_on_this_host_is_reclaimed(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "STALE_S", 1000.0)
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, env=clean_environment(), stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        holder.send_signal(signal.SIGKILL)
    assert (tmp_path / "lock.json").exists()
    with lock(tmp_path) as taken:
        taken.check()


def test_lock_of_a_dead_host_is_reclaimed_after_a_wait(tmp_path, capsys):
    elsewhere(tmp_path, job="12")
    begun = time.monotonic()
    with lock(tmp_path, {"SLURM_JOB_ID": "13"}):
        assert 0.6 <= time.monotonic() - begun < 5
    assert "to see whether job 12, process 7 on node9" in capsys.readouterr().err


def test_requeued_job_does_not_wait_for_its_earlier_self(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "STALE_S", 1000.0)
    elsewhere(tmp_path, job="12", restarts=1)
    with lock(tmp_path, {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "2"}):
        pass


def test_heartbeat_from_another_host_keeps_its_lock(tmp_path, monkeypatch):
    """A holder whose disk is full can still touch its file."""
    path, sleep = elsewhere(tmp_path), time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: (os.utime(path), sleep(seconds)))
    with pytest.raises(RunDirectoryBusyError, match="process 7 on node9"):
        lock(tmp_path).__enter__()
    assert json.loads(path.read_text())["token"] == "theirs", "left as it was"


def test_only_one_of_many_takes_over_a_stale_lock(tmp_path):
    elsewhere(tmp_path)
    locks, won, lost = [lock(tmp_path) for _ in range(6)], [], []

    def take(candidate: RunLock) -> None:
        try:
            won.append(candidate.__enter__())
        except RunDirectoryBusyError as error:
            lost.append(error)

    threads = [threading.Thread(target=take, args=(candidate,)) for candidate in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and len(lost) == 5
    won[0].__exit__()
    assert list(tmp_path.iterdir()) == []


def test_frozen_holder_notices_the_takeover_and_keeps_the_new_lock(tmp_path):
    with lock(tmp_path) as frozen:
        elsewhere(tmp_path, job="13")
        deadline = time.monotonic() + 60
        with pytest.raises(RunDirectoryBusyError, match="was taken over by job 13"):
            while time.monotonic() < deadline:
                frozen.check()
                time.sleep(0.01)
    assert json.loads((tmp_path / "lock.json").read_text())["job"] == "13"


def test_holder_is_named_in_one_line(tmp_path):
    with lock(tmp_path) as frozen:
        elsewhere(tmp_path, host="node\n\x1b[31m", since="x" * 1000)
        with pytest.raises(RunDirectoryBusyError, match=r"by process 7 on unknown \(since x{80}\): this"):
            frozen.check_now()


def test_start_whose_directory_is_moved_away_names_the_cause(tmp_path, monkeypatch):
    """Another job takes the lock and ends while a start is suspended, here between its two directories."""
    late, claim = lock(tmp_path), Owner.claim

    def claim_slowly(owner, root):
        claim(owner, root)
        if owner is late.owner:
            with lock(tmp_path):
                pass

    monkeypatch.setattr(Owner, "claim", claim_slowly)
    with pytest.raises(RunDirectoryBusyError, match="was just locked by another job"):
        late.__enter__()
    assert list(tmp_path.iterdir()) == []


def test_holder_that_releases_the_lock_during_a_takeover_does_not_end_the_new_job(tmp_path, monkeypatch):
    path, sleep = elsewhere(tmp_path), time.sleep

    def release(seconds):
        if seconds == lock_module.SETTLE_S:
            path.unlink()
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", release)
    with lock(tmp_path) as taken:
        assert json.loads(path.read_text())["token"] == taken.owner.token
    assert list(tmp_path.iterdir()) == []


def test_damaged_lock_is_replaced(tmp_path):
    (tmp_path / "lock.json").write_text("{")
    with lock(tmp_path):
        pass


def test_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written on"):
        lock(tmp_path / "file" / "run").__enter__()


@pytest.mark.parametrize("kind", ("file", "dangling link", "link to itself"))
def test_checkpoints_that_are_no_directory_are_named(tmp_path, kind):
    root = tmp_path / "checkpoints"
    if kind == "file":
        root.touch()
    else:
        root.symlink_to(tmp_path / "missing" if kind == "dangling link" else root)
    with pytest.raises(CheckpointError, match=rf"^{root}: cannot be written on [^\n]*\.$"):
        lock(tmp_path).__enter__()
    assert os.listdir(tmp_path) == ["checkpoints"]


def test_a_dangling_link_to_the_checkpoints_is_named(tmp_path):
    (tmp_path / "checkpoints").symlink_to(tmp_path / "missing")
    with pytest.raises(CheckpointError, match=r"cannot be written on [^\n]*: the target of the link does not exist\.$"):
        lock(tmp_path).__enter__()


def test_what_another_job_removes_meanwhile_gives_no_warning(tmp_path, monkeypatch, capsys):
    (tmp_path / f".writing-{'ab' * 8}").mkdir()
    rename = Path.rename

    def vanish(path: Path, target: Path) -> Path:
        if path.name == f".writing-{'ab' * 8}":
            path.rmdir()
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", vanish)
    with lock(tmp_path):
        pass
    assert not capsys.readouterr().err


def test_a_lock_that_cannot_be_read_back_is_no_other_job(tmp_path, monkeypatch):
    def fail(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    with monkeypatch.context() as context:
        context.setattr(lock_module, "open_regular", fail)
        with pytest.raises(CheckpointError, match=r"lock\.json: cannot be written on .*: Input/output error\.$"):
            lock(tmp_path).__enter__()
    with lock(tmp_path):
        pass


@pytest.mark.parametrize("failing", (1, 3))
@pytest.mark.parametrize("code", (errno.EIO, errno.EACCES, errno.ESTALE))
def test_a_lock_that_cannot_be_read_is_not_taken_over(tmp_path, monkeypatch, code, failing):
    """Neither at once nor during the wait: the job that holds it may be running."""
    path, opened, reads = elsewhere(tmp_path), lock_module.open_regular, []

    def fail(lock_path: Path) -> object:
        reads.append(lock_path)
        if len(reads) == failing:
            raise OSError(code, os.strerror(code), str(lock_path))
        return opened(lock_path)

    monkeypatch.setattr(lock_module, "open_regular", fail)
    with pytest.raises(CheckpointError, match=rf"^{path}: cannot be written on .*: {os.strerror(code)}\.$"):
        lock(tmp_path).__enter__()
    assert json.loads(path.read_text())["token"] == "theirs"


@pytest.mark.parametrize("kind", ("pipe", "socket", "link to itself"))
def test_something_else_in_the_place_of_the_lock_is_replaced(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # the name of a socket may be short only
    if kind == "pipe":
        os.mkfifo("lock.json")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("lock.json")
    else:
        Path("lock.json").symlink_to("lock.json")
    with lock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_for_a_moment_does_not_cost_the_lock(tmp_path, monkeypatch):
    with lock(tmp_path) as held:
        own, stat = tmp_path / f".writing-{held.owner.token}", os.stat

        def fail(path: object, **options: object) -> os.stat_result:
            if str(path).startswith((str(own), str(tmp_path / "lock.json"))):
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
            return stat(path, **options)

        with monkeypatch.context() as context:
            context.setattr(os, "stat", fail)
            held.check_now()


def test_a_run_directory_that_was_replaced_is_not_blamed_on_a_job(tmp_path):
    run = tmp_path / "run"
    with lock(run) as held:
        run.rename(tmp_path / "moved")
        run.mkdir()
        with pytest.raises(RunDirectoryBusyError, match=r"run: was moved or replaced, or another job has used it"):
            held.check_now()


def test_no_file_is_open_when_it_is_removed(tmp_path, monkeypatch):
    """NFS would keep it as ``.nfs...``, and the directory with it."""
    opened, release = [], Owner.release

    def watch(owner: Owner, root: Path) -> None:
        links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        opened.extend(target for target in map(os.path.realpath, links) if target.startswith(str(tmp_path)))
        release(owner, root)

    monkeypatch.setattr(Owner, "release", watch)
    with lock(tmp_path):
        pass
    assert not opened and not list(tmp_path.iterdir())
