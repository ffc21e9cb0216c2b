"""A trial: a copy of a run directory, one fault, the end of the ranks, and the start that recovers from it."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.checks import TAIL, Expected, announced, blamed, check_complete, check_end, check_rows, resumed
from tests.faults.processes import (
    BATCH,
    RANK_TIMEOUT_S,
    SAVE_STEPS,
    START_TIMEOUT_S,
    STEPS,
    WORLD,
    Failed,
    Ranks,
    TooLate,
    metrics,
)
from tests.faults.shim import Rule, fault_environment
from tests.helpers.processes import MODULES, REPOSITORY, ForkServer, free_port, rank_environment
from tests.helpers.training import training_arguments, write_json

PASSED, NOT_RUN = "passed", "not run"
SAVED_STEPS = 4
"""Steps of the run that a trial continues."""
SAVED_BEFORE_STEPS = SAVED_STEPS - SAVE_STEPS
"""Steps of the checkpoint before its newest one."""


@dataclass
class Outcome:
    """What a trial has shown; a line of ``trials.jsonl``."""

    number: int
    seed: int
    kind: str
    detail: str = ""
    """What was drawn."""
    result: str = PASSED
    """`PASSED`, `NOT_RUN` if the fault never came in time, or that of the `Failed` check."""
    seconds: float = 0.0
    """From the fault until every rank had exited."""
    codes: list[int] = field(default_factory=list)
    """Exit codes of the ranks that the fault did not kill."""
    repeated: int = 0
    """Steps that the next start had to repeat."""
    named: list[int] = field(default_factory=list)
    """Ranks that messages name as the culprit."""
    attempts: int = 1
    """More than 1 if the fault came too late at first."""
    message: str = ""
    """Why a check failed."""


class Ground:
    """What all trials share: warm processes, the rows of an undisturbed run, and a run to continue."""

    def __init__(self, folder: Path) -> None:
        """Train the undisturbed run and the one that trials continue."""
        self.folder = folder
        self.server = ForkServer(MODULES, PYTHONFAULTHANDLER="1", **fault_environment())
        for name, board in (("plain", False), ("board", True)):
            write_json(folder / f"{name}.json", ep=2, zero=2, train_batch_size=BATCH, tensorboard={"enabled": board})
        self.saved = folder / "saved"
        try:
            self._train(self.saved, SAVED_STEPS)  # first: the first start is slower
            began = time.monotonic()
            self._train(folder / "undisturbed", STEPS)
            self.duration_s = time.monotonic() - began
        except BaseException:
            self.close()
            raise
        self.expected = {row["step"]: row for row in metrics(folder / "undisturbed")}
        assert len(self.expected) == STEPS

    def close(self) -> None:
        self.server.close()

    def start(
        self, directory: Path, log: Path, *overrides: str, config: str = "plain", steps: int = STEPS,
        rules: Mapping[int, Sequence[Rule]] | None = None, clock_shifts_s: Sequence[int] = (0,) * WORLD,
    ) -> Ranks:  # fmt: skip
        """Start the ranks of a run.

        Args:
            directory: the run directory.
            log: file for their output.
            overrides: settings.
            config: name of a DeepSpeed JSON.
            steps: length of the run.
            rules: the faults that the shim injects into each rank.
            clock_shifts_s: by how much each rank's clock is ahead.
        """
        settings = (
            f"run.total_images={steps * BATCH}", f"run.save_every_images={SAVE_STEPS * BATCH}",
            f"run.log_every_images={BATCH}", f"run.rank_timeout_s={RANK_TIMEOUT_S}",
            f"run.start_timeout_s={START_TIMEOUT_S}", *overrides,
        )  # fmt: skip
        arguments = ["tests/faults/rank.py"]
        arguments += training_arguments(self.folder / f"{config}.json", directory, *settings)
        port, fired = free_port(), log.with_suffix(".fired")
        fired.unlink(missing_ok=True)
        processes = []
        with log.open("w") as output:
            for rank in range(WORLD):
                faults = fault_environment(
                    *(rules or {}).get(rank, ()), log=fired, clock_shift_s=clock_shifts_s[rank]
                )  # fmt: skip
                environment = rank_environment(rank, WORLD, port, PYTHONUNBUFFERED="1", **faults)
                processes.append(self.server.start(arguments, environment, REPOSITORY, output))
        return Ranks(processes, log, fired)

    def _train(self, directory: Path, steps: int) -> None:
        ranks = self.start(directory, self.folder / "log", "run.rank_timeout_s=300", steps=steps)
        try:
            ranks.wait()
        finally:
            ranks.end()
        if ranks.codes() != [0, 0]:
            raise Failed("other", f"without a fault:\n{ranks.text()}")


class Trial:
    """One attempt at one fault."""

    def __init__(self, ground: Ground, outcome: Outcome, attempt: int) -> None:
        """Prepare the run directory: a new one, or a copy of the saved run.

        Args:
            ground: what all trials share.
            outcome: filled in.
            attempt: number of the attempt, from 1.
        """
        self.ground = ground
        self.outcome = outcome
        self.random = random.Random(f"{outcome.seed} {outcome.number} {attempt}")
        self.folder = ground.folder / f"trial-{outcome.number}"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.directory = self.folder / "run"
        self.saved = 0
        """Images of the newest checkpoint that is known to be saved and undamaged."""
        self.may_skip = False
        self.started: list[Ranks] = []

    def close(self) -> None:
        for ranks in self.started:
            ranks.end()
        shutil.rmtree(self.folder, ignore_errors=True)

    def tell(self, detail: str) -> None:
        """Note what was drawn, with paths below the run directory."""
        self.outcome.detail = detail.replace(f"{self.directory}/", "")

    def draw_rank(self) -> int:
        return self.random.randrange(WORLD)

    def continue_saved_run(self) -> None:
        """Begin with a copy of the saved run."""
        shutil.copytree(self.ground.saved, self.directory)
        self.saved = SAVED_STEPS * BATCH

    def lose_newest(self) -> None:
        """Note that the newest checkpoint of the saved run may be unreadable."""
        self.saved, self.may_skip = SAVED_BEFORE_STEPS * BATCH, True

    def draw_start(self) -> None:
        """Begin with nothing or with a copy of the saved run."""
        if self.random.random() < 0.6:
            self.continue_saved_run()

    def start(self, *overrides: str, name: str = "log", **options: object) -> Ranks:
        """Start the ranks; see `Ground.start`."""
        ranks = self.ground.start(self.directory, self.folder / name, *overrides, **options)  # type: ignore[arg-type]
        self.started.append(ranks)
        return ranks

    def pause(self, ranks: Ranks, share: float) -> None:
        """Wait for a random time, at most a share of the time of a whole run, or until a rank has exited."""
        deadline = time.monotonic() + self.random.uniform(0, share * self.ground.duration_s)
        self.wait_for(ranks, lambda: time.monotonic() > deadline)

    def wait_for(self, ranks: Ranks, happened: Callable[[], bool]) -> None:
        """Wait until something has happened or a rank has exited."""
        while not happened() and all(ranks.is_running(rank) for rank in range(WORLD)):
            time.sleep(0.005)

    def finish(self, ranks: Ranks, expected: Expected, began: float | None = None, without: int | None = None) -> None:
        """Wait until the ranks have exited after a fault, and check how.

        Args:
            ranks: the ranks.
            expected: what may follow.
            began: time of the fault; None for one of the shim, which kills the victim if its action is to kill.
            without: a frozen rank, which is not awaited.

        Raises:
            TooLate: the fault did not occur.
            Failed: something is not as expected.
        """
        seconds = ranks.wait(began, () if without is None else (without,))
        ranks.killed |= set(expected.victims) & ranks.killed_by_the_shim()
        text, codes, outcome = ranks.text(), ranks.codes(), self.outcome
        outcome.seconds, outcome.codes, outcome.named = round(seconds, 2), codes, sorted(blamed(text))
        if seconds < 0:
            check_end(text, codes, Expected(()))
            raise TooLate
        check_end(text, codes, expected)
        self.saved = STEPS * BATCH if 0 in codes else max(self.saved, announced(text))

    def recover(
        self, *overrides: str, at: int | None = None, is_clean: bool = True, says: Sequence[str] = (), **options: object
    ) -> None:  # fmt: skip
        """Start the run again without a fault; it must complete, from the last save on, and equal the undisturbed run.

        Args:
            overrides: settings.
            at: images at which it must continue; at least `saved` if None.
            is_clean: whether nothing temporary may stay.
            says: texts that must be in its output.
            options: see `Ground.start`.

        Raises:
            Failed: it does not.
        """
        seen = max((row["step"] for row in metrics(self.directory)), default=0)
        began = time.monotonic()
        ranks = self.start("run.rank_timeout_s=300", *overrides, name="recovery", **options)
        seconds, text = ranks.wait(began), ranks.text()
        if ranks.codes() != [0, 0] or "Traceback" in text:
            raise Failed("other", f"the next start exits with {ranks.codes()}:\n{text[-TAIL:]}")
        found = resumed(text)
        if found < self.saved or found != (found if at is None else at):
            raise Failed("lost", f"continues at {found} images, not at {at or self.saved}:\n{text[:TAIL]}")
        if "is skipped" in text and not self.may_skip:
            raise Failed("other", f"the fault has damaged a checkpoint:\n{text[:TAIL]}")
        missing = [part for part in says if part not in text]
        if missing:
            raise Failed("other", f"nothing says {missing}:\n{text[:TAIL]}")
        check_rows(metrics(self.directory), self.ground.expected, complete=True)
        check_complete(self.directory, is_clean=is_clean)
        self.outcome.repeated = max(seen - found // BATCH, 0)
        if not self.outcome.codes:  # the fault was there before the start
            self.outcome.codes, self.outcome.seconds = ranks.codes(), round(seconds, 2)
