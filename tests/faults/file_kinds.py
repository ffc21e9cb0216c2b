"""Kinds of faults that hit files: failed, hung and full disks, damaged checkpoints, foreign and replaced files."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults.checks import Expected
from tests.faults.processes import BATCH, Failed, TooLate, mount_small_disk, unmount
from tests.faults.shim import Rule
from tests.faults.trial import NOT_RUN, SAVED_STEPS, Trial

ERRORS = ("EIO", "ENOSPC", "EDQUOT")
HUNG = "sleep:1000"
NEWEST = f"checkpoints/images_{SAVED_STEPS * BATCH:012d}"
"""The newest checkpoint of the saved run."""
SMALL_DISK_MB = 8
FILL_LIMIT_S = 30

Call = tuple[str, str, int]
"""An operation, a pattern below the run directory, and how often it occurs at least."""


def calls_of_a_save(rank: int) -> list[Call]:
    """Return the calls with which a rank writes checkpoints."""
    own = f"checkpoints/.writing-*/rank_{rank:05d}.safetensors"
    calls = [("open", own, 4), ("write", own, 500), ("fsync", own, 4)]
    for file in ("*meta.json*", "*manifest.json*", "latest") if rank == 0 else ():
        calls += [(operation, f"checkpoints/.writing-*/{file}", 4) for operation in ("open", "write", "fsync")]
    if rank == 0:
        calls += [("rename", "checkpoints/images_*", 4), ("rename", "checkpoints/latest", 4)]
        calls += [("fsync", "checkpoints", 4), ("unlink", "checkpoints/.writing-*", 4)]
    return calls


CALLS_OF_THE_START: list[Call] = [
    ("mkdir", ".writing-*", 2), ("open", "*lock.json", 1), ("write", "*lock.json", 1), ("fsync", "*lock.json", 1),
    ("link", "*lock.json", 1), ("open", "*resolved.yaml*", 1), ("write", "*resolved.yaml*", 1),
    ("fsync", "*resolved.yaml*", 1), ("rename", "*resolved.yaml", 1),
]  # fmt: skip
CALLS_OF_THE_LOG: list[Call] = [
    ("open", "*metrics.jsonl*", 2), ("rename", "metrics.jsonl", 1), ("write", "metrics.jsonl", 8),
    ("mkdir", "*/.writing-tensorboard-*", 1), ("open", "tensorboard/*", 300), ("write", "tensorboard/*", 300),
    ("mkdir", "*/.writing-samples-*", 1), ("open", "*.png*", 1), ("write", "*.png*", 2), ("rename", "samples/*", 1),
]  # fmt: skip


def draw_rule(trial: Trial, calls: list[Call], action: str, *, may_repeat: bool = False) -> Rule:
    """Draw one of several calls, and its number."""
    operation, pattern, count = trial.random.choice(calls)
    n, repeats = trial.random.randint(1, count), may_repeat and trial.random.random() < 0.4
    return Rule(operation, f"{trial.directory}/{pattern}", action, n=n, repeats=repeats)


def message_of(error: str) -> str:
    return os.strerror(getattr(errno, error))


def fail_a_save(trial: Trial) -> None:
    """Let a call of a save fail on a random rank: the run exits with 5, or warns and goes on."""
    trial.draw_start()
    victim, error = trial.draw_rank(), trial.random.choice(ERRORS)
    rule = draw_rule(trial, calls_of_a_save(victim), error, may_repeat=True)
    on_error = trial.random.choice(("stop", "continue"))
    trial.tell(f"rank {victim}: {rule.line()}, on_error={on_error}")
    ranks = trial.start(f"checkpoint.on_error={on_error}", rules={victim: [rule]})
    says = "" if rule.operation == "unlink" else message_of(error)
    trial.finish(ranks, Expected((5,), (victim,), path=f"{trial.directory}/checkpoints", says=says))
    trial.recover()


def fail_the_start(trial: Trial) -> None:
    """Let a call fail with which rank 0 locks the run directory or writes ``resolved.yaml``."""
    trial.draw_start()
    error = trial.random.choice(ERRORS)
    rule = draw_rule(trial, CALLS_OF_THE_START, error)
    trial.tell(f"rank 0: {rule.line()}")
    ranks = trial.start(rules={0: [rule]})
    trial.finish(ranks, Expected((5,), (0,), is_named=False, path=str(trial.directory), says=message_of(error)))
    trial.recover()


def fail_the_log(trial: Trial) -> None:
    """Let a call fail that writes metrics, TensorBoard events or samples: training goes on, with a warning."""
    trial.draw_start()
    error = trial.random.choice(ERRORS)
    rule = draw_rule(trial, CALLS_OF_THE_LOG, error)
    trial.tell(f"rank 0: {rule.line()}")
    samples = f"run.sample_every_images={4 * BATCH}"
    ranks = trial.start(samples, config="board", rules={0: [rule]})
    # an open or a rename may have been tried again at once
    says = "WARNING" if rule.operation in ("write", "mkdir") else ""
    trial.finish(ranks, Expected((), (0,), says=says))
    trial.recover(samples, config="board")


def fail_a_resume(trial: Trial) -> None:
    """Let a random rank fail to read a checkpoint: it is skipped with a warning, or the run exits with 5."""
    trial.continue_saved_run()
    victim, operation = trial.draw_rank(), trial.random.choice(("open", "read"))
    path = f"{trial.directory}/{NEWEST}"
    rule = Rule(operation, f"{path}/*", "EIO", n=trial.random.randint(1, 3), repeats=trial.random.random() < 0.5)
    trial.tell(f"rank {victim}: {rule.line()}")
    ranks = trial.start(rules={victim: [rule]})
    trial.lose_newest()
    trial.finish(ranks, Expected((5,), (victim,), is_named=False, path=path))
    trial.recover()


def hang(trial: Trial) -> None:
    """Let a call of a save, a resume or the metrics never return: all ranks exit and name the rank."""
    trial.draw_start()
    victim, where = trial.draw_rank(), trial.random.choice(("save", "resume", "metrics"))
    if where == "save":
        rule = draw_rule(trial, calls_of_a_save(victim), HUNG)
    elif where == "metrics":
        victim, rule = 0, draw_rule(trial, [("write", "metrics.jsonl", 8)], HUNG)
    else:
        if not trial.saved:
            trial.continue_saved_run()
        # the contents are read after the ranks have joined; before, only the launcher can end a rank that hangs
        rule = draw_rule(trial, [("read", "checkpoints/images_*/rank_*", 3)], HUNG)
    trial.tell(f"rank {victim}, {where}: {rule.line()}")
    ranks = trial.start(rules={victim: [rule]})
    trial.finish(ranks, Expected(victims=(victim,)))
    trial.recover()


def damage(trial: Trial, how: str) -> None:
    """Damage a file of the newest checkpoint: it is named, and the run continues from the checkpoint before."""
    trial.continue_saved_run()
    trial.lose_newest()
    file = trial.random.choice(sorted((trial.directory / NEWEST).iterdir()))
    if how == "flip":
        data = bytearray(file.read_bytes())
        position, bit = trial.random.randrange(len(data)), trial.random.randrange(8)
        data[position] ^= 1 << bit
        file.write_bytes(data)
        trial.tell(f"{file.name}: bit {bit} of byte {position}")
        # a bit of the manifest's own formatting may make no difference
        if file.name == "manifest.json":
            trial.recover()
            return
    elif how == "truncate":
        size = trial.random.randrange(file.stat().st_size)
        os.truncate(file, size)
        trial.tell(f"{file.name} to {size} bytes")
    else:
        file.unlink()
        trial.tell(file.name)
    trial.recover(at=trial.saved, says=("WARNING", str(file), "is skipped"))


def full_disk(trial: Trial) -> None:
    """Fill the disk at a random time: the run exits with 5, or continues until there is space again."""
    disk, on_error = trial.folder / "disk", trial.random.choice(("stop", "continue"))
    trial.tell(f"on_error={on_error}")
    trial.directory = disk / "run"
    if not mount_small_disk(disk, SMALL_DISK_MB):
        trial.tell("mounting a small disk is not permitted")
        trial.outcome.result = NOT_RUN
        return
    try:
        trial.continue_saved_run()
        settings = (f"checkpoint.on_error={on_error}", "checkpoint.keep_last=2")
        ranks = trial.start(*settings)
        trial.wait_for(ranks, lambda: "continues" in ranks.text())
        trial.pause(ranks, 0.35)
        began, filler = time.monotonic(), disk / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"\0" * 65536)
        if on_error == "continue":
            trial.wait_for(ranks, lambda: "was not saved" in ranks.text() or time.monotonic() > began + FILL_LIMIT_S)
            filler.unlink()
        trial.finish(ranks, Expected((5,), (0, 1), is_named=False, path=str(trial.directory)), began)
        if "No space left" not in ranks.text():
            raise TooLate
        filler.unlink(missing_ok=True)
        trial.recover("checkpoint.keep_last=2")
    finally:
        for ranks in trial.started:
            ranks.end()
        unmount(disk)


def leave_something(trial: Trial) -> None:
    """Plant links, pipes, foreign files and a file that cannot be removed: none of them does any harm."""
    trial.continue_saved_run()
    root, outside = trial.directory / "checkpoints", trial.folder / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    plants: dict[str, Callable[[Path], object]] = {
        "link": lambda path: path.symlink_to(outside),
        "pipe": os.mkfifo,
        "file": Path.touch,
        "busy": lambda path: (path.mkdir(), (path / ".nfs0001").touch()),
    }
    names = (".writing-0123456789abcdef", ".removing-x", ".writing-images_000000000016", "notes", "images_x")
    planted = {name: trial.random.choice(sorted(plants)) for name in trial.random.sample(names, 3)}
    for name, what in planted.items():
        plants[what](root / name)
    trial.tell(", ".join(f"{name}: {what}" for name, what in planted.items()))
    rules = {0: [Rule("unlink", "*.nfs*", "EBUSY", repeats=True)]}
    trial.recover(is_clean="busy" not in planted.values(), rules=rules)
    foreign = [name for name in planted if not name.startswith(".") and not os.path.lexists(root / name)]
    if foreign or not (outside / "kept").exists():
        raise Failed("other", f"removed: {foreign or outside}")


def replace_a_control_file(trial: Trial) -> None:
    """Put a pipe or a directory in the place of a control file: an error names it, or the run goes on without it."""
    trial.continue_saved_run()
    names = ("checkpoints/latest", f"{NEWEST}/meta.json", f"{NEWEST}/manifest.json", "lock.json", "resolved.yaml",
             "metrics.jsonl", "validation.jsonl")  # fmt: skip
    name, what = trial.random.choice(names), trial.random.choice(("pipe", "directory"))
    path = trial.directory / name
    trial.tell(f"{name}: {what}")
    path.unlink(missing_ok=True)
    if what == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    began = time.monotonic()
    ranks = trial.start()
    if name.startswith(NEWEST):
        trial.lose_newest()
    trial.finish(ranks, Expected((5,), (0, 1), is_named=False, path=str(path)), began)
    if what == "directory" and path.is_dir():
        path.rename(trial.folder / "replaced")
    elif any(ranks.codes()):
        path.unlink()
    if name != "metrics.jsonl":  # the rows before are gone with it
        trial.recover()
