"""Benchmark of a training step: forward and backward of MoE models over the dense model of the same activated size.

    python -m benchmarks.step --json
    python -m benchmarks.step --routing batch_pool token_choice --images 16 --threads 2
    python -m benchmarks.step --deepspeed --size L --images 256 --micro-batch 32 --dtype bf16

Each thread count runs in a process of its own. With ``--deepspeed``, the whole step is measured beside it: the engine's
forward and backward, clipping, Adam, thresholds and EMA, and the share of each. The optimizer of a MoE model updates
several times the parameters of the dense one.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.compare import (
    DTYPES,
    common_settings,
    compare,
    machine_facts,
    print_cases,
    progress,
    require_positive_list,
    run_benchmark,
)
from benchmarks.models import DENSE, ROUTINGS, forward_loss, make_batch, make_model, model_config, training_pass
from diffmoe_ds.cli.arguments import require_positive
from diffmoe_ds.config.schema import Config
from diffmoe_ds.data.loader import MicroBatch
from diffmoe_ds.errors import ConfigError

NAME = "benchmarks.step"
CHILD_TIMEOUT_S = 3600
PRODUCT_SIZE = 8192


def bench_step(args: argparse.Namespace, images: int, device: torch.device) -> dict[str, Any]:
    """Measure forward and backward of the dense model and of the chosen routings.

    Args:
        args: the command line.
        images: images of a step.
        device: where the models run.

    Returns:
        A case of a report; ``tflop`` are the operations of a step's matrix products and attention, in units of 10^12.
    """
    passes: dict[str, Callable[[], object]] = {}
    for routing in (DENSE, *args.routing):
        config = _config(args, routing)
        model = make_model(config, device, DTYPES[args.dtype])
        batches = _micro_batches(config, images, args.micro_batch, device)
        passes[routing] = lambda model=model, batches=batches: training_pass(model, batches)  # type: ignore[misc]
    tflop = {}
    for name, run in passes.items():
        with FlopCounterMode(display=False) as counter:
            run()
        tflop[name] = counter.get_total_flops() / 1e12
    rows = compare(passes, rounds=args.rounds, device=device, baselines=(DENSE,))
    speed = {name: tflop[name] / (row["median_ms"] / 1e3) for name, row in rows.items()}
    return {**_case(args, images, "forward + backward"), "opponents": rows, "tflop": tflop, "tflop_per_s": speed}


def bench_whole_step(args: argparse.Namespace, images: int, device: torch.device) -> dict[str, Any]:
    """Measure the whole step under DeepSpeed.

    Returns:
        A case of a report; ``shares`` are the parts of a step's time, measured in further steps with a synchronization
        after each part, and ``parameters`` the number that the optimizer updates.
    """
    steps = {}
    for routing in (DENSE, *args.routing):
        config = _config(args, routing)
        steps[routing] = WholeStep(config, args, images, device)
    rows = compare(steps, rounds=args.rounds, device=device, baselines=(DENSE,))
    return {
        **_case(args, images, "whole step under DeepSpeed"),
        "opponents": rows,
        "shares": {name: step.shares(args.rounds) for name, step in steps.items()},
        "parameters": {name: step.parameters for name, step in steps.items()},
    }


class WholeStep:
    """One optimizer step of a run, as `diffmoe_ds/training/step.py` takes it."""

    def __init__(self, config: Config, args: argparse.Namespace, images: int, device: torch.device) -> None:
        from diffmoe_ds.config.deepspeed import resolve_deepspeed
        from diffmoe_ds.distributed import deepspeed_seam as seam
        from diffmoe_ds.distributed.launch import export_launch, resolve_launch
        from diffmoe_ds.distributed.ownership import Owner
        from diffmoe_ds.distributed.quiet import quiet_deepspeed
        from diffmoe_ds.training.plan import TrainPlan
        from diffmoe_ds.training.setup import setup_run

        launch = export_launch(resolve_launch())
        quiet_deepspeed()
        if not torch.distributed.is_initialized():
            seam.init_process_group()
        batch = {"train_batch_size": images, "train_micro_batch_size_per_gpu": args.micro_batch or images}
        raw = {
            **config.deepspeed,
            **batch,
            "bf16": {"enabled": args.dtype == "bf16"},
            "tensorboard": {"enabled": False},
        }
        raw["gradient_accumulation_steps"] = images // batch["train_micro_batch_size_per_gpu"]
        settings = resolve_deepspeed(raw, config, NAME, world=1, local_world=1, device=device.type)
        nothing: Any = None  # the plan's dataset, which is not read
        plan = TrainPlan(launch, config, settings, Path(tempfile.gettempdir()), "none", nothing)
        self._run = setup_run(plan, Owner("0" * 16))  # nothing is saved
        self._step = seam.step
        self._device = device
        self._batches = _micro_batches(config, images, args.micro_batch, device)
        self._seconds: dict[str, float] | None = None
        self.parameters = sum(p.numel() for p in self._run.model.parameters())

    def __call__(self) -> None:
        """Take a step."""
        run, began = self._run, time.perf_counter()
        for batch in self._batches:
            loss, routing = forward_loss(run.engine, batch, run.config)
            began = self._mark("forward", began)
            run.engine.backward(loss)
            if batch is not self._batches[-1]:
                run.engine.step()  # DeepSpeed counts micro-steps here
            began = self._mark("backward", began)
            run.thresholds.observe(routing)
            began = self._mark("thresholds", began)
        run.thresholds.search()
        began = self._mark("thresholds", began)
        self._step(run.engine, run.settings.gradient_clipping)
        began = self._mark("optimizer", began)
        run.thresholds.update(is_inconclusive=False)  # never, on one rank
        began = self._mark("thresholds", began)
        run.ema.update(run.config.ema.decay)
        self._mark("ema", began)

    def shares(self, rounds: int) -> dict[str, float]:
        """Return the mean fraction of each part of a step."""
        self._seconds = {}
        for _ in range(rounds):
            self()
        total = sum(self._seconds.values())
        return {part: seconds / total for part, seconds in self._seconds.items()}

    def _mark(self, part: str, began: float) -> float:
        """Attribute the time since ``began`` to a part, if parts are measured, and return the time."""
        if self._seconds is None:
            return began
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self._seconds[part] = self._seconds.get(part, 0.0) + now - began
        return now


def _config(args: argparse.Namespace, routing: str) -> Config:
    return model_config(args.size, args.experts, routing, args.overrides)


def _micro_batches(config: Config, images: int, micro_batch: int | None, device: torch.device) -> list[MicroBatch]:
    size = micro_batch or images
    return [make_batch(config, size, device, seed) for seed in range(images // size)]


def _case(args: argparse.Namespace, images: int, what: str) -> dict[str, Any]:
    micro = f" in micro-batches of {args.micro_batch}" if args.micro_batch else ""
    threads = torch.get_num_threads()
    return {
        "case": f"{args.size}-E{args.experts}, {images} images{micro}, {args.dtype}, {threads} thread(s): {what}",
        "images": images,
        "threads": threads,
        "measures": what,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the results and return the exit code."""
    parser = argparse.ArgumentParser(description="Compare a training step of MoE models with the dense model's.")
    add = parser.add_argument
    add("--size", default="S", metavar="SIZE", help="model size (default: %(default)s)")
    add("--experts", type=int, default=16, metavar="E", help="default: %(default)s")
    add(
        "--routing", nargs="+", choices=ROUTINGS, default=["batch_pool"], metavar="KIND",
        help=f"MoE models to compare: {', '.join(ROUTINGS)} (default: batch_pool)",
    )  # fmt: skip
    add("--images", type=int, nargs="+", default=[8, 16], metavar="B", help="images of a step (default: 8 16)")
    add("--micro-batch", type=int, metavar="B", help="accumulate micro-batches of this size (default: one)")
    add("--dtype", choices=sorted(DTYPES), default="fp32", help="default: %(default)s")
    add("--threads", type=int, nargs="+", metavar="N", help="default: 1 and all cores; torch's on a GPU")
    add("--deepspeed", action="store_true", help="also measure the whole step under DeepSpeed")
    add("--set", dest="overrides", metavar="a.b=c", nargs="+", default=[], help="override keys of the models' recipe")
    return run_benchmark(parser, _run, argv, rounds=11)


