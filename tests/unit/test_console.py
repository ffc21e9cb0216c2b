"""Output that nobody reads, full disks and odd names cost no command its result, and no user a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from diffmoe_ds.cli import main
from tests.helpers.data import image_file
from tests.helpers.processes import REPOSITORY, clean_environment
from tests.helpers.training import training_arguments, write_json

ODD = b"run \xff '\xc3\xa9\" $x"
"""A name with a space, quotes and a byte that is not UTF-8."""


def run(*command: str, stdout: int = subprocess.PIPE, **env: str) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        stdout=stdout, stderr=subprocess.PIPE, cwd=REPOSITORY, env=clean_environment(**env), timeout=240, check=False,
    )  # fmt: skip
    for text in (b"Traceback", b"Exception", b"UnicodeEncodeError"):
        assert text not in done.stderr, done.stderr
    return done


@pytest.fixture
def closed_pipe():
    """The end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


def slow(values):
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


SLOW = (
    ("diffmoe_ds", "train", "--help"),
    ("diffmoe_ds", "plan", "--model", "S-E16", "--world", "2", "--json"),
    ("diffmoe_ds", "train", "--dry-run"),
    ("benchmarks.strategies_report",),
)


@pytest.mark.parametrize("unbuffered", ("", "1"))
@pytest.mark.parametrize(
    "command", (("diffmoe_ds", "config"), *(pytest.param(c, marks=pytest.mark.slow) for c in SLOW))
)
def test_nobody_reads_the_output(closed_pipe, command, unbuffered):
    assert run(*command, stdout=closed_pipe, PYTHONUNBUFFERED=unbuffered).returncode == 0


def test_a_full_disk_behind_the_output():
    with open("/dev/full", "wb") as full:
        done = run("diffmoe_ds", "config", stdout=full.fileno())
    assert done.returncode == 5
    assert done.stderr == b"diffmoe: error: standard output: cannot be written: No space left on device.\n"


@pytest.mark.slow
def test_a_run_goes_on_without_its_console(tmp_path, closed_pipe):
    config = write_json(tmp_path / "ds.json", ep=1, zero=0)
    with open("/dev/full", "wb") as full:
        for number, stdout in enumerate((closed_pipe, full.fileno())):
            directory = tmp_path / str(number)
            assert run("diffmoe_ds", "train", *training_arguments(config, directory), stdout=stdout).returncode == 0
            assert len((directory / "metrics.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize(
    "encoding", [pytest.param(encoding, marks=pytest.mark.slow) for encoding in ("ascii", "utf-8", "latin-1")]
)
def test_a_run_directory_that_is_not_utf8(tmp_path, encoding):
    """The banner has the bytes of its name if the encoding allows, because scripts read that line."""
    directory = os.fsencode(tmp_path) + b"/" + ODD
    done = run(
        "diffmoe_ds", "train", "--dry-run", "--run-dir", os.fsdecode(directory), PYTHONIOENCODING=encoding
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(b"        run  ")]
    expected = {"utf-8": directory, "latin-1": directory.replace(b"\xc3\xa9", b"\xe9")}
    if encoding in expected:
        assert line == b"        run  " + expected[encoding]
    else:
        assert b"\\xe9" in line


def test_json_with_a_name_that_is_not_utf8(tmp_path, capsys):
    directory = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + ODD))
    assert main(["train", "--dry-run", "--json", "--run-dir", str(directory)]) == 0
    assert json.loads(capsys.readouterr().out)["run_dir"] == str(directory)


@pytest.mark.slow
def test_files_with_names_that_are_not_utf8(tmp_path, capsys):
    """Recipes, checkpoints and pages in such a directory, or that mention it, are written and read back."""
    sys.stdout.reconfigure(errors="backslashreplace")  # pytest's, which `protect` leaves alone
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + ODD))
    run = odd / "run"
    for number in range(20):
        path = odd / "images" / str(number % 2) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_file(np.full((28, 28), number, np.uint8)))
    config = write_json(tmp_path / "ds.json", ep=1, zero=0)
    commands = (
        ["init", str(odd / "images"), "--out", str(odd / "recipe.yaml")],
        ["train", "--config", str(odd / "recipe.yaml"), "--dry-run"],
        ["train", *training_arguments(config, run, f"data.path={odd / 'images'}", "model.num_classes=2")],
        ["train", "--config", str(run / "resolved.yaml"), "--set", "run.total_images=96"],
        ["report", str(run), "--out", str(odd / "report")],
        ["checkpoint", "export", str(run), "--out", str(odd / "exported")],
        [
            "sample",
            "--checkpoint",
            str(odd / "exported"),
            "--num-images",
            "2",
            "--steps",
            "2",
            "--out",
            str(odd / "out"),
        ],
        ["prepare", "images", "--images", str(odd / "images"), "--size", "28", "--out", str(odd / "shards")],
        ["scripts", "--out", str(odd / "scripts")],
    )
    for command in commands:
        assert main(command) == 0, (command, capsys.readouterr())
    assert "\\udcff" in (odd / "report" / "report.html").read_text()


def test_a_recipe_is_not_written_in_part(tmp_path, capsys, monkeypatch):
    def fail(file: int) -> None:
        raise OSError(28, "No space left on device")

    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.png").write_bytes(image_file(np.full((28, 28), number, np.uint8)))
    monkeypatch.setattr(os, "fsync", fail)
    out = tmp_path / "out" / "recipe.yaml"
    out.parent.mkdir()
    assert main(["init", str(folder), "--out", str(out)]) == 5
    assert f"{out}: cannot be written: No space left on device." in capsys.readouterr().err
    assert not os.listdir(out.parent)


CLOSED = """
import os, sys
from diffmoe_ds.cli import console
console.protect()
with open(sys.argv[1], "w") as file:
    os.write(2, b"printed by a C library")
    print("a line")
    print("a line", file=sys.stderr)
    assert sys.stdin.read() == "" and not sys.stderr.isatty()
    file.write(f"descriptor {file.fileno()}")
"""


def test_closed_streams_are_not_replaced_by_the_next_files(tmp_path):
    """What a C library prints to a closed stream must not end up in a checkpoint."""
    path = tmp_path / "file"
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", CLOSED, str(path)]
    done = subprocess.run(command, cwd=REPOSITORY, env=clean_environment(), timeout=240, check=False)
    assert done.returncode == 0 and path.read_text().startswith("descriptor ")
    assert int(path.read_text().split()[1]) > 2


@pytest.mark.slow
def test_the_images_are_read_without_a_standard_error():
    command = [sys.executable, "-m", "diffmoe_ds", "train", "--dry-run", "--thorough"]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", *command],
        stdout=subprocess.PIPE, cwd=REPOSITORY, env=clean_environment(), timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and b"read" in done.stdout, done.stdout
