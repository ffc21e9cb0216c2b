"""Fixtures that many tests share."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch

from tests.helpers.processes import run_ranks
from tests.helpers.training import Trained, read_metrics, training_arguments, write_json

torch.set_num_threads(1)


@pytest.hookimpl(hookwrapper=True)
def pytest_collection() -> Iterator[None]:
    """Import the tests without garbage collections, which would free nothing."""
    gc.disable()
    yield
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the longest tests, so that processes that share the tests finish at about the same time."""
    items.sort(key=lambda item: not item.nodeid.startswith("tests/faults/"))


_frozen_modules = 0


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Exclude from garbage collection what imports have created; else every run would spend 0.2 s on visiting it."""
    global _frozen_modules
    if len(sys.modules) > _frozen_modules + 50:
        gc.collect()
        gc.freeze()
        _frozen_modules = len(sys.modules)


@pytest.fixture(autouse=True, scope="session")
def embedded_dataset_is_read_once() -> None:
    import_module("tests.helpers.embedded")


@pytest.fixture(autouse=True)
def diffusers_log_to_an_open_stream() -> None:
    """Its handler keeps the `sys.stderr` of its first import, which may be that of a test and closed."""
    for handler in logging.getLogger("diffusers").handlers:
        if type(handler) is logging.StreamHandler:
            handler.stream = sys.stderr  # `setStream` would flush the closed one
            handler.flush = sys.stderr.flush  # which diffusers sets, too


@pytest.fixture
def train_tiny(tmp_path: Path) -> Callable[..., Trained]:
    """Train the tiny model on (world, ep, zero) through the command line."""
    count = 0

    def run(
        world: int, ep: int | str, zero: int, *overrides: str, directory: Path | None = None, code: int = 0,
        options: tuple[str, ...] = (), **changes: object,
    ) -> Trained:  # fmt: skip
        nonlocal count
        count += 1
        directory = directory or tmp_path / f"run_{count}"
        config = write_json(tmp_path / f"ds_{count}.json", ep, zero, **changes)
        arguments = training_arguments(config, directory, *overrides, options=options)
        finished = run_ranks(world, ["diffmoe_ds/train.py", *arguments])
        assert finished.code == code, finished.output
        return Trained(directory, read_metrics(directory) if code == 0 else [], finished.output)

    return run
