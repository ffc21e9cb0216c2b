"""Log files survive I/O errors, removed files and clocks that are set back; nothing is lost if the disk recovers."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffmoe_ds.cli import main
from diffmoe_ds.config.load import load_config
from diffmoe_ds.errors import CheckpointError
from diffmoe_ds.training import hooks, log_files
from diffmoe_ds.training.log_files import JsonlLog, TensorBoardLog
from diffmoe_ds.training.session import Session
from tests.faults.shim import Rule, fault_environment
from tests.helpers.processes import clean_environment
from tests.helpers.training import read_metrics, training_arguments, write_json


def row(step: int) -> dict:
    return {"step": step, "text": "x" * 50}


def steps(path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def fail(number: int = errno.EIO):
    def raise_error(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    return raise_error


def write_half_then_fail(file: int, data: bytes) -> int:
    os.pwrite(file, data[: len(data) // 2], os.fstat(file).st_size)
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("number", (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE))
def test_rows_wait_until_the_disk_recovers(tmp_path, capsys, monkeypatch, number):
    path = tmp_path / "metrics.jsonl"
    log = JsonlLog(path, 0)
    log.add(row(1))
    for name in ("write", "open", "fstat", "ftruncate", "close"):  # whichever of its calls fails
        with monkeypatch.context() as context:
            if name in ("open", "ftruncate"):  # they are only called after an error
                context.setattr(log_files.os, "write", write_half_then_fail)
                log.add(row(2))
            context.setattr(log_files.os, name, fail(number))
            log.add(row(2))
        log.add(row(3))
        kept = steps(path)
        assert kept[0] == 1 and kept[-1] == 3 and 2 in kept, name
        assert path.read_bytes().count(b"\0") == 0
    assert os.strerror(number) in capsys.readouterr().err
    log.close()


def test_one_warning_for_many_failures_and_no_part_of_a_row(tmp_path, capsys, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    log = JsonlLog(path, 0)
    log.add(row(1))
    with monkeypatch.context() as context:
        context.setattr(log_files.os, "write", write_half_then_fail)
        for step in range(2, 50):
            log.add(row(step))
    assert capsys.readouterr().err.count("WARNING") == 1
    log.add(row(50))
    log.close()
    assert steps(path) == list(range(1, 51)) and not capsys.readouterr().err


def test_memory_is_bounded_and_lost_rows_are_counted(tmp_path, capsys, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    monkeypatch.setattr(log_files, "MAX_WAITING_BYTES", 1000)
    log = JsonlLog(path, 0)
    with monkeypatch.context() as context:
        context.setattr(log_files.os, "write", write_half_then_fail)
        for step in range(1, 101):
            log.add(row(step))
    log.close()
    kept = steps(path)
    assert kept == list(range(101 - len(kept), 101)) and sum(len(json.dumps(row(step))) for step in kept) <= 1000
    assert f"{100 - len(kept)} record(s) were not written" in capsys.readouterr().err


def test_rows_that_are_never_written_are_counted(tmp_path, capsys, monkeypatch):
    log = JsonlLog(tmp_path / "metrics.jsonl", 0)
    monkeypatch.setattr(log_files.os, "write", fail())
    log.add(row(1))
    log.close()
    assert "1 record(s) were not written" in capsys.readouterr().err


@pytest.mark.parametrize("number", (errno.EIO, errno.EMFILE, errno.EBUSY, errno.ESHUTDOWN))
def test_a_disk_that_fails_at_the_start(tmp_path, capsys, monkeypatch, number):
    """The rows of the earlier attempt are kept, and those after its checkpoint are dropped as soon as possible."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row(step)) + "\n" for step in (1, 2, 3)) + '{"step": 4, "te')
    before = path.read_bytes()
    with monkeypatch.context() as context:
        context.setattr(log_files.os, "fsync", fail(number))
        log = JsonlLog(path, 2)
        log.add(row(3))
        assert path.read_bytes() == before and os.strerror(number) in capsys.readouterr().err
    log.add(row(4))
    log.close()
    assert steps(path) == [1, 2, 3, 4] and os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize("kind", ("directory", "fifo", "link to a fifo", "no permission"))
def test_what_is_not_a_file_is_an_error(tmp_path, kind, monkeypatch):
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "link to a fifo":
        os.mkfifo(tmp_path / "fifo")
        path.symlink_to(tmp_path / "fifo")
    else:  # whatever the directory's mode is, root may write into it
        monkeypatch.setattr(log_files, "open", fail(errno.EACCES), raising=False)
    with pytest.raises(CheckpointError, match=r"^[^\n]*metrics.jsonl: cannot be written: [^\n]*\.$"):
        JsonlLog(path, 0)


