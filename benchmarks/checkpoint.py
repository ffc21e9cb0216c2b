"""Benchmark of saving and loading checkpoints: pause of the training loop and disk throughput.

Alternates in one process between our checkpoints, ``torch.save`` with fsync, PyTorch's distributed checkpoint (DCP)
with ``async_save``, and DeepSpeed's decoupled writer (in Python; its fast writer needs libaio and a compiler).
All write the same bytes: the weights, both moments and the averaged weights of a model in fp32.

    python -m benchmarks.checkpoint --megabytes 1000
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from diffmoe_ds.checkpoint.layout import KINDS, checkpoint_root
from diffmoe_ds.checkpoint.load import CheckpointReader
from diffmoe_ds.checkpoint.metadata import CheckpointMetadata, ScheduledValues
from diffmoe_ds.checkpoint.save import CheckpointSaver
from diffmoe_ds.checkpoint.verify import check_contents, check_sizes
from diffmoe_ds.cli import run_command
from diffmoe_ds.cli.arguments import require_positive
from diffmoe_ds.config.deepspeed_keys import MOMENTS
from diffmoe_ds.config.schema import CheckpointConfig, Config
from diffmoe_ds.distributed import deepspeed_seam as seam
from diffmoe_ds.distributed.fragments import Fragment
from diffmoe_ds.distributed.launch import export_launch, resolve_launch
from diffmoe_ds.distributed.ownership import Owner
from diffmoe_ds.distributed.quiet import quiet_deepspeed
from diffmoe_ds.distributed.shutdown import shutdown
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.files import sha256_of

TENSORS = 64
OURS, OURS_WAITING = "diffmoe, async", "diffmoe, waiting"
TORCH_SAVE, DCP, DEEPSPEED = "torch.save and fsync", "torch DCP async_save", "DeepSpeed decoupled writer"

Tensors = dict[str, dict[str, Tensor]]
"""Tensors by weight and kind (``fp32``, the moments, ``ema``)."""
Times = dict[str, dict[str, list[float]]]
"""Seconds by method and quantity, one per round."""
Save = Callable[[Path], Callable[[], object]]
"""Starts saving into a directory and returns a function that waits until everything is on disk."""


def bench_checkpoint(*, megabytes: int, rounds: int, folder: Path | None) -> dict[str, Any]:
    """Measure all savers and loaders alternately in this process.

    Args:
        megabytes: size of a checkpoint, in units of 10^6 bytes.
        rounds: number of saves and loads per method, after one warm-up round.
        folder: a directory on the disk to measure; None uses the system's temporary directory.

    Returns:
        Per method, medians over the rounds: seconds that the training loop waits (``pause_s``), seconds until all
        bytes are on disk (``total_s``), seconds to load (``load_s``), and the throughputs; and ratios between methods.
    """
    export_launch(resolve_launch())
    quiet_deepspeed()
    seam.init_process_group()
    numel = megabytes * 10**6 // (4 * len(KINDS) * TENSORS)
    tensors = {f"w{i}": {kind: torch.randn(numel) for kind in KINDS} for i in range(TENSORS)}
    size_mb = numel * 4 * len(KINDS) * TENSORS / 1e6
    with tempfile.TemporaryDirectory(dir=folder) as made, contextlib.ExitStack() as stack:
        times = _measure(tensors, Path(made), rounds, stack)
    shutdown()
    methods = {name: _summarize(row, size_mb) for name, row in times.items()}
    return {"megabytes": size_mb, "rounds": rounds, "ways": methods, "ratios": _ratios(methods)}


def _measure(tensors: Tensors, root: Path, rounds: int, stack: contextlib.ExitStack) -> Times:
    savers: dict[str, Save] = {
        OURS: _ours(tensors, root / "ours", wait=False),
        OURS_WAITING: _ours(tensors, root / "waiting", wait=True),
        TORCH_SAVE: _torch_save(tensors),
        DCP: _dcp(tensors),
        DEEPSPEED: _deepspeed(tensors, stack),
    }
    times: Times = defaultdict(lambda: defaultdict(list))
    for number in range(rounds + 1):
        for name, save in savers.items():
            target = root / "target"
            began = time.perf_counter()
            finish = save(target)
            paused = time.perf_counter() - began
            finish()
            total = time.perf_counter() - began
            if number:
                times[name]["pause_s"].append(paused)
                times[name]["total_s"].append(total)
            shutil.rmtree(target, ignore_errors=True)
        for name, load in _loaders(tensors, root).items():
            began = time.perf_counter()
            load()
            if number:
                times[name]["load_s"].append(time.perf_counter() - began)
    return times


def _summarize(times: dict[str, list[float]], size_mb: float) -> dict[str, float]:
    row = {key: statistics.median(values) for key, values in times.items()}
    if "total_s" in row:
        row["save_mb_per_s"] = size_mb / row["total_s"]
    if "load_s" in row:
        row["load_mb_per_s"] = size_mb / row["load_s"]
    return row


def _ratios(methods: dict[str, dict[str, float]]) -> dict[str, float]:
    ours, plain = methods[OURS], methods[TORCH_SAVE]
    return {
        "pause, ours / torch.save": ours["pause_s"] / plain["pause_s"],
        "pause, ours / torch DCP": ours["pause_s"] / methods[DCP]["pause_s"],
        "pause, ours / DeepSpeed": ours["pause_s"] / methods[DEEPSPEED]["pause_s"],
        "MB/s saved, ours / torch.save": ours["save_mb_per_s"] / plain["save_mb_per_s"],
        "MB/s loaded and checked, ours / torch.load": ours["load_mb_per_s"] / plain["load_mb_per_s"],
    }


def _ours(tensors: Tensors, run_directory: Path, wait: bool) -> Save:
    owner = Owner(secrets.token_hex(8))
    owner.claim(checkpoint_root(run_directory))
    saver = CheckpointSaver(run_directory, CheckpointConfig(keep_last=1), torch.device("cpu"), owner)
    shapes = {name: tuple(kinds["fp32"].shape) for name, kinds in tensors.items()}
    metadata = CheckpointMetadata(1, 0, 0, 0, shapes, Config(), ScheduledValues(0.0, ()))
    fragments = [
        Fragment(name, 0, 0, kinds["fp32"], {key: kinds[key] for key in MOMENTS["AdamW"]}, True)
        for name, kinds in tensors.items()
    ]

    def save(_: Path) -> Callable[[], object]:
        saver.start(fragments, [kinds["ema"] for kinds in tensors.values()], {}, metadata)
        if wait:
            saver.finish()
            return lambda: None
        return saver.finish

    return save


def _torch_save(tensors: Tensors) -> Save:
    def save(target: Path) -> Callable[[], object]:
        target.mkdir()
        with open(target / "all.pt", "wb") as file:
            torch.save(tensors, file)
            file.flush()
            os.fsync(file.fileno())
        return lambda: None

    return save


def _dcp(tensors: Tensors) -> Save:
    def save(target: Path) -> Callable[[], object]:
        saving = dcp.async_save(tensors, checkpoint_id=target)
        assert isinstance(saving, Future)
        return saving.result

    return save


def _deepspeed(tensors: Tensors, stack: contextlib.ExitStack) -> Save:
    """Save a model of the same size and state: fp32 weights, two moments and the averaged weights."""
    model = nn.ParameterDict({name: nn.Parameter(kinds["fp32"]) for name, kinds in tensors.items()})
    ema = {name: nn.Parameter(kinds["ema"], requires_grad=False) for name, kinds in tensors.items()}
    both = nn.ModuleList([model, nn.ParameterDict(ema)])
    config = {
        "train_batch_size": 1,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "lr": 0.0}},
        "checkpoint": {"writer": {"type": "python", "data_parallel": "replica", "decoupled": True}},
    }
    os.environ.update(LOCAL_SIZE="1", CROSS_SIZE="1", CROSS_RANK="0")  # set by its launcher
    with contextlib.redirect_stdout(sys.stderr):
        engine = seam.initialize(both, config)
    stack.callback(engine.checkpoint_engine.cleanup)  # ends its writer process, which Python would wait for at exit

    def step() -> None:
        """Run an optimizer step, which waits for the writer because it changes the weights."""
        engine.backward(sum(weight.sum() for weight in model.values()))
        engine.step()

    def save(target: Path) -> Callable[[], object]:
        engine.save_checkpoint(str(target))
        return step

    step()  # allocates the moments
    return save


def _loaders(tensors: Tensors, root: Path) -> dict[str, Callable[[], None]]:
    plain = root / "plain.pt"
    if not plain.exists():
        torch.save(tensors, plain)

    def ours() -> None:
        path = next((root / "ours" / "checkpoints").glob("images_*"))
        check_contents(path, check_sizes(path))
        reader = CheckpointReader(path)
        for name, kinds in tensors.items():
            for kind, value in kinds.items():
                reader.read(kind, name, 0, value.numel())

    def torch_load() -> None:
        torch.load(plain, weights_only=True)

    def checked_load() -> None:
        sha256_of(plain)
        torch.load(plain, weights_only=True)

    return {OURS: ours, TORCH_SAVE: torch_load, "torch.load after a checksum": checked_load}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the results and return the exit code."""
    text = "Compare saving and loading with torch.save, PyTorch DCP and DeepSpeed's decoupled writer."
    parser = argparse.ArgumentParser(description=text)
    add = parser.add_argument
    add("--megabytes", type=int, default=500, metavar="N", help="size of a checkpoint (default: %(default)s)")
    add(
        "--rounds",
        type=int,
        default=5,
        metavar="R",
        help="alternating rounds (default: %(default)s)",
    )
    add("--folder", type=Path, metavar="DIR", help="directory on the disk to measure (default: temporary)")
    add("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run)
    return run_command(parser.parse_args(argv))


def _run(args: argparse.Namespace) -> None:
    require_positive(args, "megabytes", "rounds")
    if args.folder is not None and not args.folder.is_dir():
        raise ConfigError(f"--folder {args.folder} is not a directory; create it, or omit --folder.")
    report = bench_checkpoint(megabytes=args.megabytes, rounds=args.rounds, folder=args.folder)
    if args.json:
        print(json.dumps(report))
        return
    print(f"{report['megabytes']:,.0f} MB, medians of {report['rounds']} rounds")
    units = {"pause_s": "s pause of the training loop", "save_mb_per_s": "MB/s saved", "load_mb_per_s": "MB/s loaded"}
    for name, row in report["ways"].items():
        print(
            f"  {name:<28}" + "".join(f" {row[key]:>10.3f} {unit}," for key, unit in units.items() if key in row)[:-1]
        )
    for name, ratio in report["ratios"].items():
        print(f"  {name:<44} {ratio:.2f}")


if __name__ == "__main__":
    sys.exit(main())
