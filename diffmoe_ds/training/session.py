"""A training session: the resources of a run, from the rendezvous to its end."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from diffmoe_ds.checkpoint.layout import MANIFEST, RESOLVED_RECIPE, checkpoint_root
from diffmoe_ds.config.load import dump_config
from diffmoe_ds.distributed import deepspeed_seam as seam
from diffmoe_ds.distributed.collectives import broadcast
from diffmoe_ds.distributed.consensus import raise_on_all_ranks
from diffmoe_ds.distributed.launch import local_device
from diffmoe_ds.distributed.ownership import Owner
from diffmoe_ds.distributed.quiet import quiet_deepspeed
from diffmoe_ds.distributed.rendezvous import join_ranks
from diffmoe_ds.distributed.run_lock import RunLock
from diffmoe_ds.distributed.surplus import release_surplus
from diffmoe_ds.distributed.watchdog import Watchdog
from diffmoe_ds.errors import AlreadyReportedError, CheckpointError
from diffmoe_ds.files import write_text
from diffmoe_ds.training.banner import banner, describe_start
from diffmoe_ds.training.batches import BatchSource
from diffmoe_ds.training.device_settings import apply_device_settings
from diffmoe_ds.training.plan import TrainPlan
from diffmoe_ds.training.prompts import grid_prompts
from diffmoe_ds.training.resume import agree_on_checkpoint
from diffmoe_ds.training.run_log import RunLog, open_log, peak_images_per_s
from diffmoe_ds.training.setup import Run, setup_run
from diffmoe_ds.training.weights_and_biases import finish_wandb


@dataclass
class Session:
    """A run whose ranks have joined, and its resources."""

    plan: TrainPlan
    """The plan, with the starting point that all ranks agreed on."""
    hosts: tuple[str, ...]
    """The host of every rank."""
    watchdog: Watchdog
    """Detects ranks that die or stop responding."""
    lock: RunLock | None
    """The run directory's lock; rank 0 only."""
    owner: Owner
    """Owner of the run directory."""
    resources: ExitStack
    """Closes what the session opened."""

    def prepare(self) -> Run:
        """Agree on the checkpoint, set the run up and write ``resolved.yaml``. Every rank must call this.

        Raises:
            CheckpointError: on all ranks, if no checkpoint can be read or the run directory cannot be written.
            RunDirectoryBusyError: on all ranks, if another job has taken the run directory over meanwhile.
        """
        with self._as_owner():
            return self._prepare()

    def _prepare(self) -> Run:
        plan, device = self.plan, local_device(self.plan.launch)
        path = agree_on_checkpoint(plan.choices, plan.directory, device, self.watchdog.reading)
        self.plan = raise_on_all_ranks(device, lambda: plan.with_checkpoint(path))
        if self.plan is not plan and plan.is_main:
            print(f"{'instead':>11}  {describe_start(self.plan)}", flush=True)
        if "wandb" in self.plan.settings.json and "WANDB_DIR" not in os.environ:
            os.environ["WANDB_DIR"] = str(plan.directory)  # otherwise it writes into the current directory
            self.resources.callback(os.environ.pop, "WANDB_DIR", None)
        for reader in (self.plan.reader, self.plan.initial):
            if reader is not None:
                reader.reading = self.watchdog.reading
        run = setup_run(self.plan, self.owner)
        names = plan.dataset.classes
        run.class_names = None if names is None else tuple(names)
        if run.config.is_text and run.config.run.sample_every_images:
            run.prompts = grid_prompts(run.config, plan.dataset, device)
        # not earlier: a rejected run must not change the file
        raise_on_all_ranks(device, lambda: self._write_resolved(run) if plan.is_main else None)
        return run

    def _write_resolved(self, run: Run) -> None:
        """Write the resolved configuration, which ``--config`` accepts."""
        directory = run.directory
        with self.watchdog.reading():
            write_text(directory / RESOLVED_RECIPE, dump_config(run.config), run.owner.directory(directory))

    def open_log(self, run: Run) -> RunLog:
        """Open the run log, which is closed with the session; a no-op on all ranks but rank 0.

        Every rank must call this.

        Raises:
            CheckpointError: on all ranks, if the files cannot be written.
            RunDirectoryBusyError: on all ranks, if another job has taken the run directory over meanwhile.
        """
        with self._as_owner():
            log = self._open_files(run)
        if run.is_main and run.engine.monitor.enabled:  # the wandb and csv_monitor sections of the DeepSpeed JSON
            log.monitor = run.engine.monitor.write_events
            run.engine.monitor.enabled = False  # DeepSpeed's own values repeat ours, and would fail on a full disk
            self.resources.callback(finish_wandb)
        self.resources.callback(log.close)
        return log

    def _open_files(self, run: Run) -> RunLog:
        log = raise_on_all_ranks(run.device, lambda: self._open_log(run) if run.is_main else RunLog())
        log.peak = peak_images_per_s(run.config, run.topology.world, run.device)
        return log

    def _open_log(self, run: Run) -> RunLog:
        settings, directory = run.settings, run.directory
        board = Path(settings.tensorboard_dir or directory / "tensorboard") if settings.tensorboard else None
        with self.watchdog.reading() as progress:
            return open_log(
                directory,
                board,
                run.images,
                run.step,
                run.config.run.total_images,
                evaluates=run.held_out is not None,
                tmp_directory=run.owner.directory(directory),
                progress=progress,
            )

    def open_batches(self, run: Run) -> BatchSource:
        """Start this rank's data loader, whose workers end with the session."""
        batches = BatchSource(run, self.plan.dataset, self.watchdog, self.lock)
        self.resources.callback(batches.close)
        self.watchdog.tick(run.step)  # limits the time from here on, also that of the first micro-batch
        return batches

    def finish(self, run: Run, last: Path | None) -> None:
        """Report a run that had nothing left to do, and make sure that the last checkpoint still exists.

        Every rank must call this.

        Args:
            run: the run.
            last: the last checkpoint that it wrote, if any.

        Raises:
            CheckpointError: on all ranks, if another process has removed the last checkpoint.
            RunDirectoryBusyError: on all ranks, if another job has taken the run directory over meanwhile.
        """
        if run.is_main and last is None:
            print(f"{'complete':>11}  already trained on {run.images:,} images; for more, raise run.total_images")
        self._check_lock()
        raise_on_all_ranks(run.device, lambda: _require_present(last) if run.is_main and last is not None else None)

    @contextmanager
    def _as_owner(self) -> Iterator[None]:
        """Run a block that reads or writes the run directory, and whose errors all ranks raise.

        Raises:
            RunDirectoryBusyError: on all ranks, if it failed because another job has taken the run directory over.
        """
        try:
            yield
        except (CheckpointError, AlreadyReportedError):
            self._check_lock()
            raise

    def _check_lock(self) -> None:
        """Raise RunDirectoryBusyError on all ranks if another job has taken over the run directory."""
        raise_on_all_ranks(local_device(self.plan.launch), lambda: None if self.lock is None else self.lock.check_now())


