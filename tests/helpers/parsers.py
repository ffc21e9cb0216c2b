"""Every parser of files that someone else may have written, as a table for the tests of hostile input.

Each entry writes valid files into a directory and names the one to replace; `parse` then reads what a command would.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml

from diffmoe_ds.checkpoint.description import Description
from diffmoe_ds.checkpoint.export import open_weights, write_model
from diffmoe_ds.checkpoint.load import CheckpointReader
from diffmoe_ds.checkpoint.metadata import CheckpointMetadata, ScheduledValues, read_metadata, write_manifest
from diffmoe_ds.checkpoint.reference_weights import read_reference
from diffmoe_ds.checkpoint.reference_yaml import read_reference_yaml
from diffmoe_ds.checkpoint.stream import Entry, write_safetensors
from diffmoe_ds.checkpoint.verify import candidates, check_contents, check_sizes
from diffmoe_ds.config.deepspeed import read_deepspeed_json, resolve_deepspeed
from diffmoe_ds.config.load import dump_config, load_config
from diffmoe_ds.data.prepare import preparation
from diffmoe_ds.data.prepare.encoders import PixelEncoder
from diffmoe_ds.data.sources.folder import ImageFolder
from diffmoe_ds.data.sources.index_files import save_index
from diffmoe_ds.data.sources.shard_paths import expand
from diffmoe_ds.data.sources.shards import ShardDataset
from diffmoe_ds.distributed.launch import cores_of_rank, resolve_launch
from diffmoe_ds.doctor.hosts import read_hostfile
from diffmoe_ds.errors import DiffMoEError
from diffmoe_ds.evaluation.npz import NpzReader
from diffmoe_ds.evaluation.reference import read_gaussian
from diffmoe_ds.evaluation.report.history import read_history
from diffmoe_ds.files import write_json
from diffmoe_ds.interop.folder import read_vae
from diffmoe_ds.model.dit import empty_model
from diffmoe_ds.sampling.capacity import Calibration
from diffmoe_ds.sampling.capacity_file import CapacityFile
from diffmoe_ds.sampling.turns import Shard
from diffmoe_ds.sampling.unfinished import UnfinishedSet
from tests.helpers.data import PNG, npy, write_tar

NETWORK = {"name": "tiny", "sha256": "cd" * 32}
NANO = load_config("fashion", ["model.name=nano-E2", "model.depth=1", "model.num_classes=2"])

LATENT = load_config("fashion", ["model.in_channels=4"])


class Parser(NamedTuple):
    """How to try a parser."""

    write: Callable[[Path], Path]
    """Writes valid files into an empty directory; returns the one that the parser reads."""
    parse: Callable[[Path], object]
    """Reads that file, and what belongs to it."""


def outcome(parser: Parser, path: Path) -> str:
    """Return the error of ours that a parser raises, or "" if it accepts a file; any other error fails the test."""
    try:
        parser.parse(path)
    except DiffMoEError as error:
        assert 0 < len(str(error)) < 4000, str(error)
        return str(error)
    return ""


@contextmanager
def changing(name: str) -> Iterator[Path]:
    """Provide a valid file of a format, and parse what the block has made of it."""
    with tempfile.TemporaryDirectory() as directory:
        path = PARSERS[name].write(Path(directory))
        yield path
        outcome(PARSERS[name], path)


def _checkpoint(directory: Path) -> Path:
    root = directory / "checkpoints" / "images_000000000064"
    root.mkdir(parents=True)
    (root.parent / "latest").write_text(f"{root.name}\n")
    entries = [Entry(f"{kind}/w@0", (6,), torch.float32, [torch.arange(6.0)]) for kind in ("fp32", "ema")]
    digests = {"rank_00000.safetensors": write_safetensors(root / "rank_00000.safetensors", entries, {})}
    metadata = CheckpointMetadata(
        files=1, images=64, step=2, adam_step=2, shapes={"w": (2, 3)}, config=NANO,
        lr_now=ScheduledValues(1e-3, (0.9, 0.99)), lr_scheduler={"last_batch_iteration": 1},
        deepspeed={"optimizer": {"type": "AdamW"}}, class_names=("cat", "dog"),
    )  # fmt: skip
    digests["meta.json"] = write_json(root / "meta.json", {**metadata.to_json(), "repa_network": NETWORK})
    write_manifest(root, digests)
    return root


def _verify(root: Path) -> None:
    check_contents(root, check_sizes(root))


def _read_tensors(path: Path) -> None:
    reader = CheckpointReader(path.parent)
    for kind in reader.kinds():
        for name, shape in reader.metadata.shapes.items():
            reader.read(kind, name, 0, torch.Size(shape).numel())
    reader.buffers()


def _model(directory: Path) -> Path:
    state = empty_model(NANO).state_dict()
    entries = [Entry(name, tuple(t.shape), torch.float32, [torch.zeros(t.numel())]) for name, t in state.items()]
    write_model(directory, entries, Description(NANO, ("cat", "dog")), "ema", 64)
    return directory


def _open_model(path: Path) -> None:
    reader = open_weights(path.parent)
    if reader is not None:
        for name in empty_model(reader.config).state_dict():
            reader.read(reader.kinds()[0], name, 0, 1)


def _recipe(directory: Path) -> Path:
    (directory / "recipe.yaml").write_text(dump_config(NANO))
    return directory / "recipe.yaml"


def _reference_yaml(directory: Path) -> Path:
    tree = {
        "basic": {"rf": True},
        "model": {
            "target": "models.models_DiffMoE.DiT",
            "params": {"depth": 12, "MoE_config": {"num_experts": 8, "capacity": 1}},
        },
    }
    (directory / "reference.yaml").write_text(yaml.safe_dump(tree))
    return directory / "reference.yaml"


DEEPSPEED = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 1},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.99]}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
    "bf16": {"enabled": False},
}


def _resolve_deepspeed(path: Path) -> None:
    resolve_deepspeed(read_deepspeed_json(path), NANO, str(path), world=1, local_world=1, device="cpu")


SLURM = {
    "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_NODELIST": "rack2-node[003-5,9],other", "SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0",
    "SLURM_CPUS_PER_TASK": "4",
}  # fmt: skip


def _launch(path: Path) -> None:
    """Resolve the variables in a file in the form of /proc/PID/environ."""
    words = path.read_bytes().decode("utf-8", "surrogateescape").split("\0")
    environ = dict(word.split("=", 1) for word in words if "=" in word)
    cores_of_rank(resolve_launch(environ), environ)


def _shard(directory: Path) -> Path:
    array = npy(np.zeros((3, 8, 8), np.float32))
    return write_tar(
        directory / "a.tar", [("a.png", PNG), ("a.cls", b"1"), ("b.npy", array), ("b.cls", b"0"), ("b.txt", b"text")]
    )


def _compressed_shard(directory: Path) -> Path:
    members = [("a.png", PNG), ("a.cls", b"1")]
    return write_tar(directory / "a.tar.gz", members)


def _read_samples(path: Path) -> None:
    dataset = ShardDataset(expand(path))
    for number in range(min(len(dataset), 50)):
        dataset.describe(number)
        dataset[number]


def _index(directory: Path) -> Path:
    """Write a dataset with an index, without checksums, which an attacker would recompute."""
    shard = _shard(directory)
    save_index(ShardDataset([shard]).index, directory)
    tree = json.loads((directory / "index.json").read_text())
    tree["shards"] = [{**tree["shards"][0], "name": shard.name}]
    del tree["index_sha256"]
    (directory / "index.json").write_text(json.dumps({**tree, "classes": ["cat", "dog"]}))
    return directory


LATENTS = {
    "channels": 4, "size": 2, "image_size": 16, "dtype": "float16", "scaling_factor": 0.18, "shift_factor": 0.0,
    "vae": "0" * 64,
}  # fmt: skip


def _latents(directory: Path) -> Path:
    (directory / "latents.json").write_text(json.dumps(LATENTS))
    return directory / "latents.json"


def _read_latents(path: Path) -> None:
    data = path.read_bytes()[: 1 << 16]
    array = npy(np.zeros((2, 2, 4, 2, 2), np.float16))
    shard = write_tar(path.with_name("latents.tar"), [("__latents__", data), ("a.npy", array), ("a.cls", b"0")])
    dataset = ShardDataset([shard])
    if dataset.latents is not None:
        dataset.latents.decode(dataset.read_moments([0, 0], [False, True]))


def _preparation(directory: Path) -> preparation.Preparation:
    return preparation.Preparation(ImageFolder(directory / "images"), PixelEncoder(8, 1), directory / "out", 2, 0.5)


def _prepared(directory: Path) -> Path:
    (directory / "images").mkdir()
    (directory / "images" / "a.png").write_bytes(PNG)
    preparation.begin(_preparation(directory))
    preparation.write_shard(_preparation(directory), 0, lambda count: None)
    return directory / "out"


def _npz(directory: Path) -> Path:
    path = directory / "reference.npz"
    images = np.zeros((3, 4, 4, 3), np.uint8)
    np.savez_compressed(path, arr_0=images, mu=np.zeros(4), sigma=np.eye(4), extractor=np.array("x"), n=np.array([3]))
    return path


def _read_npz(path: Path) -> None:
    reader = NpzReader(path)
    for name in reader.names[:20]:
        reader.header(name)
        reader.array(name, 1 << 20)
    if "arr_0" in reader:
        list(reader.rows("arr_0", 0, 2, 1))
    if "mu" in reader:
        read_gaussian(reader, "mu", "sigma")


SHARD = Shard(0, range(2))


def _unfinished(directory: Path) -> UnfinishedSet:
    found = UnfinishedSet(directory)
    found.open({"steps": 2, "classes": [0, 1]}, 2)
    return found


def _images(directory: Path) -> Path:
    found = _unfinished(directory)
    found.write(SHARD, np.zeros((2, 4, 4, 1), np.uint8), np.zeros((1, 3), np.int64))
    return next(found.folder.glob("*.npy"))


def _read_images(path: Path) -> None:
    found = _unfinished(path.parent.parent)
    found.shard_images()
    found.read(SHARD)
    found.counts(SHARD)


def _capacity(directory: Path) -> Path:
    file = CapacityFile(directory, 0.5, {"seed": 0})
    file.write(Calibration(0.5, torch.zeros(1, 2), 0.5, 3))
    return file.path


def _metrics(directory: Path) -> Path:
    row = {"step": 1, "images": 8, "loss": 0.5, "images_per_s": 3.0}
    held_out = {"images": 8, "validation_loss": 0.5, "validation_loss_by_noise_level": [0.1, 0.2], "metrics": {"n": 3}}
    (directory / "validation.jsonl").write_text(json.dumps(held_out) + "\n")
    (directory / "metrics.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "images": 16}) + "\n")
    return directory / "metrics.jsonl"


def _vae(directory: Path) -> Path:
    (directory / "weights.safetensors").write_bytes(b"")
    write_json(directory / "config.json", {"latent_channels": 4, "scaling_factor": 0.2, "shift_factor": None})
    return directory / "config.json"


def _official(directory: Path) -> Path:
    torch.save({"ema": {"w": torch.zeros(2, 3)}}, directory / "weights.pt")
    return directory / "weights.pt"


def _named(write: Callable[[Path], Path], name: str) -> Callable[[Path], Path]:
    return lambda directory: write(directory) / name


def _written(text: str, name: str) -> Callable[[Path], Path]:
    def write(directory: Path) -> Path:
        (directory / name).write_text(text)
        return directory / name

    return write


PARSERS: dict[str, Parser] = {
    "manifest": Parser(_named(_checkpoint, "manifest.json"), lambda path: _verify(path.parent)),
    "metadata": Parser(_named(_checkpoint, "meta.json"), lambda path: read_metadata(path.parent)),
    "latest": Parser(
        lambda directory: _checkpoint(directory).parent / "latest", lambda path: candidates(path.parent.parent)
    ),
    "safetensors": Parser(_named(_checkpoint, "rank_00000.safetensors"), _read_tensors),
    "model-config": Parser(_named(_model, "config.json"), _open_model),
    "model-weights": Parser(_named(_model, "model.safetensors"), _open_model),
    "official": Parser(_official, read_reference),
    "recipe": Parser(_recipe, lambda path: load_config(str(path))),
    "reference-yaml": Parser(_reference_yaml, read_reference_yaml),
    "deepspeed": Parser(_written(json.dumps(DEEPSPEED), "ds.json"), _resolve_deepspeed),
    "hostfile": Parser(_written("node1 slots=8\n# comment\nnode2 slots=8\n", "hostfile"), read_hostfile),
    "slurm": Parser(_written("\0".join(f"{name}={value}" for name, value in SLURM.items()), "environ"), _launch),
    "shard": Parser(_shard, _read_samples),
    "compressed-shard": Parser(_compressed_shard, _read_samples),
    "index": Parser(_named(_index, "index.json"), lambda path: _read_samples(path.parent)),
    "index-samples": Parser(_named(_index, "index-samples.npy"), lambda path: _read_samples(path.parent)),
    "index-keys": Parser(_named(_index, "index-keys.npy"), lambda path: _read_samples(path.parent)),
    "latents": Parser(_latents, _read_latents),
    "settings": Parser(
        _named(_prepared, "settings.json"), lambda path: preparation.begin(_preparation(path.parent.parent))
    ),
    "record": Parser(
        _named(_prepared, "parts/00000.json"),
        lambda path: preparation.finish(_preparation(path.parent.parent.parent)),
    ),
    "npz": Parser(_npz, _read_npz),
    "images": Parser(_images, _read_images),
    "images-manifest": Parser(lambda directory: _images(directory).with_name("manifest.json"), _read_images),
    "capacity": Parser(_capacity, lambda path: CapacityFile(path.parent, 0.5, {"seed": 0}).read(1, 2)),
    "metrics": Parser(_metrics, lambda path: read_history(path.parent)),
    "validation": Parser(
        lambda directory: _metrics(directory).with_name("validation.jsonl"), lambda path: read_history(path.parent)
    ),
    "vae": Parser(_vae, lambda path: read_vae(path.parent, LATENT)),
}
"""Parsers by format."""
