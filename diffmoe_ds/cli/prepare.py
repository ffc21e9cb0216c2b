"""``diffmoe prepare``: shards from images, on one process or many, and a look at what is in them."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from diffmoe_ds.config.schema import DataConfig
from diffmoe_ds.data.prepare.preparation import (
    Preparation,
    begin,
    check_unreadable,
    clean,
    finish,
    write_shard,
)
from diffmoe_ds.data.sources.index_files import PARTS
from diffmoe_ds.distributed.launch import Launch, local_device, resolve_launch
from diffmoe_ds.errors import AlreadyReportedError, CheckpointError, ConfigError, DataError, DiffMoEError
from diffmoe_ds.files import write_text

LOOK_EVERY = 1.0
"""Seconds between two looks at what the other ranks have done."""
SAYING_TIME = 3.0
"""All ranks of a host find a wrong option alike and one says so, but torchrun ends it as soon as another has left."""
EXAMPLES = """examples:
  diffmoe prepare latents --images imagenet/train --vae sd-vae-ft-ema --size 256 --out latents
  torchrun --nproc_per_node 8 -m diffmoe_ds.cli prepare latents --images 'raw/shards-{000..127}.tar' \\
      --vae stabilityai/sd-vae-ft-ema --size 256 --out latents
  diffmoe prepare images --images photographs --size 64 --out shards
  diffmoe prepare check latents
"""


def add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``diffmoe prepare``."""
    kinds = parser.add_subparsers(required=True, dest="kind", metavar="latents|images|check")
    latents = kinds.add_parser("latents", help="encode images with a VAE", description="Encode images with a VAE.")
    images = kinds.add_parser("images", help="crop images", description="Crop images into shards of PNG.")
    check = kinds.add_parser("check", help="is a set whole?", description="Read a set and say what is wrong with it.")
    for sub in (latents, images):
        _add_source(sub)
        sub.add_argument("--size", type=int, default=256, help="height and width in pixels (default: %(default)s)")
    latents.add_argument("--vae", required=True, metavar="PATH|HUB_ID", help="folder or hub name of an AutoencoderKL")
    latents.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="default: %(default)s")
    latents.add_argument(
        "--batch-size", type=int, default=32, metavar="B", help="images at once (default: %(default)s)"
    )
    for sub in (latents, images):
        add_output_arguments(sub)
    check.add_argument("path", type=Path, metavar="DIR", help="directory of shards, or one shard")
    check.add_argument("--json", action="store_true", help="print one object instead of lines")


def prepare_command(args: argparse.Namespace) -> None:
    """Run ``diffmoe prepare``."""
    if args.kind == "check":
        _check(args)
        return
    prepare(args, _preparation)


def prepare(args: argparse.Namespace, make: Callable[[argparse.Namespace, Launch], Preparation]) -> None:
    """Write this rank's shards of the set that ``make`` describes; ``args`` has `add_output_arguments`' options."""
    for option in ("size", "batch_size", "shard_images", "threads", "timeout"):
        if getattr(args, option, 1) < 1:
            raise ConfigError(f"--{option.replace('_', '-')} is {getattr(args, option)}, but it must be above 0.")
    if getattr(args, "cache_gb", 1.0) <= 0:
        raise ConfigError(f"--cache-gb is {args.cache_gb:g}, but it must be above 0.")
    if not 0 <= args.max_unreadable <= 1:
        raise ConfigError(f"--max-unreadable is {args.max_unreadable}, but it is a share, from 0 to 1.")
    launch = resolve_launch()
    # A latent's last bits may depend on the number of threads, and launchers set it differently: ranks are the way
    # to use more cores.
    torch.set_num_threads(1)
    try:
        preparation = make(args, launch)
        begin(preparation)
    except DiffMoEError as error:
        if launch.local_rank == 0:
            raise
        time.sleep(SAYING_TIME)
        raise AlreadyReportedError(error.exit_code) from None
    _run(preparation, launch, args.timeout)


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images",
        required=True,
        metavar="DIR|SHARDS",
        help="DIR/CLASS/*.jpg, DIR/*.jpg (no labels), or WebDataset shards such as 'shards-{000..127}.tar'",
    )
    parser.add_argument(
        "--unlabelled", action="store_true", help="all images of DIR, however deep, or SHARDS, without labels"
    )
    parser.add_argument(
        "--cache-dir", metavar="DIR", help="where shards behind URLs are kept (default: ~/.cache/diffmoe-ds)"
    )
    parser.add_argument(
        "--cache-gb",
        type=float,
        default=DataConfig().cache_gb,
        metavar="GB",
        help="size of that folder; it must hold all shards (default: %(default)s)",
    )


