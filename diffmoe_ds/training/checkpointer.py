"""When a run saves, and what it says and does about it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from diffmoe_ds.checkpoint.save import CheckpointSaver
from diffmoe_ds.config.load import config_to_dict
from diffmoe_ds.distributed import deepspeed_seam as seam
from diffmoe_ds.distributed.watchdog import Watchdog
from diffmoe_ds.errors import CheckpointError
from diffmoe_ds.training.setup import Run


class Saves:
    """The checkpoints of a run; every rank calls the same methods at the same step."""

    def __init__(self, run: Run, watchdog: Watchdog) -> None:
        self._run = run
        self._watchdog = watchdog
        self._saver = CheckpointSaver(run.directory, run.config.checkpoint, run.device)
        self._saved_images = run.images
        self._pause_s = 0.0
        self.last: Path | None = None

    @property
    def is_open(self) -> bool:
        """Whether a checkpoint was started and not finished."""
        return self._saver.is_open

    @property
    def is_writing(self) -> bool:
        """Whether this rank still writes one."""
        return self._saver.is_writing

    def start(self, wait: bool) -> None:
        """Save the run as it is now.

        Args:
            wait: until it is on the disk, and raise if that fails whatever the configuration says.
        """
        if self.is_open:
            self.finish()
        run, began = self._run, time.perf_counter()
        self._saver.start(run.ema.fragments, run.ema.values, _buffers(run), _meta(run))
        self._pause_s = time.perf_counter() - began
        if wait or not run.config.checkpoint.async_save:
            self.finish(must=wait)

    def finish(self, must: bool = False) -> None:
        """Complete the checkpoint that was started, waiting for it if needed."""
        began = time.perf_counter()
        while self.is_writing:
            time.sleep(0.01)
            self._watchdog.tick()
        images = self._saver.images
        try:
            self.last = self._saver.finish()
            self._saved_images = images
        except CheckpointError as error:
            if must or self._run.config.checkpoint.on_error == "stop":
                raise
            if self._run.is_main:
                print(f"\n*** WARNING: {error} Training goes on without it. ***\n", file=sys.stderr, flush=True)
            return
        self._pause_s += time.perf_counter() - began
        if self._run.is_main:
            print(f"{'saved':>11}  {self.last} (training waited {self._pause_s:.3f} s)", flush=True)

    def complete(self) -> None:
        """Finish what was started, if anything was."""
        if self.is_open:
            self.finish()

    def save_rest(self) -> None:
        """Finish what was started, and save what is not saved yet."""
        self.complete()
        if self._run.images > self._saved_images:
            self.start(wait=True)

    def last_words(self) -> str:
        """Save what is not saved yet, and say where the run can go on."""
        self.save_rest()
        where = f"saved {self.last}" if self.last else "nothing was left to save"
        return f"{self._run.images:,} images seen, {where}; {self._run.again} continues."


class Every:
    """True when a multiple of ``period`` images was passed since the last call; a period of 0 never is."""

    def __init__(self, period: int, images: int) -> None:
        self._period = period
        self._images = images

    def __call__(self, images: int) -> bool:
        before, self._images = self._images, images
        return self._period > 0 and images // self._period > before // self._period


def _buffers(run: Run) -> dict:
    return {name: buffer for name, buffer in run.model.named_buffers() if name != "pos_embed"}


def _meta(run: Run) -> dict:
    scheduler = run.engine.lr_scheduler
    return {
        "images": run.images,
        "step": run.step,
        "adam_step": seam.adam_step(run.engine),
        "lr_scheduler": None if scheduler is None else scheduler.state_dict(),
        "lr_now": seam.scheduled(run.engine),
        "shapes": {name: part.logical_shape for name, part in run.ema.parts.items()},
        "layout": {
            "world": run.topology.world,
            "ep_size": run.topology.ep_size,
            "zero_stage": run.settings.zero_stage,
            "global_batch": run.settings.global_batch,
            "micro_batch": run.settings.micro_batch,
            "accumulation": run.settings.accumulation,
        },
        "began_from": run.began_from,
        "deepspeed": run.settings.beside_layout(),
        "config": config_to_dict(run.config),
    }
