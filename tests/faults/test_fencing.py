"""A job that is suspended around a rename, and wakes up when another job owns its run directory, changes nothing."""

from __future__ import annotations

import errno
import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest

from diffmoe_ds.checkpoint.layout import checkpoint_root
from diffmoe_ds.checkpoint.verify import candidates, newest_valid
from diffmoe_ds.distributed.run_lock import RunLock
from diffmoe_ds.files import remove_tree
from diffmoe_ds.outputs import make_directory, make_file
from diffmoe_ds.training import log_files
from diffmoe_ds.training.log_files import JsonlLog, TensorBoardLog
from tests.faults.processes import snapshot
from tests.faults.shim import Rule, fault_environment
from tests.helpers.processes import MODULES as TRAINING_MODULES
from tests.helpers.processes import (
    REPOSITORY,
    ForkedProcess,
    ForkServer,
    clean_environment,
    free_port,
    rank_environment,
)
from tests.helpers.training import training_arguments, write_json

LIMIT_S = 120
MODULES = ("torch", "diffmoe_ds.checkpoint.save", "diffmoe_ds.distributed.run_lock", "diffmoe_ds.training.log_files")


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    server = ForkServer(MODULES, **fault_environment())
    yield server
    server.close()


@pytest.fixture(scope="module")
def training_server() -> Iterator[ForkServer]:
    server = ForkServer(TRAINING_MODULES, **fault_environment())
    yield server
    server.close()


@dataclass
class Job:
    """A started `owner.py`."""

    process: ForkedProcess
    output: IO[str]
    told: str = ""
    """All of its output, once it has ended."""

    def text(self) -> str:
        with open(f"/proc/self/fd/{self.output.fileno()}") as copy:  # a position of its own: the job shares the file's
            return copy.read()

    def wait(self, *, until_stopped: bool = False) -> int | None:
        """Return the exit code; None once the job is stopped, if that is awaited."""
        deadline = time.monotonic() + LIMIT_S
        while self.process.poll() is None:
            if until_stopped and state(self.process.pid) == "T":
                return None
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.005)
        return self.process.poll()


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


@contextmanager
def job(server: ForkServer, run: Path, *options: str, rules: tuple[Rule, ...] = ()) -> Iterator[Job]:
    """Start a job, and kill it at the end of the block if it is still there."""
    environment = clean_environment(**fault_environment(*rules))
    with started(server, ["tests/faults/owner.py", str(run), *options], environment) as found:
        yield found


@contextmanager
def started(server: ForkServer, arguments: list[str], environment: dict[str, str]) -> Iterator[Job]:
    """Start a process, and kill it at the end of the block if it is still there."""
    with tempfile.TemporaryFile("w+") as output:
        process = server.start(arguments, environment, REPOSITORY, output)
        found = Job(process, output)
        try:
            yield found
        finally:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                process.kill()
            found.told = found.text()


def wake_up(server: ForkServer, run: Path, action: str, n: int, *, during: bool) -> bool:
    """Suspend a job around its n-th rename, let another job take over, wake the first one, and check what it does.

    Args:
        server: starts the jobs.
        run: the run directory.
        action: ``stop`` or ``after-stop``.
        n: number of the rename, after the lock is taken.
        during: whether the first job wakes up while the other one still runs.

    Returns:
        Whether the job has that many renames.
    """
    go = run.with_name(f"{run.name}-go")
    with job(server, run, "--saves", "2") as earlier:
        assert earlier.wait() == 0, earlier.text()
    rule = Rule("rename", f"{run}/*", action, n=n)
    with job(server, run, "--saves", "4", rules=(rule,)) as old:
        if old.wait(until_stopped=True) is not None:
            assert old.wait() == 0, old.text()
            return False
        with job(server, run, "--saves", "3", *(("--pause", str(go)) if during else ())) as new:
            while during and "saved" not in new.text() and new.process.poll() is None:
                time.sleep(0.01)
            if not during:
                assert new.wait() == 0, new.text()
            before, told = snapshot(run), old.text()
            os.kill(old.process.pid, signal.SIGCONT)
            code = old.wait()
            assert code in (0, 2, 5) and "Traceback" not in old.text(), (code, old.text())
            assert code == 0 or "error: " in old.text(), old.text()  # 0: it was about to release the lock
            for line in old.text()[len(told) :].splitlines():  # true only of what it had published before
                assert not line.startswith("saved") or f"resumed {line.split()[1]}\n" in new.text(), line
            assert snapshot(run) == before, f"rename {n}, {action}: {old.text()}"
            go.touch()
            assert new.wait() == 0, new.text()
            check_complete(run, new.text())
    return True


