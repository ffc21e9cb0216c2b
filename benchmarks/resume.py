"""Benchmark of a resume: files opened, bytes read and exchanged, and memory of one rank of many, against the plan.

    python -m benchmarks.resume --model L-E8 --ranks 1024 --ep 8 --zero 3

Writes a checkpoint as that many ranks would, with sparse files: headers, metadata and manifest are real, all weights
are 0 and take no space. Then a new process resumes as one of the ranks, with the code of a training run. Its
collectives return at once (a fake process group), except that it gets the index of the files of the other ranks.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.models import RECIPE
from diffmoe_ds.checkpoint import restore
from diffmoe_ds.checkpoint.layout import (
    BUFFER,
    LATEST,
    META,
    checkpoint_name,
    checkpoint_root,
    fragment_key,
    rank_file,
)
from diffmoe_ds.checkpoint.load import CheckpointReader
from diffmoe_ds.checkpoint.metadata import CheckpointMetadata, ScheduledValues, write_manifest
from diffmoe_ds.checkpoint.pieces import COLUMNS
from diffmoe_ds.cli import run_command
from diffmoe_ds.cli.arguments import require_positive
from diffmoe_ds.config.deepspeed_keys import MOMENTS
from diffmoe_ds.config.load import load_config
from diffmoe_ds.distributed import deepspeed_seam as seam
from diffmoe_ds.distributed.fake import fake_ranks
from diffmoe_ds.distributed.fragments import Fragment
from diffmoe_ds.distributed.launch import Launch
from diffmoe_ds.distributed.quiet import quiet_deepspeed
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.files import Digest, sha256_of, write_json
from diffmoe_ds.model.dit import DiT, allocate, empty_model, saved_buffers
from diffmoe_ds.moe.layer import MoELayer
from diffmoe_ds.planning.counting import Counter
from diffmoe_ds.planning.layout import Group, Layout, LayoutRequest, resolve_layout
from diffmoe_ds.planning.resume import resume_cost
from diffmoe_ds.topology import Topology
from diffmoe_ds.training.plan import TrainPlan
from diffmoe_ds.training.resume import agree_on_checkpoint

IMAGES = 1_000_000
"""Images that the checkpoint was trained on."""
CPU = torch.device("cpu")
QUANTITIES = {
    "opens": ("files and directories opened", 1),
    "read": ("MB read", 1e6),
    "exchanged": ("MB exchanged", 1e6),
    "host_memory": ("MB of host memory besides weights and state", 1e6),
}
"""What is planned and measured: label and unit."""


def layout_of(args: argparse.Namespace) -> Layout:
    """Return the layout that the command line describes."""
    config = load_config(RECIPE, [f"model.name={args.model}", *args.overrides])
    request = LayoutRequest(args.ranks, min(8, args.ranks), args.ep, args.zero, 4, 1, True)
    return resolve_layout(request, config, config.deepspeed, RECIPE)


def saved_by(layout: Layout, names: Sequence[str], rank: int) -> list[tuple[str, int, int]]:
    """Return what a rank saves at ZeRO 1 to 3: (parameter, first element in the logical tensor, elements)."""
    ep_size = layout.settings.ep_size
    ep_rank, replica = rank % ep_size, rank // ep_size
    found = []
    for name, parameter, (group, begin) in zip(names, layout.parameters, flat_places(layout), strict=True):
        index = replica if parameter.is_expert else rank
        if layout.settings.zero_stage == 3:
            share = -(-parameter.numel // group.ranks)
            low = index * share
        else:
            share = group.partition
            low = index * share - begin
        high = min(low + share, parameter.numel)
        low = max(low, 0)
        if low < high:
            first = ep_rank * parameter.numel if parameter.is_expert else 0
            found.append((name, first + low, high - low))
    return found


def flat_places(layout: Layout) -> list[tuple[Group, int]]:
    """Return the group of every parameter, and its first element in the flat tensor of the group."""
    places = {False: _places(layout, False), True: _places(layout, True)}
    return [next(places[parameter.is_expert]) for parameter in layout.parameters]


def _places(layout: Layout, expert: bool) -> Iterator[tuple[Group, int]]:
    for group in layout.groups:
        begin = 0
        for parameter in group.parameters if group.is_expert is expert else ():
            yield group, begin
            begin += parameter.numel


def write_checkpoint(layout: Layout, run_directory: Path, rank: int) -> Path:
    """Write a checkpoint of sparse files.

    Args:
        layout: the ranks that save it.
        run_directory: the run's directory.
        rank: whose file has its checksum in the manifest; computing those of all takes long.
    """
    path = checkpoint_root(run_directory) / checkpoint_name(IMAGES)
    path.mkdir(parents=True)
    model = empty_model(layout.config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    buffers = {name: buffer.numel() for name, buffer in saved_buffers(model).items()}
    names = list(shapes)
    kinds = ("fp32", *MOMENTS[layout.settings.json["optimizer"]["type"]], "ema")
    digests = {}
    for number in range(layout.world):
        tensors = {
            fragment_key(kind, name, start): numel
            for name, start, numel in saved_by(layout, names, number)
            for kind in kinds
        }
        if number == 0:
            tensors |= {fragment_key(BUFFER, name, 0): numel for name, numel in buffers.items()}
        size = _write_sparse(path / rank_file(number), tensors)
        sha256 = sha256_of(path / rank_file(number)) if number == rank else "0" * 64
        digests[rank_file(number)] = Digest(size, sha256)
    now = ScheduledValues(1e-4, (0.9, 0.999))
    metadata = CheckpointMetadata(layout.world, IMAGES, 1000, 1000, shapes, layout.config, now)
    digests[META] = write_json(path / META, metadata.to_json())
    write_manifest(path, digests)
    (path.parent / LATEST).write_text(f"{path.name}\n", encoding="utf-8")
    return path


def _write_sparse(path: Path, tensors: dict[str, int]) -> int:
    """Write a safetensors file of flat fp32 tensors of zeros, and return its size."""
    header, offset = {}, 0
    for key, numel in tensors.items():
        header[key] = {"dtype": "F32", "shape": [numel], "data_offsets": [offset, offset + 4 * numel]}
        offset += 4 * numel
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return 8 + len(text) + offset


def gathered_rows(path: Path, world: int) -> list[Tensor]:
    """Return what every rank would tell the others about its files, padded as in `restore.share_index`."""
    reader = CheckpointReader(path)
    every = [reader.scan(range(rank, reader.metadata.files, world)) for rank in range(world)]
    reader.close()
    padded = np.full((world, max(map(len, every)), COLUMNS), -1, dtype=np.int64)
    for rank, rows in enumerate(every):
        padded[rank, : len(rows)] = rows
    return list(torch.from_numpy(padded))


class Opens:
    """Counts what this process opens below a directory."""

    def __init__(self, directory: Path) -> None:
        """Start counting, for the rest of the process."""
        self.count = 0
        self._directory: str | None = str(directory)
        sys.addaudithook(self._hook)

    def stop(self) -> None:
        """Stop counting."""
        self._directory = None

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._directory is not None and event in ("open", "os.listdir", "os.scandir"):
            self.count += str(arguments[0]).startswith(self._directory)


def measure(layout: Layout, run_directory: Path, rank: int, rows: list[Tensor]) -> dict[str, int]:
    """Resume as one rank and return what `resume_cost` plans, measured.

    Args:
        layout: the ranks, the same as those that saved.
        run_directory: of `write_checkpoint`.
        rank: the one to be.
        rows: of `gathered_rows`.
    """
    settings, config, directory = layout.settings, layout.config, checkpoint_root(run_directory)
    topology = Topology(rank, layout.world, settings.ep_size, config.num_experts)
    with torch.device("meta"):
        model = DiT(config, partial(MoELayer, num_local_experts=topology.num_local_experts))
    allocate(model, CPU)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()  # so that its memory is not counted later
    names = [name for name, _ in model.named_parameters()]
    moments = MOMENTS[settings.json["optimizer"]["type"]]
    fragments, ema = [], []
    for name, start, numel in saved_by(layout, names, rank):
        fp32, averaged, *others = torch.zeros(2 + len(moments), numel)
        fragments.append(Fragment(name, 0, start, fp32, dict(zip(moments, others, strict=True)), True))
        ema.append(averaged)
    launch = Launch(rank, layout.world, rank % layout.local_world, layout.local_world, "benchmark")
    plan = TrainPlan(launch, config, settings, run_directory, "auto", cast(Any, None))
    engine = cast(Any, SimpleNamespace(
        device=CPU, lr_scheduler=None, zero_optimization_stage=lambda: settings.zero_stage,
        optimizer=SimpleNamespace(param_groups=[], fp32_partitioned_groups_flat=[]),
    ))  # fmt: skip
    with simulated(topology, rows), Counter() as counter:
        opens, before, memory = Opens(directory), _bytes_read(), _reset_peak()
        plan = plan.with_start().with_start()  # before and after the ranks join
        plan = plan.with_checkpoint(agree_on_checkpoint(plan.choices, run_directory, CPU))
        reader = plan.reader
        assert reader is not None
        restore.share_index(reader, CPU)
        restore.restore_model(model, reader, topology, "fp32", CPU)
        restore.restore_engine(engine, reader, fragments, ema, {})
        reader.close()
        opens.stop()
    exchanged = sum(traffic.bytes for traffic in counter.collectives.values())
    return {
        "opens": opens.count,
        "read": _bytes_read() - before,
        "exchanged": exchanged,
        "host_memory": _peak() - memory,
    }


@contextmanager
def simulated(topology: Topology, rows: list[Tensor]) -> Iterator[None]:
    """Be a rank whose collectives return at once, and which gets these rows in its one all-gather."""
    own = rows[topology.rank]

    def all_gather(tensor: Tensor) -> list[Tensor]:
        assert torch.equal(tensor, own[: len(tensor)]), "the rank's own part of the index"
        found = [torch.empty_like(own) for _ in rows]
        dist.all_gather(found, own)
        for out, row in zip(found, rows, strict=True):
            out.copy_(row)
        return found

    with fake_ranks(topology):
        replicas = dist.new_group(list(range(topology.ep_rank, topology.world, topology.ep_size)), backend="fake")
        with (
            mock.patch.object(restore, "all_gather", all_gather),
            mock.patch.object(seam, "expert_parallel_group", lambda *_, **__: replicas),
        ):
            yield


def _bytes_read() -> int:
    """Return the bytes that this process has read from files so far."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text(encoding="utf-8").splitlines())
    return int(fields["rchar"])