def add_output_arguments(parser: argparse.ArgumentParser, out: Path | None = None) -> None:
    """The options of whatever is written, and how; ``out`` is the default directory."""
    add = parser.add_argument
    add("--out", type=Path, required=out is None, default=out, metavar="DIR", help="gets the shards and their index")
    add("--shard-images", type=int, default=4096, metavar="N", help="images of a shard (default: %(default)s)")
    add(
        "--max-unreadable",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="share of the images that may be unreadable; they are left out and listed in report.json "
        "(default: %(default)s)",
    )
    add("--threads", type=int, default=2, metavar="N", help="threads of a rank that decode (default: %(default)s)")
    add(
        "--timeout",
        type=float,
        default=1800,
        metavar="SECONDS",
        help="give up when the other ranks finish nothing for so long (default: %(default)s)",
    )


def _preparation(args: argparse.Namespace, launch: Launch) -> Preparation:
    # Only now: these import diffusers or read whole folders, which a mistyped option should not cost.
    from diffmoe_ds.data.dataset import open_source
    from diffmoe_ds.data.prepare.encoders import LatentEncoder, PixelEncoder
    from diffmoe_ds.data.sources.cache import shard_cache
    from diffmoe_ds.data.sources.shards import ShardDataset

    inside = Path(args.images).expanduser()
    if inside.is_dir() and inside.resolve() in (args.out.resolve(), *args.out.resolve().parents):
        raise ConfigError(f"--out {args.out}: lies inside --images {args.images}; give a directory outside.")
    cache = shard_cache(DataConfig(cache_dir=args.cache_dir, cache_gb=args.cache_gb))
    source = open_source(args.images, args.unlabelled, cache)
    remote = source.remote_bytes() if isinstance(source, ShardDataset) else 0
    if remote > args.cache_gb * 1e9:
        raise ConfigError(
            f"--cache-gb is {args.cache_gb:g}, but the images are mixed over the whole set, {remote / 1e9:.3g} GB of "
            "fetched shards; raise it."
        )
    if args.kind == "images":
        encoder = PixelEncoder(args.size, args.threads)
    else:
        from diffmoe_ds.data.vae import VAE

        encoder = LatentEncoder(
            VAE(args.vae, local_device(launch)), args.size, args.dtype, args.batch_size, args.threads
        )
    return Preparation(source, encoder, args.out, args.shard_images, args.max_unreadable)


def _run(preparation: Preparation, launch: Launch, timeout: float) -> None:
    """This rank's shards; on rank 0 also the bar, and the end when all have done theirs."""
    lost, report = preparation.lost(), None
    try:
        if not preparation.is_finished():
            report = _work(preparation, launch, timeout)
    except CheckpointError:  # another launch may have finished the set, and removed what this one was writing
        if not preparation.is_finished():
            raise
    if preparation.is_finished():
        clean(preparation)
    if launch.rank:
        return
    if report is None:
        how = f"again, {len(lost)} shard(s) were made anew" if lost else "already"
        print(f"{preparation.out} is complete {how}")
        return
    print(f"{preparation.out}: {report['stored']:,} samples in {preparation.shards} shards")
    if report["skipped"]:
        print(f"{len(report['skipped']):,} images could not be read, see {preparation.out / 'report.json'}")


