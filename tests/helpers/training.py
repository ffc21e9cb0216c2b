"""Arguments and results of training runs of a tiny model."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SMALLEST_MODEL = ("model.name=nano-E4", "model.patch_size=8")
"""A model whose step of 16 images takes milliseconds."""
TINY = (
    *SMALLEST_MODEL, "run.total_images=80", "run.log_every_images=16", "ema.decay=0.9", "optimizer.lr=1e-3",
    "run.sample_every_images=0",
)  # fmt: skip
"""Five steps of that model."""


@dataclass(frozen=True)
class Trained:
    """A finished run of the command line."""

    directory: Path
    metrics: list[dict]
    output: str

    def column(self, key: str) -> list[float]:
        """Return one value per logged step."""
        return [row[key] for row in self.metrics]


def write_json(path: Path, ep: int | str, zero: int, **changes: object) -> Path:
    """Write a DeepSpeed JSON for 16 images per step and return its path; ``changes`` replace top-level keys."""
    tree = {
        "train_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": zero},
        "expert_parallel": {"autoep_size": ep},
        "tensorboard": {"enabled": False},
        **changes,
    }
    path.write_text(json.dumps(tree))
    return path


def training_arguments(
    config: Path | str | None, directory: Path | str | None, *overrides: str, options: Sequence[str] = (),
    base: Sequence[str] = TINY,
) -> list[str]:  # fmt: skip
    """Return the arguments of ``diffmoe train``.

    Args:
        config: the DeepSpeed JSON, or None for the recipe's own section.
        directory: the run directory, or None for the default.
        overrides: values for ``--set``, after those of ``base``.
        options: other options.
        base: values for ``--set`` that come first.
    """
    chosen = [] if config is None else ["--deepspeed_config", str(config)]
    if directory is not None:
        chosen += ["--run-dir", str(directory)]
    return [*chosen, *options, "--set", *base, *overrides]


def read_metrics(directory: Path, name: str = "metrics.jsonl") -> list[dict]:
    """Return the rows of a run's ``metrics.jsonl`` or ``validation.jsonl``."""
    return [json.loads(line) for line in (directory / name).read_text().splitlines()]


def wait_for_all_ranks(folder: str | Path, run: str, timeout_s: float = 120) -> None:
    """Wait until all ranks have finished a run, when one process trains several in a row.

    Then no rank serves the store of this run any more, which has the same address as that of the next one.
    """
    Path(folder, f"{run} {os.environ['RANK']}").touch()
    end = time.monotonic() + timeout_s
    while not all(Path(folder, f"{run} {rank}").exists() for rank in range(int(os.environ["WORLD_SIZE"]))):
        assert time.monotonic() < end, f"not all ranks finished {run}"
        time.sleep(0.01)
