"""Benchmark of the loader on prepared latents, against a WebDataset pipeline and a torch DataLoader over .npz files.

All read the same latents (4x32x32 with their mirror images, fp16), pick an orientation at random, sample the posterior
and return fp32 batches, with the same number of worker processes. They alternate in one process, and medians are
compared. Our loader uses one random stream per image, the others torch's generator. Our loader also draws the noise,
time and label dropout of training, so it has two rows: "reading" leaves these out for a fair comparison, "training" is
what a run uses.

    python -m benchmarks.data --json --workers 2 --samples 20000
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import webdataset

from diffmoe_ds.cli import run_command
from diffmoe_ds.cli.arguments import require_positive
from diffmoe_ds.data.loader import LoaderSettings, PositionLoader
from diffmoe_ds.data.sources.index_files import save_index
from diffmoe_ds.data.sources.latents import FORMAT_MEMBER, LatentFormat
from diffmoe_ds.data.sources.shard_paths import expand
from diffmoe_ds.data.sources.shards import ShardDataset
from diffmoe_ds.data.sources.tar_index import join, scan
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.files import write_tar
from diffmoe_ds.rng import Purpose, TrainingDraws, philox, posterior_noise, training_draws

SHARD_SAMPLES = 2048
CLASSES = 1000
FORMAT = LatentFormat(4, 32, 256, "float16", 0.18215, 0.0, "0" * 64)
WARM_UP_BATCHES = 20
MEASURED_BATCHES = 20
"""Minimum; with fewer, most batches would come from the prefetch queue."""
MEMORY_LOOKS = 20
OURS, OURS_TRAINING = "diffmoe (reading)", "diffmoe (training)"
WEBDATASET, FILES = "webdataset pipeline", "DataLoader, one .npz per image"


def bench_data(
    *, samples: int, workers: int, batch_size: int, rounds: int, memory_samples: int, folder: Path | None
) -> dict[str, Any]:
    """Measure the throughput of each loader, and the memory of ours over many samples.

    Args:
        samples: number of latents to create.
        workers: loader processes.
        batch_size: samples per batch.
        rounds: rounds that alternate between the loaders; medians are reported.
        memory_samples: number of samples to read while memory is measured.
        folder: where to create the datasets; None uses the system's temporary directory.

    Returns:
        A JSON-serializable report. A megabyte is 10^6 bytes of the part of a stored latent that is used: one
        orientation, mean and log-variance, 16 KiB.
    """
    with tempfile.TemporaryDirectory(dir=folder) as made:
        shards, files = Path(made) / "shards", Path(made) / "files"
        _make_sets(shards, files, samples)
        loaders: dict[str, Callable[[], Iterable[Any]]] = {
            OURS: partial(_ours, shards, workers, batch_size, _reading_draws),
            OURS_TRAINING: partial(
                _ours, shards, workers, batch_size,
                partial(training_draws, 0, shape=FORMAT.shape, label_dropout=0.1, posterior=True),
            ),
            WEBDATASET: partial(_webdataset, shards, workers, batch_size),
            FILES: partial(_files, files, workers, batch_size),
        }  # fmt: skip
        speeds: dict[str, list[float]] = {name: [] for name in loaders}
        for _ in range(rounds):
            for name, make in loaders.items():
                speeds[name].append(_speed(iter(make()), samples // batch_size - WARM_UP_BATCHES, batch_size))
        memory = _memory(loaders[OURS_TRAINING], memory_samples, batch_size)
    settings = {"samples": samples, "workers": workers, "batch_size": batch_size, "rounds": rounds}
    return {**settings, **_summarize(speeds), "memory": memory}


def _summarize(speeds: dict[str, list[float]]) -> dict[str, Any]:
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    return {
        "loaders": {
            name: {"samples_per_s": speed, "mb_per_s": speed * FORMAT.half_bytes / 1e6, "rounds": speeds[name]}
            for name, speed in medians.items()
        },
        "ratios": {
            f"{ours} / {other}": medians[ours] / medians[other]
            for ours in (OURS, OURS_TRAINING)
            for other in (WEBDATASET, FILES)
        },
    }


def _make_sets(shards: Path, files: Path, samples: int) -> None:
    """Write the same latents as indexed shards and as one file per image."""
    shards.mkdir()
    files.mkdir()
    generator = np.random.default_rng(0)
    index = []
    for shard in range(-(-samples // SHARD_SAMPLES)):
        members = [(FORMAT_MEMBER, json.dumps(FORMAT.to_json()).encode())]
        for number in range(shard * SHARD_SAMPLES, min((shard + 1) * SHARD_SAMPLES, samples)):
            moments = generator.standard_normal((2, 2, *FORMAT.shape), np.float32)
            moments[:, 1] -= 5
            moments = moments.astype(np.float16)
            label = number % CLASSES
            members += [(f"{number:07d}.npy", FORMAT.encode(moments)), (f"{number:07d}.cls", b"%d" % label)]
            np.savez(files / f"{number:07d}.npz", moments=moments, label=label)
        path = shards / f"shards-{shard:05d}.tar"
        write_tar(path, members)
        with open(path, "rb") as file:
            index.append(scan(path.name, file, path.stat().st_size))
    save_index(join(index), shards)


def _speed(batches: Iterator[Any], count: int, batch_size: int) -> float:
    """Return samples per second over ``count`` batches, after a warm-up."""
    for _ in range(WARM_UP_BATCHES):
        next(batches)
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count * batch_size / (time.perf_counter() - start)


def _memory(make: Callable[[], Iterable[Any]], samples: int, batch_size: int) -> dict[str, Any]:
    """Measure the memory of this process and its workers while ``samples`` samples are read.

    Anonymous and shared memory count, with each shared page counted once. Mapped files, such as torch's libraries, do
    not count, because the system can reclaim their pages.
    """
    batches, looks = iter(make()), []
    for _ in range(MEMORY_LOOKS):
        for _ in range(max(1, samples // batch_size // MEMORY_LOOKS)):
            next(batches)
        me = psutil.Process()
        looks.append(sum(_own_mb(process.pid) for process in (me, *me.children(recursive=True))))
    return {
        "samples": samples,
        "first_mb": looks[MEMORY_LOOKS // 10],
        "last_mb": looks[-1],
        "peak_mb": max(looks),
        "looks_mb": [round(look, 1) for look in looks],
    }


def _own_mb(pid: int) -> float:
    """Return the proportional set size of a process: a page shared by n processes counts as 1/n."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {name: int(size.split()[0]) for name, _, size in (line.partition(":") for line in lines)}
    return (sizes["Pss_Anon"] + sizes["Pss_Shmem"]) * 1024 / 1e6