def check_complete(run: Path, text: str) -> None:
    """Check that the new job's checkpoints are those of a run that nothing has disturbed."""
    assert text.count("saved") == 3, text
    saved = [Path(line.split()[1]) for line in text.splitlines() if line.startswith("saved")]
    assert candidates(run) == saved[:0:-1], (candidates(run), text)  # keep_last is 2
    assert newest_valid(run, full=True) == saved[-1]
    assert (run / "checkpoints" / "latest").read_text() == f"{saved[-1].name}\n"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "no row is lost, and none appears twice"
    assert len({row["process"] for row in rows[-3:]}) == 1, "those of the new job"
    hidden = list(run.rglob(".*"))
    assert not hidden and not (run / "lock.json").exists(), hidden


def test_a_woken_job_changes_nothing(server, tmp_path):
    assert wake_up(server, tmp_path / "run", "stop", 6, during=True)


@pytest.mark.parametrize(
    ("action", "during"),
    (
        pytest.param("stop", True, marks=pytest.mark.slow),
        pytest.param("after-stop", False, marks=pytest.mark.slow),
        pytest.param("stop", False, marks=pytest.mark.long),
        pytest.param("after-stop", True, marks=pytest.mark.long),
    ),
)
def test_a_job_woken_around_any_rename_changes_nothing(server, tmp_path, action, during):
    for n in range(1, 100):
        if not wake_up(server, tmp_path / f"run-{n}", action, n, during=during):
            break
    assert n > 12, "renames of the lock, the recipe, and four checkpoints"


def training(server: ForkServer, run: Path, rank: int, port: int, *rules: Rule) -> AbstractContextManager[Job]:
    """Start a rank of a run of three steps on two ranks, in Slurm job 7."""
    config = write_json(run.with_name("ds.json"), ep=2, zero=2)
    settings = ("run.total_images=48", "run.save_every_images=16")
    environment = rank_environment(rank, 2, port, SLURM_JOB_ID="7", **fault_environment(*rules))
    return started(server, ["diffmoe_ds/train.py", *training_arguments(config, run, *settings)], environment)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "resumes"),
    (
        pytest.param(Rule("read", "*/rank_00000.safetensors", "stop"), True, id="resume"),
        pytest.param(Rule("rename", "*/resolved.yaml", "stop"), False, id="recipe"),
        pytest.param(Rule("open", "*/.writing-metrics*", "stop"), False, id="log"),
        pytest.param(Rule("rename", "*/images_000000000048", "after-stop"), False, id="end"),
    ),
)
def test_a_woken_run_says_that_another_job_has_taken_over(training_server, tmp_path, rule, resumes):
    """Whatever it was about to do, the missing files are not what it reports, and it announces no checkpoint."""
    run, codes, before_takeover = tmp_path / "run", [], ""
    for rules in ((), (rule,)) if resumes else ((rule,),):
        port = free_port()
        ranks = training(training_server, run, 0, port, *rules), training(training_server, run, 1, port)
        with ranks[0] as first, ranks[1] as second:
            if rules:
                assert first.wait(until_stopped=True) is None, first.text()
                with RunLock(run, checkpoint_root(run), {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}):
                    if resumes:
                        remove_tree(checkpoint_root(run) / "images_000000000048")
                    before, before_takeover = snapshot(run), first.text()
                    os.kill(first.process.pid, signal.SIGCONT)
                    codes = [first.wait(), second.wait()]
                    assert snapshot(run) == before
            else:
                assert [first.wait(), second.wait()] == [0, 0], first.text()
    assert codes == [2, 2], first.told + second.told
    assert f"error: {run}: was taken over by job 7, process {os.getpid()} on " in first.told
    assert "saved  " not in first.told[len(before_takeover) :]
    assert "Traceback" not in first.told + second.told


