"""What ``meta.json`` and ``manifest.json`` of a checkpoint hold, typed and checked.

Both are read with `json` alone, so nothing in them is executed.  Keys that were added later are optional: a checkpoint
without them keeps the meaning it had.  Unknown keys are ignored.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard, TypeVar, cast

from diffmoe_ds.checkpoint.description import Description, read_description
from diffmoe_ds.checkpoint.layout import FORMAT, MANIFEST, META
from diffmoe_ds.config.deepspeed_keys import LARGEST, MOMENTS
from diffmoe_ds.config.fields import printable
from diffmoe_ds.config.schema import Config
from diffmoe_ds.control_files import read_json
from diffmoe_ds.errors import CheckpointError
from diffmoe_ds.files import Digest, write_json
from diffmoe_ds.text import shortened
from diffmoe_ds.text_features import TextFormat

T = TypeVar("T")

MAX_INT = 2**63 - 1
"""Largest number of elements or bytes; more is damage."""
MAX_COUNT = 10**15
"""Largest other number, for example of images; a run adds to them, so the limit leaves room below `MAX_INT`."""
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}")
"""Names of the files that a manifest may list."""
SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class SavedLayout:
    """The ranks that saved a checkpoint and how they shared a batch.

    Any other layout can read the checkpoint; a resuming run reports what has changed.  A field is None if the
    checkpoint does not record it.
    """

    world: int | None = None
    """Number of ranks."""
    ep_size: int | None = None
    """Ranks that share one set of experts."""
    zero_stage: int | None = None
    """ZeRO stage."""
    global_batch: int | None = None
    """Images per optimizer step, over all ranks."""
    micro_batch: int | None = None
    """Images per rank and forward pass."""
    accumulation: int | None = None
    """Micro-batches per optimizer step."""

    def known(self) -> dict[str, int]:
        """Return the fields that the checkpoint records, by name."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class ScheduledValues:
    """What a learning-rate scheduler last set in the optimizer; the scheduler's own state does not hold it."""

    lr: float
    """Learning rate."""
    betas: tuple[float, ...]
    """The optimizer's two decay rates."""


class FeatureNetwork(NamedTuple):
    """The network of the image features that REPA aligns with."""

    name: str
    """As `diffmoe prepare --features` got it."""
    sha256: str
    """SHA-256 of its weights and configuration."""


@dataclass(frozen=True)
class CheckpointMetadata:
    """Everything in a checkpoint that is not a tensor (``meta.json``)."""

    files: int
    """Number of files with tensors, one for each rank that wrote."""
    images: int
    """Images trained on so far; the checkpoint's directory is named after it."""
    step: int
    """Optimizer steps so far; skipped ones do not count."""
    adam_step: int
    """Step count of the optimizer (Adam's bias correction)."""
    shapes: dict[str, tuple[int, ...]]
    """Logical shape of every parameter, with all experts, in model order."""
    config: Config
    """Configuration of the run."""
    lr_now: ScheduledValues
    """Optimizer settings that a scheduler changes."""
    layout: SavedLayout = field(default_factory=SavedLayout)
    """The ranks that wrote the checkpoint."""
    lr_scheduler: dict[str, Any] | None = None
    """State of the learning-rate scheduler; None without one."""
    began_from: str | None = None
    """Absolute PATH of the ``--resume PATH`` that the run began with; None otherwise."""
    deepspeed: dict[str, Any] | None = None
    """Resolved DeepSpeed settings besides the layout; None in checkpoints of versions that did not save them."""
    class_names: tuple[str, ...] | None = None
    """Name of each label; None if labels have no names."""
    text: TextFormat | None = None
    """The encoders of a text model; None for a class model."""
    repa_network: FeatureNetwork | None = None
    """None without REPA, and in checkpoints of versions that did not save it."""

    @property
    def optimizer(self) -> str:
        """Type of the optimizer; AdamW if the checkpoint does not record a supported one."""
        section = (self.deepspeed or {}).get("optimizer")
        kind = section.get("type") if isinstance(section, dict) else None
        return kind if isinstance(kind, str) and kind in MOMENTS else "AdamW"

    @property
    def initial_share(self) -> float:
        """Share of the initial weights in the averaged ones."""
        return self.config.ema.initial_share(self.step)

    def to_json(self) -> dict[str, Any]:
        """Return the contents of ``meta.json``."""
        tree: dict[str, Any] = {
            "format": FORMAT,
            "files": self.files,
            "images": self.images,
            "step": self.step,
            "adam_step": self.adam_step,
            "lr_scheduler": self.lr_scheduler,
            "lr_now": {"lr": self.lr_now.lr, "betas": list(self.lr_now.betas)},
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "layout": self.layout.known(),
            "began_from": self.began_from,
        }
        if self.deepspeed is not None:
            tree["deepspeed"] = self.deepspeed
        if self.repa_network is not None:
            tree["repa_network"] = self.repa_network._asdict()
        return {**tree, **Description(self.config, self.class_names, self.text).to_json()}


