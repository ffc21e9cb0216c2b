"""A rank that is killed or frozen, from the moment the ranks have joined to the end: the others exit and name it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest

from tests.helpers.processes import LAUNCH_TIMEOUT, REPOSITORY, WORKERS, fork_server, free_port, rank_environment
from tests.helpers.training import training_arguments, write_json

TIMEOUT_S = 3
NAME = "rank {} on " + socket.gethostname()


@dataclass(frozen=True)
class Ranks:
    """Training ranks, of which one strikes itself."""

    processes: list
    file: IO[str]

    def text(self) -> str:
        with open(f"/proc/self/fd/{self.file.fileno()}") as copy:  # a position of its own: the ranks share the file's
            return copy.read()

    def wait(self, *ranks: int) -> list[int]:
        """Return the exit codes of some ranks."""
        self.wait_for(lambda: all(self.processes[rank].poll() is not None for rank in ranks))
        return [self.processes[rank].poll() for rank in ranks]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LAUNCH_TIMEOUT
        while not condition():
            assert time.monotonic() < deadline, f"hung:\n{self.text()}"
            time.sleep(0.05)


@contextlib.contextmanager
def training(tmp_path: Path, world: int, struck: int, action: str, point: str, *overrides: str) -> Iterator[Ranks]:
    """Start a run; see `workers/lost_rank.py`."""
    config = write_json(tmp_path / "ds.json", ep=1, zero=1, train_batch_size=12)
    length = ("run.total_images=60", "data.num_workers=0", f"run.rank_timeout_s={TIMEOUT_S}", *overrides)
    arguments = ["train", *training_arguments(config, tmp_path / "run", *length)]
    command, port = [str(WORKERS / "lost_rank.py"), str(struck), action, point, *arguments], free_port()
    with tempfile.TemporaryFile("w+") as file:
        environments = [rank_environment(rank, world, port) for rank in range(world)]
        ranks = Ranks([fork_server().start(command, each, REPOSITORY, file) for each in environments], file)
        try:
            ranks.wait_for(lambda: f"rank {struck}: {action}" in ranks.text())
            yield ranks
            assert "Traceback" not in ranks.text(), ranks.text()
        finally:
            for process in ranks.processes:
                process.kill()


FAST = [("kill", 0, "start")]
SLOW = [
    ("stop", 1, "group"), ("kill", 0, "joined"), ("kill", 2, "setup"), ("kill", 0, "save"), ("stop", 0, "lock"),
    ("stop", 2, "step"),
]  # fmt: skip
POINTS = [(rank, point) for point in ("joined", "start", "group", "setup", "step", "save") for rank in (0, 2)]
EVERY = [(action, rank, point) for action in ("kill", "stop") for rank, point in [*POINTS, (0, "lock")]]
LONG = [case for case in EVERY if case not in FAST + SLOW]


@pytest.mark.parametrize(
    ("action", "rank", "point"),
    (
        *FAST,
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW),
        *(pytest.param(*case, marks=pytest.mark.long) for case in LONG),
    ),
)
def test_a_lost_rank_is_named_by_the_others(tmp_path, action, rank, point):
    """From joining to the last save, also while they wait for the process group or for rank 0."""
    world = 2 if rank == 1 else 3
    others = [other for other in range(world) if other != rank]
    with training(tmp_path, world, rank, action, point) as ranks:
        assert set(ranks.wait(*others)) == {85}, ranks.text()
        text = ranks.text()
    blamed = set(re.findall(r"error: (rank \d+ \w+ [\w.-]+)[\w:.-]* (?:died|has not answered)", text))
    # until rank 0 has sent the hosts, the others know only its address
    assert blamed and blamed <= {NAME.format(rank), *(["rank 0 at 127.0.0.1"] if rank == 0 else [])}, text


@pytest.mark.slow
def test_a_slow_start_is_no_hang(tmp_path):
    """The other ranks wait for rank 0, longer than they would wait for ranks to join or for one that is lost."""
    with training(tmp_path, 2, 0, str(TIMEOUT_S + 3), "start", "run.start_timeout_s=2") as ranks:
        assert ranks.wait(0, 1) == [0, 0], ranks.text()


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "point"), ((0, "lock"), (2, "setup"), (0, "log"), (1, "step")))
def test_a_rank_that_hangs_alone_is_named(tmp_path, rank, point):
    """The others wait for it, during startup or inside a step that all have begun."""
    with training(tmp_path, 3, rank, "hang", point, "run.start_timeout_s=20") as ranks:
        assert ranks.wait(0, 1, 2) == [85, 85, 85], ranks.text()
        text = ranks.text()
    assert set(re.findall(r"error: (.*?) has been stuck for", text)) == {NAME.format(rank)}, text


@pytest.mark.slow
@pytest.mark.parametrize("rank", (0, 1))
def test_a_rank_that_wakes_up_blames_itself(tmp_path, rank):
    with training(tmp_path, 2, rank, "stop", "step") as ranks:
        assert ranks.wait(1 - rank) == [85], ranks.text()
        os.kill(int(re.search(r"in process (\d+)", ranks.text())[1]), signal.SIGCONT)
        assert ranks.wait(rank) == [85], ranks.text()
        assert re.search(f"{NAME.format(rank)} was suspended for .* and the other ranks have left", ranks.text())


@pytest.mark.slow
@pytest.mark.parametrize("rank", (0, 1))
def test_a_rank_that_hangs_while_it_closes_exits(tmp_path, rank):
    """The run is complete and the other rank has left."""
    with training(tmp_path, 2, rank, "600", "close") as ranks:
        assert ranks.wait(1 - rank, rank) == [0, 85], ranks.text()
        assert f"{NAME.format(rank)} has been stuck for {TIMEOUT_S} s while the run ended" in ranks.text()
