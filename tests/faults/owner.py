"""A job without a model, for faults of its files: it locks a run directory, resumes and saves checkpoints.

``owner.py RUN [--saves N] [--pause FILE]``: with FILE, it waits after its first checkpoint until the file exists.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from diffmoe_ds.checkpoint.layout import RESOLVED_RECIPE, checkpoint_root
from diffmoe_ds.checkpoint.metadata import CheckpointMetadata, ScheduledValues
from diffmoe_ds.checkpoint.save import CheckpointSaver
from diffmoe_ds.checkpoint.verify import newest_valid
from diffmoe_ds.config.schema import CheckpointConfig, Config
from diffmoe_ds.distributed import run_lock
from diffmoe_ds.errors import DiffMoEError
from diffmoe_ds.files import write_text
from diffmoe_ds.training.log_files import JsonlLog

PAUSE_LIMIT_S = 120


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--pause", type=Path)
    args = parser.parse_args()
    run_lock.BEAT_S, run_lock.STALE_S, run_lock.SETTLE_S = 0.05, 0.4, 0.05
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with run_lock.RunLock(args.run, checkpoint_root(args.run)) as lock:
        write_text(args.run / RESOLVED_RECIPE, f"{os.getpid()}\n", lock.owner.directory(args.run))
        found = newest_valid(args.run, full=True)
        images = 0 if found is None else int(found.name.split("_")[1])
        print("resumed", found, flush=True)
        log = JsonlLog(args.run / "metrics.jsonl", images // 16, lock.owner.directory(args.run))
        saver = CheckpointSaver(args.run, CheckpointConfig(keep_last=2), torch.device("cpu"), lock.owner)
        for number in range(1, args.saves + 1):
            log.add({"step": images // 16 + number, "process": os.getpid()})
            metadata = CheckpointMetadata(1, images + 16 * number, 1, 1, {}, Config(), ScheduledValues(1e-3, (0.9,)))
            saver.start([], [], {"threshold": torch.full((1,), os.getpid(), dtype=torch.float32)}, metadata)
            try:
                path = saver.finish()
            except DiffMoEError:
                lock.check_now()
                raise
            saver.wait_for_retention()
            print("saved", path, flush=True)
            lock.check_now()
            deadline = time.monotonic() + PAUSE_LIMIT_S
            while number == 1 and args.pause and not args.pause.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
        log.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except DiffMoEError as error:
        print(f"error: {error}", flush=True)
        sys.exit(error.exit_code)