def _reset_peak() -> int:
    """Start a new peak of this process's memory, and return what it is now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _peak()


def _peak() -> int:
    """Return the peak of this process's resident memory in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def main(argv: Sequence[str] | None = None) -> int:
    """Write the checkpoint, resume from it in a new process, print the comparison and return the exit code."""
    parser = argparse.ArgumentParser(description="Measure what a resume costs one rank of many, against the plan.")
    add = parser.add_argument
    add("--model", default="L-E8", metavar="NAME", help="model.name (default: %(default)s)")
    add("--set", dest="overrides", metavar="a.b=c", nargs="+", action="extend", default=[], help="override recipe keys")
    add("--ranks", type=int, default=1024, metavar="W", help="ranks that saved, and resume (default: %(default)s)")
    add("--ep", type=int, default=8, metavar="P", help="expert-parallel size (default: %(default)s)")
    add("--zero", type=int, choices=(1, 2, 3), default=3, metavar="Z", help="ZeRO stage (default: %(default)s)")
    add("--rank", type=int, default=0, metavar="R", help="the rank to measure (default: %(default)s)")
    add("--folder", type=Path, metavar="DIR", help="directory for the checkpoint (default: temporary)")
    add("--json", action="store_true", help="print one JSON object")
    add("--measure", type=Path, help=argparse.SUPPRESS)  # the process that resumes
    parser.set_defaults(argv=list(sys.argv[1:] if argv is None else argv))
    args = parser.parse_args(argv)
    args.run = _run if args.measure is None else _measure
    return run_command(args)


