"""What ``diffmoe train --dry-run`` adds to the banner: verified checkpoints, memory, and reading of all images."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import torch
from tqdm import tqdm

from diffmoe_ds.checkpoint.inspect import SMALL
from diffmoe_ds.checkpoint.verify import check_contents, check_sizes, no_valid_one, warn_skipped
from diffmoe_ds.distributed.launch import local_device
from diffmoe_ds.distributed.quiet import quiet_deepspeed
from diffmoe_ds.errors import CheckpointError, DataError
from diffmoe_ds.evaluation.held_out import HeldOut
from diffmoe_ds.planning.layout import Layout
from diffmoe_ds.planning.memory import StepMemory, fits_in, step_memory
from diffmoe_ds.planning.simulate import estimate_passes
from diffmoe_ds.text import counted
from diffmoe_ds.training.plan import TrainPlan

GB = 1e9
HOST_RESERVED_BYTES = 2**30
"""Memory of a rank without a GPU that tensors cannot use: Python, torch and DeepSpeed."""
BLOCK = 64
"""Images that a thread reads at a time."""
NAMED = 5
"""Unreadable images that are named."""
BAR_INTERVAL_S = 10
"""Seconds between updates of the progress bar in a log file."""


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory that a run needs and has."""

    memory: StepMemory
    """Of one rank, at the peak of a step."""
    device: str
    """The GPU, or the host."""
    available: int
    """Bytes of one rank: those of the GPU, or its share of the host's."""
    fits: bool
    """Whether it fits, with room for what is not counted."""

    def lines(self) -> list[tuple[str, str]]:
        """Return (label, text) for the banner."""
        parts = {name.replace("_", " "): size for name, size in self.memory.parts.items() if size >= GB / 200}
        shown = ", ".join(f"{name} {size / GB:.2f}" for name, size in parts.items())
        total = f"about {self.memory.total / GB:.2f} GB per rank at the peak, in the {self.memory.phase.name} phase"
        verdict = "fits" if self.fits else "does not fit"
        return [
            ("memory", f"{total}{f': {shown}' if shown else ''}"),
            (
                "verdict",
                f"{verdict} on {self.device} with {self.available / GB:.1f} GB per rank; `diffmoe plan` has the "
                "details, and other GPUs",
            ),
        ]

    def summary(self) -> dict[str, Any]:
        """Return the estimate as plain data, with the names that ``diffmoe plan --json`` uses."""
        return {
            "memory_per_rank_gb": self.memory.total / GB,
            "memory_parts_gb": {name: size / GB for name, size in self.memory.parts.items()},
            "memory_peak_phase": self.memory.phase.name,
            "device": self.device,
            "device_gb": self.available / GB,
            "fits": self.fits,
        }


def verify_checkpoint(plan: TrainPlan, *, thorough: bool) -> TrainPlan:
    """Verify the checkpoint that a run would resume from, and skip damaged ones as it does.

    Args:
        plan: the plan, whose checkpoint has files of the right sizes.
        thorough: verify the contents of checkpoints of any size, not only up to `SMALL` bytes.

    Returns:
        The plan with the first undamaged checkpoint.

    Raises:
        CheckpointError: there are checkpoints, but all are damaged.
    """
    for path in plan.choices:
        try:
            files = check_sizes(path)
            if thorough or sum(digest.size for digest in files.values()) <= SMALL:
                check_contents(path, files)
        except CheckpointError as error:
            warn_skipped(path, error)
            continue
        return plan.with_checkpoint(path)
    if plan.choices:
        raise no_valid_one(plan.directory, len(plan.choices))
    return plan


def estimate_memory(plan: TrainPlan) -> MemoryEstimate:
    """Estimate the memory of a run as ``diffmoe plan`` does, and compare it with this host's."""
    quiet_deepspeed()
    launch = plan.launch
    layout = Layout(plan.config, plan.settings, launch.world, launch.local_world)
    memory = step_memory(layout, estimate_passes(layout))
    device = local_device(launch)
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        return MemoryEstimate(memory, gpu.name, gpu.total_memory, fits_in(gpu.total_memory, memory.total))
    available = psutil.virtual_memory().total // launch.local_world
    needed = memory.total + memory.host_checkpoint + memory.host_optimizer  # all in the host's memory
    fits = fits_in(available, needed, HOST_RESERVED_BYTES)
    return MemoryEstimate(memory, "this host without a GPU", available, fits)


@dataclass(frozen=True)
class ImagesRead:
    """The result of reading all images of a set."""

    key: str
    """The key of the set in the recipe."""
    images: int
    """How many were read."""
    allowed: int
    """How many may be unreadable."""
    rule: str
    """What allows them, for messages."""
    problems: tuple[str, ...]
    """What is wrong with each unreadable image."""

    def line(self) -> str:
        """Return one sentence, without the names of unreadable images."""
        if not self.problems:
            return f"{self.key}: all {counted(self.images, 'image')} can be read"
        count = counted(len(self.problems), "unreadable image")
        return f"{self.key}: {count} of {self.images:,}; {self.rule} {self.allowed:,}"

    def lines(self) -> list[tuple[str, str]]:
        """Return (label, text) for the banner: the sentence and the first unreadable images."""
        named = [("unreadable", problem) for problem in self.problems[:NAMED]]
        if len(self.problems) > NAMED:
            named.append(("", f"and {len(self.problems) - NAMED:,} more"))
        return [("images", self.line()), *named]

    def check(self) -> None:
        """Check that the run would not stop.

        Raises:
            DataError: too many images are unreadable.
        """
        if len(self.problems) > self.allowed:
            raise DataError(f"{self.line()}; the first is: {self.problems[0]}")


def read_all_images(plan: TrainPlan) -> list[ImagesRead]:
    """Read every image of the training set, and of the held-out set if there is one, as a run reads them."""
    data, total = plan.config.data, len(plan.dataset)
    training = HeldOut(plan.dataset, plan.config)
    if plan.dataset.latents is None:
        allowed, rule = int(data.max_unreadable * total), f"data.max_unreadable {data.max_unreadable:g} allows"
    else:
        allowed, rule = 0, "of prepared latents, the run allows"
    found = [ImagesRead(data.path or "embedded images", total, allowed, rule, _problems(training, "read"))]
    if plan.held_out is not None:
        rule, problems = "of held-out images, the run allows", _problems(plan.held_out, "read held-out")
        found.append(ImagesRead(str(data.validation_path), len(plan.held_out), 0, rule, problems))
    return found


def _problems(images: HeldOut, what: str) -> tuple[str, ...]:
    """Read images in threads behind a progress bar, and return what is wrong with those that cannot be read."""
    blocks = [range(first, min(first + BLOCK, len(images))) for first in range(0, len(images), BLOCK)]
    problems: list[str] = []
    interval = 0.1 if sys.stderr.isatty() else BAR_INTERVAL_S
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    try:
        with tqdm(total=len(images), unit="image", desc=what, mininterval=interval) as bar:
            for block, found in zip(blocks, pool.map(partial(_read, images), blocks), strict=True):
                problems += found
                bar.update(len(block))
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C
    return tuple(problems)


def _read(images: HeldOut, block: range) -> list[str]:
    return list(_unreadable(images, block))


def _unreadable(images: HeldOut, block: range) -> Iterator[str]:
    for position in block:
        try:
            next(images.read(range(position, position + 1), 1))
        except DataError as error:
            yield str(error)
