"""Fixtures that several unit tests share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers.processes import run_ranks
from tests.helpers.training import SMALLEST_MODEL, training_arguments


@pytest.fixture(scope="session")
def run_directory(tmp_path_factory) -> Path:
    """A run of one process with three checkpoints."""
    directory = tmp_path_factory.mktemp("run") / "r"
    overrides = ("run.total_images=96", "run.save_every_images=32")
    arguments = training_arguments(None, directory, *overrides, base=SMALLEST_MODEL)
    finished = run_ranks(1, ["-m", "diffmoe_ds.cli", "train", *arguments])
    assert finished.code == 0, finished.output
    return directory


@pytest.fixture
def run_copy(run_directory, tmp_path) -> Path:
    return Path(shutil.copytree(run_directory, tmp_path / "copy"))