def test_a_link_is_replaced_and_its_target_left_alone(tmp_path):
    target = tmp_path / "other.jsonl"
    target.write_text('{"step": 1}\n{"step": 2}\n')
    path = tmp_path / "metrics.jsonl"
    path.symlink_to(target)
    log = JsonlLog(path, 1)
    log.add(row(2))
    log.close()
    assert steps(path) == [1, 2] and not path.is_symlink() and target.read_text().count("\n") == 2


def test_a_removed_file_is_created_again_and_a_replaced_one_is_left_alone(tmp_path, capsys):
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    log = JsonlLog(path, 0)
    log.add(row(1))
    path.unlink()
    log.add(row(2))
    assert steps(path) == [2] and "was removed by another process" in capsys.readouterr().err

    path.rename(tmp_path / "mine")
    os.mkfifo(path)
    log.add(row(3))
    assert "another file was put in its place" in capsys.readouterr().err
    assert stat.S_ISFIFO(path.stat().st_mode)
    (tmp_path / "mine").rename(path)
    log.add(row(4))
    assert steps(path) == [2, 3, 4]

    later = JsonlLog(path, 3)  # another job's, while this one is suspended
    later.add(row(4))
    log.add(row(5))
    assert steps(path) == [2, 3, 4]
    later.close(), log.close()
    assert steps(path) == [2, 3, 4] and "1 record(s) were not written" in capsys.readouterr().err


def test_a_removed_directory_is_not_made_again(tmp_path, capsys):
    """A job that was suspended must not make the run directory again, nor may it be mistaken for another job."""
    run = tmp_path / "run"
    run.mkdir()
    log, board = JsonlLog(run / "metrics.jsonl", 0), TensorBoardLog(run / "tensorboard", 0)
    shutil.rmtree(run)
    log.add(row(1))
    board.add_scalar("loss/loss", 1.0, 16)
    board.flush()
    assert not run.exists() and "metrics.jsonl: was removed by another process" in capsys.readouterr().err
    run.mkdir()
    log.add(row(2))
    log.close(), board.close()
    assert steps(run / "metrics.jsonl") == [1, 2] and len(scalars(run / "tensorboard")) == 1


def test_a_file_that_was_cut_has_no_hole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = JsonlLog(path, 0)
    log.add(row(1))
    os.truncate(path, 0)
    log.add(row(2))
    log.close()
    assert steps(path) == [2]


def scalars(directory, tag: str = "loss/loss") -> list[tuple[int, float]]:
    """Return (images, wall time) of a scalar as TensorBoard shows it."""
    events = EventAccumulator(str(directory), {"scalars": 0})
    events.Reload()
    return [(event.step, event.wall_time) for event in events.Scalars(tag)]


@pytest.mark.parametrize("shift_s", (-86400, -3600, 0, 3600))
def test_tensorboard_shows_a_resumed_run_in_order_whatever_the_clock_says(tmp_path, monkeypatch, shift_s):
    """The first attempt logs 16 to 64 images, the second resumes after 32."""
    board = TensorBoardLog(tmp_path, 0)
    for images in (16, 32, 48, 64):
        board.add_scalar("loss/loss", images, images)
    board.close()
    now = time.time
    monkeypatch.setattr(log_files.time, "time", lambda: now() + shift_s)
    for images in (32, 48):  # another attempt within the same second
        board = TensorBoardLog(tmp_path, images)
        board.add_scalar("loss/loss", images + 16, images + 16)
        monkeypatch.setattr(log_files.time, "time", lambda: now() + shift_s - 10)
        board.add_scalar("loss/loss", images + 32, images + 32)
        board.close()
    found = scalars(tmp_path)
    assert [images for images, _ in found] == [16, 32, 48, 64, 80]
    times = [wall_time for _, wall_time in found]
    assert times == sorted(times)


def test_a_run_from_scratch_hides_what_an_attempt_before_its_first_checkpoint_logged(tmp_path):
    for _ in range(2):
        board = TensorBoardLog(tmp_path, 0)
        board.add_scalar("loss/loss", 1.0, 16)
        board.close()
    assert len(scalars(tmp_path)) == 1


def test_tensorboard_events_wait_until_the_disk_recovers(tmp_path, capsys, monkeypatch):
    """Also if it fails when the run starts."""
    with monkeypatch.context() as context:
        context.setattr(log_files.os, "open", fail())
        board = TensorBoardLog(tmp_path / "board", 0)
        board.add_scalar("loss/loss", 1.0, 16)
        board.flush()
    board.flush()
    with monkeypatch.context() as context:
        context.setattr(log_files.os, "write", write_half_then_fail)
        board.add_scalar("loss/loss", 1.0, 32)
        board.flush()
    board.add_scalar("loss/loss", 1.0, 48)
    board.close()
    assert [images for images, _ in scalars(tmp_path / "board")] == [16, 32, 48]
    assert capsys.readouterr().err.count("WARNING") == 2