def _ours(shards: Path, workers: int, batch_size: int, draws: Callable[[int], TrainingDraws]) -> PositionLoader:
    settings = LoaderSettings(
        seed=0, global_batch=batch_size, micro_batch=batch_size, accumulation=1, rank=0, world=1,
        image_shape=FORMAT.shape, num_classes=CLASSES, num_workers=workers, shuffle="feistel",
    )  # fmt: skip
    return PositionLoader(ShardDataset(expand(shards)), settings, draws)


def _reading_draws(position: int) -> TrainingDraws:
    """Draw only the orientation and the posterior sample, still from one stream per image."""
    bits = philox(0, Purpose.TRAINING, position)
    flip = bool(bits.random_raw() & 1)
    return TrainingDraws(flip, False, 0.0, _NOTHING, posterior_noise(bits, FORMAT.shape))


_NOTHING = np.empty(0, np.float32)


def _decode(moments: np.ndarray) -> np.ndarray:
    """Return one image as fp32 [C, H, W] from fp16 [2, 2, C, H, W], with the same operations as our loader."""
    half = moments[int(torch.rand(()) < 0.5)].astype(np.float32)
    noise = torch.randn(FORMAT.shape).numpy()
    latent: np.ndarray = (half[0] + np.exp(0.5 * half[1]) * noise) * np.float32(FORMAT.scaling_factor)
    return latent


