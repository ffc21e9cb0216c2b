"""The log of a run: ``metrics.jsonl``, ``validation.jsonl``, TensorBoard and periodic console lines."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffmoe_ds.config.schema import Config
from diffmoe_ds.diffusion.objective import NOISE_BINS
from diffmoe_ds.distributed.stragglers import Comparison
from diffmoe_ds.files import Progress
from diffmoe_ds.moe.layer import MoELayer
from diffmoe_ds.planning.devices import device_reported
from diffmoe_ds.planning.flops import flops_per_image
from diffmoe_ds.training.host_memory import HostMemory, describe_largest, largest
from diffmoe_ds.training.log_files import JsonlLog, TensorBoardLog
from diffmoe_ds.training.routing_report import RoutingReport

SPEED_STEPS = 50
"""Recent steps over which the log line's throughput and ETA are averaged."""


Monitor = Callable[[list[tuple[str, float, int]]], object]
"""Takes (tag, value, images) of scalars, for Weights & Biases and CSV files."""


class RunLog:
    """No-op log of all ranks but rank 0, which uses `MainLog`."""

    peak: float | None = None
    """Throughput at the peak of all devices, see `peak_images_per_s`; None if unknown."""
    monitor: Monitor | None = None
    """Where scalars go besides TensorBoard."""

    def step(self, row: dict[str, Any]) -> None:
        """Record an optimizer step; its row is written once its numbers are on the host.

        Args:
            row: its metrics; ``images_per_s`` and ``mfu`` of this step alone and ``peak_memory_mb`` are added.
                ``grad_norm`` may be a tensor: on a GPU it is copied while the next step runs, so that the host need
                not wait for it.
        """

    def settle(self) -> None:
        """Write the row of the last step, waiting for its numbers if necessary."""

    def skipped(self, text: str) -> None:
        """Report a skipped non-finite step."""

    def line(self) -> None:
        """Print a line about the steps since the last line, and write their means to TensorBoard."""

    def routing(self, report: RoutingReport, layers: Mapping[int, MoELayer], images: int) -> None:
        """Write, for every MoE layer, the load per expert, experts per token, capacity by noise level, thresholds.

        Args:
            report: of the step that just ended.
            layers: the MoE layers by block number.
            images: images seen so far.
        """

    def ranks(self, comparison: Comparison, images: int) -> None:
        """Write how much slower the slowest rank is than the others, and print it if it is a straggler."""

    def host_memory(self, ranks: Sequence[HostMemory], images: int) -> None:
        """Print and write what the rank with the most host memory takes.

        Args:
            ranks: the memory of every rank.
            images: images seen so far.
        """

    def image(self, tag: str, grid_HWC: np.ndarray, images: int) -> None:
        """Write a uint8 image to TensorBoard."""

    def evaluation(self, row: dict[str, Any]) -> None:
        """Write an evaluation to ``validation.jsonl`` and TensorBoard, and print one line.

        Args:
            row: see `Validation.evaluate`.
        """

    def pause(self) -> None:
        """Exclude the time since the last step from the throughput."""

    def close(self) -> None:
        """Flush and close the files."""


def open_log(
    directory: Path, tensorboard_dir: Path | None, images: int, step: int, total_images: int, *,
    evaluates: bool = False, tmp_directory: Path | None = None, progress: Progress = lambda: None,
) -> RunLog:  # fmt: skip
    """Open the log of rank 0.

    Args:
        directory: the run directory.
        tensorboard_dir: directory for TensorBoard files; None disables them.
        images: images seen so far.
        step: optimizer steps so far; rows of an earlier attempt after it are dropped.
        total_images: images of the whole run, for the ETA.
        evaluates: whether `RunLog.evaluation` will be called.
        tmp_directory: see `replacing`.
        progress: called while the rows of earlier attempts are copied.

    Raises:
        CheckpointError: a file cannot be written.
    """
    rows = JsonlLog(directory / "metrics.jsonl", step, tmp_directory, progress)
    path = directory / "validation.jsonl"
    evaluations = JsonlLog(path, step, tmp_directory, progress) if evaluates or os.path.exists(path) else None
    board = None if tensorboard_dir is None else TensorBoardLog(tensorboard_dir, images, tmp_directory)
    return MainLog(rows, evaluations, board, images, total_images)


