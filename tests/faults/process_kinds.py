"""Kinds of faults that hit processes: killed, frozen, asked to stop, replaced by another job, with another clock."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence

from tests.faults.checks import TAIL, Expected, announced, check_end
from tests.faults.processes import BATCH, STEPS, WORLD, Failed, TooLate, catches, loader_workers, snapshot
from tests.faults.shim import Rule
from tests.faults.trial import Trial

DAY_S = 86400


def kill(trial: Trial) -> None:
    """Kill a random rank at a random time from the start of its process on."""
    trial.draw_start()
    victim = trial.draw_rank()
    trial.tell(f"rank {victim}")
    ranks = trial.start()
    trial.pause(ranks, 0.85)
    began = time.monotonic()
    ranks.kill(victim)
    if victim not in ranks.killed:
        raise TooLate
    trial.finish(ranks, Expected(victims=(victim,)), began)
    trial.recover()


def kill_in_save(trial: Trial) -> None:
    """Kill a random rank while it writes its part of a checkpoint, or rank 0 while it completes one."""
    trial.draw_start()
    victim = trial.draw_rank()
    files = [f"rank_{victim:05d}.safetensors"] + (["*meta.json*", "*manifest.json*", "latest"] if victim == 0 else [])
    file = trial.random.choice(files)
    n = trial.random.randint(1, 500 if "rank" in file else 4)
    die_at(trial, victim, Rule("write", f"{trial.directory}/checkpoints/.writing-*/{file}", "kill", n=n))


def kill_around_a_call(trial: Trial) -> None:
    """Kill a random rank before or after one of its renames, links and flushes, from the run lock to the last save."""
    trial.draw_start()
    victim, action = trial.draw_rank(), trial.random.choice(("kill", "after-kill"))
    operation = trial.random.choice(("rename", "link", "fsync") if victim == 0 else ("fsync",))
    n = trial.random.randint(1, {"rename": 20, "link": 1, "fsync": 30 if victim == 0 else 4}[operation])
    die_at(trial, victim, Rule(operation, f"{trial.directory}/*", action, n=n))


def die_at(trial: Trial, victim: int, rule: Rule) -> None:
    """Start a run in which a rank is killed at a call, and recover."""
    trial.tell(f"rank {victim}: {rule.line()}")
    ranks = trial.start(rules={victim: [rule]})
    trial.finish(ranks, Expected(victims=(victim,)))
    trial.recover()


def freeze(trial: Trial) -> None:
    """Freeze a random rank at a random time; the other one exits. Half of the frozen ones wake up afterwards."""
    trial.draw_start()
    victim, wakes = trial.draw_rank(), trial.random.random() < 0.5
    trial.tell(f"rank {victim}{', wakes up' if wakes else ''}")
    ranks = trial.start()
    trial.pause(ranks, 0.85)
    began = time.monotonic()
    ranks.send(victim, signal.SIGSTOP)
    trial.finish(ranks, Expected(victims=(victim,)), began, without=victim)
    if wakes:
        ranks.send(victim, signal.SIGCONT)
        ranks.wait(time.monotonic())
        check_end("", ranks.codes(), Expected((85, 1)))  # it may take those for lost that have left because of it
    ranks.kill(victim)
    trial.recover()


def ask_to_stop(trial: Trial) -> None:
    """Send SIGUSR1 or SIGTERM to a random rank; the run saves, exits with 85 and loses no step."""
    trial.draw_start()
    victim, number = trial.draw_rank(), trial.random.choice((signal.SIGUSR1, signal.SIGTERM))
    trial.tell(f"{number.name} to rank {victim}")
    stop_and_go_on(trial, victim, number)


def shift_the_clock(trial: Trial) -> None:
    """Shift the clock of every rank by up to two days, stop the run, and continue it with other clocks."""
    trial.draw_start()
    shifts = [[trial.random.randint(-2 * DAY_S, 2 * DAY_S) for _ in range(WORLD)] for _ in range(2)]
    trial.tell(f"by {shifts[0]}, then by {shifts[1]} s")
    stop_and_go_on(trial, 0, signal.SIGUSR1, shifts, config="board")


def stop_and_go_on(
    trial: Trial, victim: int, number: signal.Signals, shifts_s: Sequence[Sequence[int]] = ((0,) * WORLD,) * 2,
    config: str = "plain",
) -> None:  # fmt: skip
    """Send a signal to a rank at a random time, and start the run again; no step may be repeated."""
    ranks = trial.start(clock_shifts_s=shifts_s[0], config=config)
    trial.wait_for(ranks, lambda: catches(ranks.processes[victim].pid, number))
    trial.pause(ranks, 0.8)
    began = time.monotonic()
    ranks.send(victim, number)
    trial.finish(ranks, Expected(), began)
    trial.recover(clock_shifts_s=shifts_s[1], config=config)
    if trial.outcome.repeated:
        raise Failed("lost", f"{trial.outcome.repeated} step(s) repeated after {number.name}")


def lose_a_worker(trial: Trial) -> None:
    """Kill or freeze a loader worker of a random rank; the run can be requeued, and the rank is named."""
    trial.draw_start()
    victim, number = trial.draw_rank(), trial.random.choice((signal.SIGKILL, signal.SIGSTOP))
    trial.tell(f"{number.name} to a worker of rank {victim}")
    ranks = trial.start("data.num_workers=2")
    pid = ranks.processes[victim].pid
    trial.wait_for(ranks, lambda: len(loader_workers(pid)) == 2)
    trial.pause(ranks, 0.2)
    workers = loader_workers(pid)
    if not workers:
        raise TooLate
    began = time.monotonic()
    os.kill(trial.random.choice(workers), number)
    trial.finish(ranks, Expected(victims=(victim,)), began)
    trial.recover("data.num_workers=2")


def wake_a_replaced_job(trial: Trial) -> None:
    """Freeze a job, let another one take over its run directory, and wake the first one: it must change nothing."""
    trial.draw_start()
    trial.tell("both ranks")
    old = trial.start()
    trial.wait_for(old, lambda: (trial.directory / "lock.json").exists())
    trial.pause(old, 0.4)
    for rank in range(WORLD):
        old.send(rank, signal.SIGSTOP)
    told = old.text()
    trial.saved = max(trial.saved, announced(told))
    trial.recover()  # the other job
    before, saved, repeated = snapshot(trial.directory), trial.saved, trial.outcome.repeated
    began = time.monotonic()
    for rank in range(WORLD):
        old.send(rank, signal.SIGCONT)
    everybody = Expected(codes=(85, 2, 5), victims=range(WORLD), is_named=False)
    trial.finish(old, everybody, began)
    changed = {path for path, state in snapshot(trial.directory).items() if before.get(path) != state}
    changed |= before.keys() - snapshot(trial.directory).keys()
    if changed:
        raise Failed("lost", f"the replaced job has changed {sorted(changed)}:\n{old.text()[-TAIL:]}")
    if announced(old.text()[len(told) :]) or (0 in old.codes() and saved < STEPS * BATCH):
        raise Failed("other", f"the replaced job claims to have saved its progress:\n{old.text()[-TAIL:]}")
    trial.outcome.repeated = repeated