def _webdataset(shards: Path, workers: int, batch_size: int) -> Iterable[Any]:
    """Build a pipeline whose workers split the shards, shuffle in a buffer, decode and batch."""

    def sample(fields: tuple[bytes, bytes]) -> tuple[np.ndarray, int]:
        data, label = fields
        moments = np.frombuffer(data, np.float16, offset=len(FORMAT.header)).reshape(2, 2, *FORMAT.shape)
        return _decode(moments), int(label)

    dataset = (
        webdataset.WebDataset(expand(shards), shardshuffle=100, nodesplitter=None, empty_check=False)
        .repeat()
        .shuffle(1000)
        .to_tuple("npy", "cls")
        .map(sample)
        .batched(batch_size)
    )
    loader: Iterable[Any] = webdataset.WebLoader(dataset, batch_size=None, num_workers=workers)
    return loader


class _NpzFiles(torch.utils.data.Dataset[tuple[np.ndarray, int]]):
    def __init__(self, folder: Path) -> None:
        self._paths = sorted(str(path) for path in folder.iterdir())

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        with np.load(self._paths[index]) as file:
            return _decode(file["moments"]), int(file["label"])


def _files(folder: Path, workers: int, batch_size: int) -> Iterable[Any]:
    loader = torch.utils.data.DataLoader(
        _NpzFiles(folder), batch_size=batch_size, shuffle=True, num_workers=workers, drop_last=True
    )
    while True:
        yield from loader


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the results and return the exit code."""
    parser = argparse.ArgumentParser(description="Compare the loader with WebDataset's and torch's.")
    add = parser.add_argument
    add("--samples", type=int, default=20_000, metavar="N", help="number of latents (default: %(default)s)")
    add("--workers", type=int, default=2, metavar="N", help="worker processes of each loader (default: %(default)s)")
    add("--batch-size", type=int, default=32, metavar="B", help="default: %(default)s")
    add(
        "--rounds",
        type=int,
        default=5,
        metavar="R",
        help="alternating rounds (default: %(default)s)",
    )
    add(
        "--memory-samples",
        type=int,
        default=200_000,
        metavar="N",
        help="samples to read for memory (default: %(default)s)",
    )
    add("--folder", type=Path, metavar="DIR", help="where to create the datasets (default: a temporary directory)")
    add("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run)
    return run_command(parser.parse_args(argv))


def _run(args: argparse.Namespace) -> None:
    require_positive(args, "samples", "workers", "batch_size", "rounds")
    if args.folder is not None and not args.folder.is_dir():
        raise ConfigError(f"--folder {args.folder} is not a directory; create it, or omit --folder.")
    needed = (WARM_UP_BATCHES + MEASURED_BATCHES) * args.batch_size
    if args.samples < needed:
        raise ConfigError(
            f"--samples must be at least {needed} with --batch-size {args.batch_size}, got {args.samples}: "
            f"{WARM_UP_BATCHES} batches warm up and {MEASURED_BATCHES} are measured."
        )
    report = bench_data(
        samples=args.samples,
        workers=args.workers,
        batch_size=args.batch_size,
        rounds=args.rounds,
        memory_samples=args.memory_samples,
        folder=args.folder,
    )
    print(json.dumps(report) if args.json else _lines(report))


def _lines(report: dict[str, Any]) -> str:
    lines = [f"{report['samples']:,} latents 4x32x32 with mirror images, batches of {report['batch_size']}, "
             f"{report['workers']} worker(s), medians of {report['rounds']} rounds"]  # fmt: skip
    for name, row in report["loaders"].items():
        lines.append(f"  {name:<34} {row['samples_per_s']:>9,.0f} samples/s {row['mb_per_s']:>8.1f} MB/s")
    lines += [f"  {name:<34} {value:.2f}x" for name, value in report["ratios"].items()]
    memory = report["memory"]
    lines.append(
        f"  memory of the loader processes over {memory['samples']:,} samples: {memory['first_mb']:.1f} MB after the "
        f"first tenth, {memory['last_mb']:.1f} MB at the end, peak {memory['peak_mb']:.1f} MB"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