def peak_images_per_s(config: Config, world: int, device: torch.device) -> float | None:
    """Return the throughput of a run whose devices all compute at their bf16 peak; MFU is the fraction of it.

    Args:
        config: the run's configuration.
        world: number of ranks W, each with a device like this one.
        device: of this rank.

    Returns:
        Images per second, or None for a CPU and for GPUs whose peak is unknown.
    """
    gpu = device_reported(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if gpu is None else world * gpu.bf16_flops / flops_per_image(config).training


class MainLog(RunLog):
    """The log of rank 0."""

    def __init__(
        self, rows: JsonlLog, evaluations: JsonlLog | None, board: TensorBoardLog | None, images: int,
        total_images: int,
    ) -> None:  # fmt: skip
        self._rows = rows
        self._evaluations = evaluations
        self._board = board
        self._total = total_images
        self._recent: deque[tuple[float, int]] = deque([(time.perf_counter(), images)], maxlen=SPEED_STEPS + 1)
        self._since_line: list[dict[str, Any]] = []
        self._last: dict[str, Any] | None = None
        self._monitor_failed = False
        if torch.cuda.is_available():
            self._copied = torch.cuda.Event()

    def step(self, row: dict[str, Any]) -> None:
        last_time, last_images = self._recent[-1]
        now = time.perf_counter()
        self._recent.append((now, row["images"]))
        row["images_per_s"] = round((row["images"] - last_images) / max(now - last_time, 1e-9), 2)
        if self.peak is not None:
            row["mfu"] = round(row["images_per_s"] / self.peak, 4)
        row["peak_memory_mb"] = round(peak_memory_mb(), 1)
        self.settle()
        self._last = row
        if isinstance(row["grad_norm"], Tensor) and row["grad_norm"].is_cuda:
            row["grad_norm"] = row["grad_norm"].to("cpu", non_blocking=True)
            self._copied.record()
        else:
            self.settle()

    def settle(self) -> None:
        row, self._last = self._last, None
        if row is None:
            return
        norm = row["grad_norm"]
        if isinstance(norm, Tensor):
            if torch.cuda.is_available():
                self._copied.synchronize()
            row["grad_norm"] = float(norm.numpy())
        self._rows.add(row)
        self._since_line.append(row)

    def skipped(self, text: str) -> None:
        print(f"{'skipped':>11}  {text}", flush=True)

    def pause(self) -> None:
        images = self._recent[-1][1]
        self._recent.clear()
        self._recent.append((time.perf_counter(), images))

    def line(self) -> None:
        self.settle()
        rows = self._since_line
        means = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0] if key not in ("step", "images")}
        last = rows[-1]
        self._since_line = []
        (first_time, first_images), (last_time, last_images) = self._recent[0], self._recent[-1]
        speed = (last_images - first_images) / max(last_time - first_time, 1e-9)
        if last_images == first_images:
            speed = means["images_per_s"]
        if self.peak is not None:
            means["mfu"] = speed / self.peak
        values = {**means, "images_per_s": speed}
        grouped = {f"{'loss' if key.endswith('loss') else 'train'}/{key}": values[key] for key in values}
        self._scalars(grouped, last["images"])
        left = max(self._total - last["images"], 0) / speed
        parts = " ".join(f"{key.removesuffix('_loss')} {means[key]:.4f}" for key in means if key.endswith("_loss"))
        print(
            f"{last['images']:>11,} of {self._total:,} images | loss {means['loss']:.4f} ({parts}) | "
            f"grad {means['grad_norm']:.3f} | lr {last['lr']:.2e} | {speed:,.0f} images/s | "
            f"{'' if self.peak is None else f'MFU {speed / self.peak:.1%} | '}"
            f"{last['peak_memory_mb']:,.0f} MB | ETA {_clock(left)}",
            flush=True,
        )

    def routing(self, report: RoutingReport, layers: Mapping[int, MoELayer], images: int) -> None:
        if self._board is None and self.monitor is None:
            return
        scalars, histograms = {}, {}
        for number, (index, layer) in enumerate(layers.items()):
            block = f"block_{index:02d}"
            histograms[f"load/{block}"] = report.load_LE[number]
            for expert, load in enumerate(report.load_LE[number].tolist()):
                scalars[f"load_per_expert/{block}/expert_{expert:02d}"] = load
            for taken, share in enumerate(report.taken_LT[number].tolist()):
                scalars[f"tokens_by_experts_taken/{block}/experts_{taken:02d}"] = share
            for level, capacity in enumerate(report.capacity_LN[number].tolist()):
                if capacity == capacity:  # a bin without images is NaN
                    scalars[f"capacity_by_noise_level/{block}/noise_{(level + 0.5) / NOISE_BINS:.2f}"] = capacity
            if layer.capacity_predictor is not None:
                histograms[f"thresholds/{block}"] = layer.expert_threshold
                for expert, threshold in enumerate(layer.expert_threshold.tolist()):
                    scalars[f"threshold/{block}/expert_{expert:02d}"] = threshold
            if layer.kind == "expert_race":
                scalars[f"race_threshold/{block}"] = layer.race_threshold.item()
        if self._board is not None:
            for tag, values in histograms.items():
                self._board.add_histogram(tag, values, images)
        self._scalars(scalars, images)

    def ranks(self, comparison: Comparison, images: int) -> None:
        self._scalars({"ranks/slowest_over_others": comparison.ratio, "ranks/slowest_rank": comparison.rank}, images)
        if comparison.is_straggler:
            print(f"{'straggler':>11}  {comparison}", flush=True)
            if self._board is not None:
                self._board.add_text("ranks/straggler", str(comparison), images)
                self._board.flush()

    def host_memory(self, ranks: Sequence[HostMemory], images: int) -> None:
        rank = largest(ranks)
        if not ranks[rank].total_mb:
            return
        self._scalars({"ranks/host_memory_mb": ranks[rank].total_mb, "ranks/host_memory_rank": rank}, images)
        print(f"{'memory':>11}  {describe_largest(ranks)}", flush=True)

    def image(self, tag: str, grid_HWC: np.ndarray, images: int) -> None:
        if self._board is not None:
            self._board.add_image(tag, grid_HWC, images)
            self._board.flush()

    def evaluation(self, row: dict[str, Any]) -> None:
        assert self._evaluations is not None, "opened for runs that evaluate"
        self._evaluations.add(row)
        scalars = {"validation/loss": row["validation_loss"]}
        for level, loss in enumerate(row["validation_loss_by_noise_level"]):
            scalars[f"validation_by_noise_level/noise_{(level + 0.5) / NOISE_BINS:.2f}"] = loss
        metrics = row.get("metrics", {})
        for name, value in metrics.items():
            if isinstance(value, float):
                scalars[f"metrics/{name}_{metrics['extractor']}"] = value
        self._scalars({tag: value for tag, value in scalars.items() if value is not None}, row["images"])
        print(f"{'validation':>11}  {_evaluation_line(row)}", flush=True)

    def _scalars(self, values: Mapping[str, float], images: int) -> None:
        """Write scalars to TensorBoard and the monitor; a full disk does not end the run."""
        if self._board is not None:
            for tag, value in values.items():
                self._board.add_scalar(tag, value, images)
            self._board.flush()
        if self.monitor is None:
            return
        try:
            self.monitor([(tag, value, images) for tag, value in values.items()])
            self._monitor_failed = False
        except Exception as error:  # other libraries raise errors of any kind, also for a network that is down
            if not self._monitor_failed:
                text = " ".join(str(error).split()) or type(error).__name__
                print(f"*** WARNING: {text}; dropping values of other monitors ***", file=sys.stderr, flush=True)
            self._monitor_failed = True

    def close(self) -> None:
        self.settle()
        self._rows.close()
        if self._evaluations is not None:
            self._evaluations.close()
        if self._board is not None:
            self._board.close()


def peak_memory_mb() -> float:
    """Return this process's peak memory so far in MiB: GPU memory if there is a GPU, otherwise resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _evaluation_line(row: dict[str, Any]) -> str:
    """Return the console line of an evaluation."""
    loss, metrics = row["validation_loss"], row.get("metrics")
    text = f"loss {'nan' if loss is None else f'{loss:.4f}'} on {row['validation_images']:,} held-out images"
    if metrics is None:
        return text
    values = " ".join(f"{name} {value:.4g}" for name, value in metrics.items() if isinstance(value, float))
    return f"{text} | {values or 'no finite metric'} of {metrics['n']:,} generated images by {metrics['extractor']}"


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