def _run(args: argparse.Namespace) -> None:
    require_positive(args, "ranks", "ep")
    if not 0 <= args.rank < args.ranks:
        raise ConfigError(f"--rank must be from 0 to {args.ranks - 1}, got {args.rank}.")
    layout = layout_of(args)
    with tempfile.TemporaryDirectory(dir=args.folder) as made:
        path = write_checkpoint(layout, Path(made, "run"), args.rank)
        np.save(Path(made, "rows.npy"), torch.stack(gathered_rows(path, layout.world)).numpy())
        command = [sys.executable, "-m", "benchmarks.resume", *args.argv, "--measure", made]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise ConfigError(f"the process that resumes failed with exit code {done.returncode}.")
    planned, measured = asdict(resume_cost(layout)), json.loads(done.stdout.splitlines()[-1])
    found = {name: {"planned": planned[name], "measured": measured[name]} for name in QUANTITIES}
    if args.json:
        print(json.dumps(found))
        return
    print(f"{args.model}, rank {args.rank} of {args.ranks:,}, ep {args.ep}, ZeRO {args.zero}")
    print(f"  {'':<46}{'planned':>12}{'measured':>12}")
    for name, (label, unit) in QUANTITIES.items():
        print(f"  {label:<46}{planned[name] / unit:>12,.6g}{measured[name] / unit:>12,.6g}")


def _measure(args: argparse.Namespace) -> None:
    quiet_deepspeed()
    layout = layout_of(args)
    rows = list(torch.from_numpy(np.load(args.measure / "rows.npy")))
    print(json.dumps(measure(layout, args.measure / "run", args.rank, rows)))


if __name__ == "__main__":
    sys.exit(main())