def test_leftovers_that_cannot_be_removed_do_not_matter(server, tmp_path):
    """Links are removed, never followed; what is in use or protected stays, with a warning at every start."""
    run, outside = tmp_path / "run", tmp_path / "outside"
    root = run / "checkpoints"
    (root / ".writing-images_000000000016").mkdir(parents=True)
    (root / ".writing-images_000000000016" / ".nfs0001").touch()
    outside.mkdir()
    (outside / "file").touch()
    (root / ".removing-link").symlink_to(outside)
    (root / ".writing-0123456789abcdef").symlink_to(outside)
    for _ in range(2):
        with job(server, run, "--saves", "1", rules=(Rule("unlink", "*.nfs*", "EBUSY", repeats=True),)) as found:
            assert found.wait() == 0, found.text()
        assert warnings_of(found, "cannot be removed: Device or resource busy") == 1, found.told
        kept = [str(path.relative_to(root)) for path in run.rglob(".nfs*")]
        assert kept == [".removing-.writing-images_000000000016/.nfs0001"], "not deeper at every start"
    with job(server, run, "--saves", "1") as found:
        assert found.wait() == 0 and not warnings_of(found, "")
    assert (outside / "file").exists() and not list(run.rglob(".*"))


def warnings_of(found: Job, text: str) -> int:
    return sum("WARNING" in line and text in line for line in found.told.splitlines())


@pytest.mark.parametrize("operation", ("rename", "fsync"))
def test_a_failure_after_the_directory_is_renamed_is_only_a_warning(server, tmp_path, operation):
    """The checkpoint is saved, and the next start prefers it to the one that `latest` still names."""
    run = tmp_path / "run"
    n = 2 if operation == "rename" else 1
    rule = Rule(operation, "*/latest" if operation == "rename" else f"{run}/checkpoints", "EIO", n=n, repeats=True)
    with job(server, run, "--saves", "2", rules=(rule,)) as first:
        assert first.wait() == 0, first.text()
    saved = [line for line in first.told.splitlines() if line.startswith("saved")]
    warning = f"{run}/checkpoints/latest: cannot be written: Input/output error; the checkpoint is saved"
    assert len(saved) == 2 and warnings_of(first, warning) == 3 - n, first.told
    with job(server, run, "--saves", "1") as second:
        assert second.wait() == 0
    assert f"resumed {run}/checkpoints/images_000000000032\n" in second.told


def test_nothing_is_created_in_a_run_directory_that_replaced_this_one(tmp_path, capsys):
    """It may belong to another job, which has not created these files yet."""
    run, moved = tmp_path / "run", tmp_path / "moved"
    own = run / ".writing-0123456789abcdef"
    own.mkdir(parents=True)
    log, board = JsonlLog(run / "metrics.jsonl", 0, own), TensorBoardLog(run / "tensorboard", 0, own)
    run.rename(moved)
    run.mkdir()
    log.add({"step": 1})
    board.flush()
    assert not list(run.iterdir()) and "the run directory was removed, replaced or taken" in capsys.readouterr().err

    run.rmdir()
    moved.rename(run)
    log.add({"step": 2})
    log.close(), board.close()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2, "it was only moved for a while"


@pytest.mark.parametrize("make", (make_directory, make_file))
def test_nothing_is_created_after_a_takeover_between_check_and_call(tmp_path, monkeypatch, make):
    """As if the process had been suspended there."""
    own = tmp_path / ".writing-0123456789abcdef"
    own.mkdir()
    create = "mkdir" if make is make_directory else "touch"
    original = getattr(Path, create)

    def late(path: Path, *args: object, **options: object) -> None:
        remove_tree(own)
        original(path, *args, **options)

    monkeypatch.setattr(Path, create, late)
    with pytest.raises(FileNotFoundError):
        make(tmp_path / "new", own)
    assert not list(tmp_path.iterdir())


def test_a_woken_job_creates_no_event_file(tmp_path, monkeypatch):
    own = tmp_path / ".writing-0123456789abcdef"
    own.mkdir()
    monkeypatch.setattr(log_files, "require_owned", lambda owned: remove_tree(own))  # just after its check
    board = TensorBoardLog(tmp_path / "tensorboard", 0, own)
    board.close()
    assert not list(tmp_path.iterdir())


def test_files_are_created_where_nothing_can_be_moved_to(tmp_path, monkeypatch):
    def rename(path: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(Path, "rename", rename)
    own = tmp_path / "own"
    own.mkdir()
    board = TensorBoardLog(tmp_path / "tensorboard", 0, own)
    board.close()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1 and not list(own.iterdir())