@contextmanager
def join(plan: TrainPlan) -> Iterator[Session]:
    """Join the other ranks, start the watchdog, take the run lock, print the banner and create the process group.

    Raises:
        LaunchError: a rank did not join, or resolved a different configuration.
        RunDirectoryBusyError: another job is writing into the run directory.
        RankLostError: a rank died or stopped responding while the session was open.
    """
    timeout_s = plan.config.run.rank_timeout_s
    rendezvous = join_ranks(plan.launch, plan.fingerprint(), plan.config.run.start_timeout_s, timeout_s)
    launch = rendezvous.launch
    with ExitStack() as resources:
        watchdog = resources.enter_context(
            Watchdog(launch.rank, launch.world, timeout_s, rendezvous.hosts, rendezvous.store, rendezvous.timeout_s)
        )
        with watchdog.watching():
            lock = rendezvous.on_main("lock", lambda: _take_lock(plan.directory, watchdog, resources))
            # re-read: an earlier job may have saved until it released the lock
            start = rendezvous.raise_on_all_ranks("start", plan.with_start)
            plan = start.with_launch(launch)
            if plan.is_main:
                print(banner(plan, rendezvous.hosts), flush=True)
            quiet_deepspeed()
            apply_device_settings(plan)
            seam.init_process_group(rendezvous.init_method())
            owner = _owner(lock, local_device(launch))
            yield Session(plan, rendezvous.hosts, watchdog, lock, owner, resources)
            release_surplus(launch, rendezvous.store, watchdog.alive)


def _take_lock(directory: Path, watchdog: Watchdog, resources: ExitStack) -> RunLock:
    with watchdog.reading() as progress:
        return resources.enter_context(RunLock(directory, checkpoint_root(directory), progress=progress))


def _owner(lock: RunLock | None, device: torch.device) -> Owner:
    """Return the owner of the run directory, whose token rank 0 knows, on all ranks."""
    token = bytes(8) if lock is None else bytes.fromhex(lock.owner.token)
    number = torch.tensor(int.from_bytes(token, "big", signed=True), device=device)
    return Owner(int(broadcast(number)).to_bytes(8, "big", signed=True).hex())


def _require_present(checkpoint: Path) -> None:
    path = checkpoint / MANIFEST
    try:
        is_present = path.is_file()
    except OSError as error:  # of the disk; says nothing about a checkpoint that was completely written
        print(f"*** WARNING: {path}: cannot be read: {error.strerror}; it was saved before ***", file=sys.stderr)
        return
    if not is_present:
        raise CheckpointError(f"{checkpoint}: was saved, but another process has removed it since.")