def read_metadata(path: Path) -> CheckpointMetadata:
    """Read ``meta.json`` of a checkpoint.

    Args:
        path: the checkpoint's directory.

    Raises:
        CheckpointError: the file is missing, damaged or of another format; names the file, the key and its value.
    """
    file = path / META
    try:
        tree = read_json(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    return parse_metadata(tree, str(file))


def parse_metadata(tree: Any, source: str) -> CheckpointMetadata:
    """Check the contents of ``meta.json``.

    Args:
        tree: what the file holds.
        source: name of the file, for messages.

    Raises:
        CheckpointError: a key is missing or has a wrong value, or the format is another.
    """
    found = tree.get("format") if isinstance(tree, dict) else tree
    if type(found) is not int or found != FORMAT:
        advice = "; update diffmoe_ds" if type(found) is int and found > FORMAT else ""
        raise CheckpointError(
            f"{source}: has format {shortened(repr(found))}, but this version reads {FORMAT}{advice}."
        )
    top = _Object(tree, source)
    files = top.count("files")
    top.value("config", dict)
    config, class_names, text = read_description(tree, source)
    return CheckpointMetadata(
        files=files,
        images=top.count("images"),
        step=top.count("step", top.count("images")),
        adam_step=top.count("adam_step", top.count("images")),
        shapes=_shapes(top.object("shapes")),
        config=config,
        lr_now=_scheduled(top.object("lr_now")),
        layout=_layout(top.object("layout")),
        lr_scheduler=_scheduler(top),
        began_from=top.optional("began_from", str),
        deepspeed=top.value("deepspeed", dict) if "deepspeed" in tree else None,
        class_names=class_names,
        text=text,
        repa_network=_network(top.object("repa_network")) if "repa_network" in tree else None,
    )


def read_manifest(path: Path) -> dict[str, Digest]:
    """Return size and checksum of each file of a checkpoint.

    Args:
        path: the checkpoint's directory.

    Raises:
        CheckpointError: the manifest is missing or damaged.
    """
    file = path / MANIFEST
    try:
        tree = read_json(file)
        if _listed_sha256(tree["files"]) != tree["sha256"]:
            raise ValueError("changed")
        files = {name: _digest(entry) for name, entry in tree["files"].items()}
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{file}: is damaged: it is not a manifest.") from None
    wrong = [name for name in files if not FILE_NAME.fullmatch(name)]
    if wrong or META not in files:
        found = f"lists {wrong[0][:80]!r}" if wrong else f"does not list {META}"
        raise CheckpointError(f"{file}: is damaged: it {found}.")
    return files


def _digest(entry: Any) -> Digest:
    """Return a file's size and checksum; invalid ones raise `ValueError`, `KeyError` or `TypeError`."""
    size, sha256 = entry["bytes"], entry["sha256"]
    if type(size) is not int or not 0 <= size <= MAX_INT or not SHA256.fullmatch(sha256):
        raise ValueError("invalid size or checksum")
    return Digest(size, sha256)


def write_manifest(path: Path, files: Mapping[str, Digest]) -> None:
    """Write the manifest, which makes a checkpoint complete.

    Args:
        path: the checkpoint's directory.
        files: size and checksum of every other file.

    Raises:
        CheckpointError: it cannot be written.
    """
    listed = {name: {"bytes": digest.size, "sha256": digest.sha256} for name, digest in files.items()}
    write_json(path / MANIFEST, {"files": listed, "sha256": _listed_sha256(listed)})


def _listed_sha256(files: Mapping[str, Any]) -> str:
    """Return the checksum of a manifest's own list, to tell damage to the list from damage to the files."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class _Object:
    """An object of a JSON file, whose values are checked as they are read."""

    tree: dict[str, Any]
    """Its keys and values."""
    source: str
    """Name of the file."""
    prefix: str = ""
    """Dotted name of the object in the file, with the dot."""

    def error(self, key: str, value: Any, valid: str) -> CheckpointError:
        name = printable(f"{self.prefix}{key}")
        return CheckpointError(f"{self.source}: {name} is {shortened(repr(value))}, but it must be {valid}.")

    def value(self, key: str, kind: type[T]) -> T:
        value = self.tree.get(key)
        if type(value) is not kind:
            raise self.error(key, value, "an object" if kind is dict else "a string")
        return value

    def optional(self, key: str, kind: type[T]) -> T | None:
        return None if self.tree.get(key) is None else self.value(key, kind)

    def object(self, key: str) -> _Object:
        return _Object(self.value(key, dict), self.source, f"{self.prefix}{key}.")

    def count(self, key: str, most: int = MAX_COUNT) -> int:
        value = self.tree.get(key)
        if type(value) is not int or not 0 <= value <= most:
            raise self.error(key, value, f"a whole number from 0 to {most:,}")
        return value


def _scheduler(top: _Object) -> dict[str, Any] | None:
    state = top.optional("lr_scheduler", dict)
    last = (state or {}).get("last_batch_iteration", 0)
    if type(last) is not int or not -1 <= last <= MAX_COUNT:
        raise top.error("lr_scheduler.last_batch_iteration", last, f"a whole number from -1 to {MAX_COUNT:,}")
    return state


def _layout(layout: _Object) -> SavedLayout:
    return SavedLayout(**{f.name: layout.count(f.name) for f in fields(SavedLayout) if f.name in layout.tree})


def _network(network: _Object) -> FeatureNetwork:
    return FeatureNetwork(*(network.value(name, str) for name in FeatureNetwork._fields))


def _shapes(shapes: _Object) -> dict[str, tuple[int, ...]]:
    for name, shape in shapes.tree.items():
        if type(shape) is not list or not all(type(n) is int and 0 <= n <= MAX_INT for n in shape):
            raise shapes.error(name, shape, "a list of whole numbers")
        if math.prod(shape) > MAX_INT:
            raise shapes.error(name, shape, f"a shape of at most {MAX_INT} elements")
    return {name: tuple(shape) for name, shape in shapes.tree.items()}


def _scheduled(now: _Object) -> ScheduledValues:
    lr, betas = now.tree.get("lr"), now.tree.get("betas")
    if not _is_number(lr):
        raise now.error("lr", lr, "a number")
    if type(betas) is not list or not all(_is_number(beta) for beta in betas):
        raise now.error("betas", betas, "a list of numbers")
    return ScheduledValues(float(lr), tuple(map(float, betas)))


def _is_number(value: object) -> TypeGuard[float]:
    return type(value) in (int, float) and abs(cast(float, value)) <= LARGEST
