"""What a run tells about itself: ``metrics.jsonl``, TensorBoard and a line now and then.  Rank 0 only.

Legend: L MoE layers, E experts, N noise-level bins.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from diffmoe_ds.distributed.stragglers import Comparison
from diffmoe_ds.model.dit import DiT
from diffmoe_ds.moe.layer import Routing
from diffmoe_ds.training.logs import Board, RowFile

NOISE_BINS = 10
"""Bins of the noise level, from 0 (clean) to 1 (pure noise)."""
SPEED_STEPS = 50
"""Steps over which the speed of the log line and its ETA are averaged."""


@dataclass(frozen=True)
class RoutingReport:
    """How one micro-batch over all ranks was routed."""

    load_LE: Tensor
    """Rows of each expert over the mean of its layer; 1 is balanced."""
    taken_LT: Tensor
    """Share of tokens that 0, 1, ... E experts took, [L, E + 1]."""
    capacity_LN: Tensor
    """Mean number of experts per token of images by noise level; NaN where no image was."""


@torch.no_grad()
def routing_report(routings: tuple[Routing, ...], noise_level_B: Tensor) -> RoutingReport:
    """Count what was routed, over all ranks; a collective, so every rank must call."""
    images, experts = len(noise_level_B), routings[0].mask_TE.shape[1]
    bin_B = (noise_level_B * NOISE_BINS).long().clamp(0, NOISE_BINS - 1)
    layers = []
    for routing in routings:
        taken_T = routing.mask_TE.sum(1)
        rows_E = routing.mask_TE.sum(0).double()
        taken = torch.bincount(taken_T, minlength=experts + 1).double()
        per_image_B = taken_T.view(images, -1).double().mean(1)
        sums_N = torch.zeros(NOISE_BINS, dtype=torch.float64, device=rows_E.device).index_add_(0, bin_B, per_image_B)
        counts_N = torch.bincount(bin_B, minlength=NOISE_BINS).double()
        layers.append(torch.cat([rows_E, taken, sums_N, counts_N]))
    counts = torch.stack(layers)
    dist.all_reduce(counts)
    rows_LE, taken_LT, sums_LN, counts_LN = counts.cpu().split([experts, experts + 1, NOISE_BINS, NOISE_BINS], dim=1)
    return RoutingReport(
        load_LE=rows_LE / rows_LE.mean(1, keepdim=True),
        taken_LT=taken_LT / taken_LT.sum(1, keepdim=True),
        capacity_LN=sums_LN / counts_LN,
    )


class MetricsWriter:
    """Writes the metrics of rank 0; the other ranks have none."""

    def __init__(
        self,
        directory: Path,
        tensorboard_dir: Path | None,
        images: int,
        step: int,
        total_images: int,
        guard: Callable[[], None],
    ) -> None:
        """Open the files; what an earlier attempt wrote after the step that this one starts from is dropped.

        Args:
            directory: the run's directory.
            tensorboard_dir: where TensorBoard's files go; none writes none.
            images: images seen so far.
            step: steps made so far.
            total_images: images of the whole run, for the ETA.
            guard: called before a step is recorded; raises if the directory is no longer this run's.
        """
        self._rows = RowFile(directory / "metrics.jsonl", step)
        self._board = None if tensorboard_dir is None else Board(tensorboard_dir, images)
        self._total = total_images
        self._guard = guard
        self._recent: deque[tuple[float, int]] = deque([(time.perf_counter(), images)], maxlen=SPEED_STEPS + 1)
        self._since_line: list[dict[str, Any]] = []

    def step(self, row: dict[str, Any]) -> None:
        """Record one optimizer step; ``images_per_s`` is that of this step alone."""
        self._guard()
        last_time, last_images = self._recent[-1]
        now = time.perf_counter()
        self._recent.append((now, row["images"]))
        row["images_per_s"] = round((row["images"] - last_images) / max(now - last_time, 1e-9), 2)
        row["peak_memory_mb"] = round(peak_memory_mb(), 1)
        self._rows.add(row)
        self._since_line.append(row)

    def pause(self) -> None:
        """Time passed that was not training (a checkpoint, a sample grid): leave it out of the speed."""
        images = self._recent[-1][1]
        self._recent.clear()
        self._recent.append((time.perf_counter(), images))

    def line(self) -> str:
        """One readable line about the steps since the last line, also written to TensorBoard."""
        rows = self._since_line
        means = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0] if key not in ("step", "images")}
        last = rows[-1]
        self._since_line = []
        (first_time, first_images), (last_time, last_images) = self._recent[0], self._recent[-1]
        speed = (last_images - first_images) / max(last_time - first_time, 1e-9)
        if last_images == first_images:
            speed = means["images_per_s"]
        if self._board is not None:
            for key, value in {**means, "images_per_s": speed}.items():
                group = "loss" if key.endswith("loss") else "train"
                self._board.add_scalar(f"{group}/{key}", value, last["images"])
            self._board.flush()
        left = max(self._total - last["images"], 0) / speed
        parts = " ".join(f"{key.removesuffix('_loss')} {means[key]:.4f}" for key in means if key.endswith("_loss"))
        return (
            f"{last['images']:>11,} of {self._total:,} images | loss {means['loss']:.4f} ({parts}) | "
            f"grad {means['grad_norm']:.3f} | lr {last['lr']:.2e} | {speed:,.0f} images/s | "
            f"{last['peak_memory_mb']:,.0f} MB | ETA {_clock(left)}"
        )

    def routing(self, report: RoutingReport, model: DiT, images: int) -> None:
        """Per MoE layer: load per expert, tokens per number of experts, capacity by noise level, thresholds."""
        if self._board is None:
            return
        for number, (index, layer) in enumerate(model.moe_layers().items()):
            block = f"block_{index:02d}"
            self._board.add_histogram(f"load/{block}", report.load_LE[number], images)
            for expert, load in enumerate(report.load_LE[number].tolist()):
                self._board.add_scalar(f"load_per_expert/{block}/expert_{expert:02d}", load, images)
            for taken, share in enumerate(report.taken_LT[number].tolist()):
                self._board.add_scalar(f"tokens_by_experts_taken/{block}/experts_{taken:02d}", share, images)
            for level, capacity in enumerate(report.capacity_LN[number].tolist()):
                if capacity == capacity:  # a bin without images is NaN
                    middle = (level + 0.5) / NOISE_BINS
                    self._board.add_scalar(f"capacity_by_noise_level/{block}/noise_{middle:.2f}", capacity, images)
            if layer.capacity_predictor is not None:
                self._board.add_histogram(f"thresholds/{block}", layer.expert_threshold, images)
                for expert, threshold in enumerate(layer.expert_threshold.tolist()):
                    self._board.add_scalar(f"threshold/{block}/expert_{expert:02d}", threshold, images)

    def compared(self, ranks: Comparison, images: int) -> None:
        """The slowest rank against the others; said aloud when it is a straggler."""
        if self._board is not None:
            self._board.add_scalar("ranks/slowest_over_others", ranks.ratio, images)
            self._board.add_scalar("ranks/slowest_rank", ranks.rank, images)
        if ranks.is_straggler:
            print(f"{'straggler':>11}  {ranks}", flush=True)
            if self._board is not None:
                self._board.add_text("ranks/straggler", str(ranks), images)

    def image(self, tag: str, grid_HWC: Any, images: int) -> None:
        """A picture for TensorBoard, uint8."""
        if self._board is not None:
            self._board.add_image(tag, grid_HWC, images)

    def close(self) -> None:
        """Flush and close the files."""
        self._rows.close()
        if self._board is not None:
            self._board.close()


def peak_memory_mb() -> float:
    """Peak memory of this process so far in MiB: of the GPU if there is one, otherwise resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