def train(folder, *overrides: str, images: int = 80, **faults: object) -> tuple[int, str]:
    """Run ``diffmoe train`` with injected faults; return its exit code and output."""
    config = write_json(folder / "ds.json", ep=1, zero=0, tensorboard={"enabled": True})
    arguments = training_arguments(config, folder / "run", f"run.total_images={images}", *overrides)
    env = clean_environment(**fault_environment(*faults.pop("rules", ()), **faults))
    command = [sys.executable, "-m", "diffmoe_ds.cli", "train", *arguments]
    found = subprocess.run(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240, check=False
    )
    assert "Traceback" not in found.stdout and "Exception" not in found.stdout, found.stdout
    return found.returncode, found.stdout


@pytest.mark.slow
def test_a_run_with_failing_log_files_on_hosts_with_different_clocks(tmp_path):
    metrics, events = "*/metrics.jsonl", "*/events.out.tfevents*"
    rules = [
        Rule("write", metrics, "EIO", n=2),
        Rule("open", metrics, "ESTALE", n=3),
        Rule("truncate", metrics, "EIO"),
        Rule("write", metrics, "ENOSPC", n=4),
        Rule("write", events, "EDQUOT", n=2),
        Rule("open", events, "EIO"),
        Rule("write", "*.writing-images_*.png*", "EIO"),
    ]
    code, output = train(tmp_path, "run.sample_every_images=32", rules=rules, log=tmp_path / "faults")
    assert re.search(r"samples/images_\d+\.png: cannot be written: Input/output error \*", output), output
    assert code == 0 and "metrics.jsonl: cannot be written" in output, output
    assert "tfevents" in (tmp_path / "faults").read_text() and "metrics.jsonl" in (tmp_path / "faults").read_text()
    rules = [Rule("read", metrics, "EIO"), Rule("rename", metrics, "EIO")]
    code, output = train(tmp_path, images=160, rules=rules, clock_shift_s=-7200)
    assert code == 0, output
    assert [found["step"] for found in read_metrics(tmp_path / "run")] == list(range(1, 11))
    assert [images for images, _ in scalars(tmp_path / "run" / "tensorboard")] == list(range(16, 161, 16))


def test_other_monitors_never_end_a_run(tmp_path, capsys, monkeypatch):
    from deepspeed.monitor.csv_monitor import csvMonitor

    failures = itertools.cycle((RuntimeError("the service\ndied"), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))

    def lose(*arguments: object) -> None:
        raise next(failures)

    monkeypatch.setattr(csvMonitor, "write_events", lose)
    config = write_json(tmp_path / "ds.json", ep=1, zero=0, csv_monitor={"enabled": True})
    assert main(["train", *training_arguments(config, tmp_path / "run")]) == 0
    assert capsys.readouterr().err.count("WARNING: the service died; dropping values of other monitors") == 1


@pytest.mark.parametrize("when", ("while it trains", "after the last save"))
def test_a_removed_run_directory_is_noticed(tmp_path, capsys, monkeypatch, when):
    """At once by a warning, and by the exit code if nothing could be saved, or what was saved is gone."""
    owner, name = (hooks.LogStep, "__call__") if when == "while it trains" else (Session, "finish")
    method = getattr(owner, name)

    def remove_first(*arguments: object) -> object:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return method(*arguments)

    monkeypatch.setattr(owner, name, remove_first)
    config = write_json(tmp_path / "ds.json", ep=1, zero=0)
    assert main(["train", *training_arguments(config, tmp_path / "run")]) == 5
    error = capsys.readouterr().err
    if when == "while it trains":
        assert "metrics.jsonl: cannot be written: the run directory was removed" in error, error
        assert "was not saved" in error, error
    else:
        assert "was saved, but another process has removed it" in error, error


@pytest.mark.slow
@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
@pytest.mark.parametrize("name", ("resolved.yaml", "metrics.jsonl"))
def test_a_signal_while_a_file_is_written_at_the_start(tmp_path, name, number):
    """The file is complete, and the run stops at its first step."""
    config, log, run = write_json(tmp_path / "ds.json", ep=1, zero=0), tmp_path / "faults", tmp_path / "run"
    env = clean_environment(**fault_environment(Rule("rename", f"*/run/*{name}", "sleep:1"), log=log))
    command = [sys.executable, "-m", "diffmoe_ds.cli", "train", *training_arguments(config, run)]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 120
        while not log.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 85 and "Traceback" not in output, output
    assert load_config(str(run / "resolved.yaml"), []).run.total_images == 80
    assert not [path.name for path in run.iterdir() if path.name.startswith(".")]