def _run(args: argparse.Namespace) -> None:
    device = common_settings(args)
    if args.quick:
        args.size, args.experts, args.images = "nano", 4, [2]
    _check(args)
    cores = machine_facts(NAME, args.argv)["cores"]
    threads = args.threads or ([torch.get_num_threads()] if device.type == "cuda" or args.quick else [1, cores])
    if len(set(threads)) > 1:
        cases = [case for count in dict.fromkeys(threads) for case in _child(args.argv, count)]
    else:
        torch.set_num_threads(threads[0])
        cases = _cases(args, device)
    is_gpu = device.type == "cuda"
    facts = {"product_tflop_per_s": product_speed(device, DTYPES[args.dtype])} if is_gpu else {}
    print_cases(NAME, args, cases, **facts)


def product_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Return the speed of a large matrix product, a GPU's practical peak, in units of 10^12 operations per second."""
    a, b = torch.randn(2, PRODUCT_SIZE, PRODUCT_SIZE, device=device, dtype=dtype)
    row = compare({"product": lambda: a @ b}, rounds=5, device=device)["product"]
    tflop: float = 2 * PRODUCT_SIZE**3 / 1e12 / (row["median_ms"] / 1e3)
    return tflop


def _cases(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    cases = []
    for images in args.images:
        progress(f"step: {images} images, {torch.get_num_threads()} thread(s)")
        cases.append(bench_step(args, images, device))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if args.deepspeed:
            progress(f"step: {images} images under DeepSpeed")
            cases.append(bench_whole_step(args, images, device))
    if args.deepspeed:
        from diffmoe_ds.distributed.shutdown import shutdown

        gc.collect()
        shutdown()
    return cases


def _child(argv: Sequence[str], threads: int) -> list[dict[str, Any]]:
    """Run this benchmark in a process with another number of threads; the last --threads and --json count."""
    command = [sys.executable, "-m", NAME, *argv, "--json", "--threads", str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=CHILD_TIMEOUT_S)
    if done.returncode:
        raise ConfigError(f"the process with --threads {threads} failed with exit code {done.returncode}.")
    cases: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])["cases"]
    return cases


def _check(args: argparse.Namespace) -> None:
    require_positive(args, "experts")
    require_positive_list("--images", args.images)
    require_positive_list("--threads", args.threads or [1])
    if args.micro_batch is not None:
        require_positive(args, "micro_batch")
        for images in args.images:
            if images % args.micro_batch:
                raise ConfigError(f"--micro-batch must divide --images {images}, got {args.micro_batch}.")


if __name__ == "__main__":
    sys.exit(main())