def _work(preparation: Preparation, launch: Launch, timeout: float) -> dict[str, Any] | None:
    """Write shards, and on rank 0 wait for those of the others; returns the report of the set that rank 0 finished."""
    is_main = launch.rank == 0
    note = preparation.out / PARTS / f"failed-{launch.rank:05d}"
    if is_main:
        for old in note.parent.glob("failed-*"):  # of an earlier start
            old.unlink(missing_ok=True)
    with tqdm(total=len(preparation.source), unit="image", desc="prepare", disable=not is_main) as bar:
        overview = _Overview(preparation, launch, bar, timeout)
        unreadable = 0
        try:
            for shard in overview.mine():
                unreadable += write_shard(preparation, shard, overview.advance)
                check_unreadable(preparation, unreadable)
        except DiffMoEError as error:
            with contextlib.suppress(CheckpointError):  # on a full disk, report the first error
                write_text(note, str(error))
            raise
        if not is_main:
            return None
        overview.wait()
    return None if preparation.is_finished() else finish(preparation)


class _Overview:
    """What all ranks have done, as the records say; only rank 0 looks."""

    def __init__(self, preparation: Preparation, launch: Launch, bar: tqdm, timeout: float):
        self._preparation = preparation
        self._launch = launch
        self._bar = bar
        self._timeout = timeout
        self._missing = preparation.missing()
        self._own = 0
        self._looked = self._changed = time.monotonic()
        bar.initial = bar.n = len(preparation.source) - self._images(self._missing)

    def mine(self) -> list[int]:
        """The shards that this rank has to write: every world-th, of those that are not done."""
        return [shard for shard in sorted(self._missing) if shard % self._launch.world == self._launch.rank]

    def advance(self, images: int) -> None:
        """So many more images went into this rank's present shard."""
        self._own += images
        if self._launch.rank == 0 and time.monotonic() > self._looked + LOOK_EVERY:
            self._look()

    def wait(self) -> None:
        """Until every shard is done; raises ``DataError`` if another rank has failed or nothing happens any more."""
        self._look()
        self._changed = time.monotonic()
        while self._missing:
            time.sleep(LOOK_EVERY / 4)
            self._look()
            if self._missing and time.monotonic() > self._changed + self._timeout:
                ranks = sorted({shard % self._launch.world for shard in self._missing})
                raise DataError(
                    f"rank(s) {', '.join(map(str, ranks))} finished nothing for {self._timeout:g} s, and "
                    f"{len(self._missing)} of {self._preparation.shards} shards are missing in "
                    f"{self._preparation.out}; start again to continue"
                )

    def _look(self) -> None:
        now, parts = time.monotonic(), self._preparation.out / PARTS
        if not parts.is_dir():
            raise CheckpointError(f"{parts}: was removed, perhaps by another launch; start again to continue.")
        missing = {shard for shard in self._missing if not self._preparation.is_done(shard)}
        if len(missing) < len(self._missing):
            self._changed = now
        others = [s for s in self._missing - missing if s % self._launch.world != self._launch.rank]
        self._bar.update(self._own + self._images(others))
        self._own, self._missing, self._looked = 0, missing, now
        for note in parts.glob("failed-*"):
            rank = int(note.name.removeprefix("failed-"))
            with contextlib.suppress(FileNotFoundError):
                if rank != self._launch.rank:
                    raise DataError(f"rank {rank} has stopped: {note.read_text(encoding='utf-8')}")

    def _images(self, shards: Sequence[int] | set[int]) -> int:
        return sum(len(self._preparation.images(shard)) for shard in shards)


def _check(args: argparse.Namespace) -> None:
    from diffmoe_ds.data.prepare.verify import check_set, report_lines

    with tqdm(unit="shard", desc="check", disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = check_set(args.path, progress)
    print(json.dumps(report) if args.json else report_lines(report))
    problems = report["problems"]
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise DataError(f"{args.path} is not whole: {problems[0]}{more}")
