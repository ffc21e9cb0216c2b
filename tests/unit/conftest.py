"""Fixtures that several unit tests share."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.helpers.fuzz import EXAMPLES
from tests.helpers.processes import run_ranks
from tests.helpers.training import SMALLEST_MODEL, training_arguments

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


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


@pytest.fixture
def hang_limit() -> Iterator[None]:
    """Fail a test that hangs; far above what a slow machine needs."""

    def give_up(*_: object) -> None:
        raise TimeoutError("the test hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(3600 if EXAMPLES else 300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
