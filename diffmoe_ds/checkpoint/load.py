"""Read a checkpoint in whatever layout the reader has.  Only safetensors and JSON are read: nothing is unpickled."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffmoe_ds.checkpoint.layout import BUFFER, FORMAT, META, parse_key, rank_file
from diffmoe_ds.config.load import config_from_dict, config_to_dict
from diffmoe_ds.config.schema import Config
from diffmoe_ds.errors import CheckpointError, ConfigError
from diffmoe_ds.model.dit import DiT
from diffmoe_ds.topology import Topology

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from diffmoe_ds.distributed.fragments import Fragment

FIXED = {
    "model": (
        "hidden_size", "depth", "num_heads", "input_size", "in_channels", "patch_size", "num_classes", "mlp_ratio",
        "mlp",
    ),
    "routing": ("kind", "interleave", "shared_experts", "capacity_predictor"),
    "objective": ("kind", "flow_time_scale"),
}  # fmt: skip
"""What decides the shapes or the meaning of the weights and so cannot change between save and resume."""


CLASS_EMBEDDING = "y_embedder.embedding_table.weight"


class WeightsReader(Protocol):
    """What fills a model: a checkpoint or an exported model."""

    path: Path
    """Where it lies, for messages."""
    config: Config
    """The run that made it."""

    def kinds(self) -> list[str]:
        """What is stored of each parameter, of `layout.KINDS` and `layout.BUFFER`."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape of a parameter.  CheckpointError if there is no such parameter."""

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a flattened logical tensor, fp32 on the CPU."""


class CheckpointReader:
    """Random access to the tensors of a checkpoint."""

    def __init__(self, path: Path) -> None:
        """Read the description and the headers of all files, no weights yet.

        Raises:
            CheckpointError: a file is missing, damaged or of another format.
        """
        self.path = path
        self.meta = _read_meta(path / META)
        self.config = stored_config(self.meta["config"], path / META)
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = defaultdict(list)
        for rank in range(self.meta["files"]):
            file = path / rank_file(rank)
            try:
                opened = safe_open(file, framework="pt")
                for key in opened.keys():  # noqa: SIM118 - not a mapping
                    kind, name, start = parse_key(key)
                    part = opened.get_slice(key)
                    if part.get_dtype() != "F32" or len(part.get_shape()) != 1:
                        raise ValueError(f"{key!r} is {part.get_dtype()} {part.get_shape()}, not flat F32")
                    self._pieces[kind, name].append((start, part.get_shape()[0], opened, key))
            except (OSError, SafetensorError, ValueError) as error:
                raise CheckpointError(f"{file}: cannot be read: {error}.") from None
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece[0])

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape of a parameter.  CheckpointError if the checkpoint has no such parameter."""
        if name not in self.meta["shapes"]:
            raise CheckpointError(f"{self.path}: holds no tensor {name!r}; it is a checkpoint of another model.")
        return tuple(self.meta["shapes"][name])

    def kinds(self) -> list[str]:
        """What is stored of each parameter."""
        return sorted({kind for kind, _ in self._pieces})

    def buffers(self) -> dict[str, int]:
        """Elements of each buffer, by name."""
        return {name: pieces[0][1] for (kind, name), pieces in self._pieces.items() if kind == BUFFER}

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a flattened logical tensor, fp32 on the CPU.

        Raises:
            CheckpointError: the files do not hold all of them.
        """
        out = torch.empty(numel, dtype=torch.float32)
        filled = 0
        for piece_start, piece_numel, opened, key in self._pieces[kind, name]:
            low, high = max(start + filled, piece_start), min(start + numel, piece_start + piece_numel)
            if low < high and low == start + filled:  # sorted, so that a gap is never jumped over
                try:
                    part = opened.get_slice(key)[low - piece_start : high - piece_start]
                except SafetensorError as error:
                    raise CheckpointError(f"{self.path}: {key} cannot be read: {error}.") from None
                out[low - start : high - start] = part
                filled = high - start
        if filled != numel:
            raise CheckpointError(f"{self.path}: holds {filled} of the {numel} elements asked of {kind} {name!r}.")
        return out


def stored_config(tree: Any, source: Path) -> Config:
    """The configuration that a checkpoint or an export holds; CheckpointError if it is none."""
    try:
        return config_from_dict(tree, str(source))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


META_KEYS = {
    "files": int, "images": int, "step": int, "adam_step": int, "shapes": dict, "layout": dict, "config": dict,
    "lr_now": dict,
}  # fmt: skip


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}.") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        found = meta.get("format") if isinstance(meta, dict) else meta
        raise CheckpointError(f"{path}: has format {found!r}, but this version reads {FORMAT}.")
    for key, kind in META_KEYS.items():
        value = meta.get(key)
        if type(value) is not kind or (kind is int and value < 0):
            raise CheckpointError(f"{path}: {key} is {value!r}, but it must be of type {kind.__name__}.")
    if not isinstance(meta.get("lr_scheduler"), (dict, type(None))):
        raise CheckpointError(f"{path}: lr_scheduler is {meta['lr_scheduler']!r}, but it must be an object or null.")
    if not isinstance(meta.get("deepspeed", {}), dict):  # older versions did not write it
        raise CheckpointError(f"{path}: deepspeed is {meta['deepspeed']!r}, but it must be an object.")
    for name, shape in meta["shapes"].items():
        if not isinstance(shape, list) or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise CheckpointError(f"{path}: the shape of {name!r} is {shape!r}, but it must be a list of numbers.")
    return meta


def _has_null(config: Config) -> bool:
    """Whether a model's class embedding has a row for "no label"."""
    return config.model.label_dropout > 0


def best_kind(reader: WeightsReader) -> str:
    """The averaged weights if they are there, otherwise the last ones."""
    return "ema" if "ema" in reader.kinds() else "fp32"


def check_same_model(reader: WeightsReader, config: Config, except_for: tuple[str, ...] = ()) -> None:
    """CheckpointError with the key and both values unless the weights are of the same model.

    Args:
        reader: the weights.
        config: the run that wants them.
        except_for: keys of the model that may differ.
    """
    saved, wanted = reader.config, config
    pairs = [("routing.num_experts", saved.num_experts, wanted.num_experts)]
    pairs += [(f"model.{key}", getattr(saved.size, key), getattr(wanted.size, key)) for key in vars(saved.size)]
    was, now = config_to_dict(saved), config_to_dict(wanted)
    pairs += [
        (f"{section}.{key}", was[section][key], now[section][key])
        for section, keys in FIXED.items()
        for key in keys
        if key not in vars(saved.size) and key not in except_for
    ]
    if "label_dropout" not in except_for and _has_null(saved) != _has_null(wanted):
        dropout = saved.model.label_dropout, wanted.model.label_dropout
        pairs.append(("model.label_dropout (0, or above 0)", *dropout))
    for key, old, new in pairs:
        if old != new:
            raise CheckpointError(f"{reader.path}: is of another model: {key} is {old!r} there and {new!r} here.")


def check_same_schedule(reader: CheckpointReader, has_scheduler: bool) -> None:
    """CheckpointError if a learning-rate scheduler was added since the checkpoint was saved, or left out."""
    had_scheduler = reader.meta.get("lr_scheduler") is not None
    if had_scheduler != has_scheduler:
        raise CheckpointError(
            f"{reader.path}: was saved with{'' if had_scheduler else 'out'} a learning-rate scheduler, but this run's "
            f"DeepSpeed JSON has {'one' if has_scheduler else 'none'}."
        )


@torch.no_grad()
def restore_weights(model: DiT, reader: WeightsReader, topology: Topology, kind: str) -> None:
    """Fill a model whose storage is empty, or whose every value but the class embedding will be replaced.

    Args:
        model: with the experts that ``topology`` says.
        reader: the weights; where their class embedding has other rows, the model's stays as it is.
        topology: which experts this rank holds.
        kind: ``fp32`` or ``ema``.
    """
    there, here = reader.config, model.config
    other_classes = there.model.num_classes != here.model.num_classes or _has_null(there) != _has_null(here)
    for name, parameter in model.named_parameters():
        if other_classes and name == CLASS_EMBEDDING:
            continue
        logical = reader.shape(name)
        is_expert = ".experts." in name
        first = topology.ep_rank * parameter.numel() if is_expert else 0
        shape = (topology.num_experts, *parameter.shape[1:]) if is_expert else tuple(parameter.shape)
        if shape != logical:
            raise CheckpointError(f"{reader.path}: {name!r} has shape {logical}, but the model's is {shape}.")
        parameter.copy_(reader.read(kind, name, first, parameter.numel()).view_as(parameter))
    model.reset_positions()
    for name, buffer in model.named_buffers():
        if name != "pos_embed":
            buffer.copy_(reader.read(BUFFER, name, 0, buffer.numel()).view_as(buffer))


@torch.no_grad()
def restore_engine(
    engine: DeepSpeedEngine, reader: CheckpointReader, fragments: list[Fragment], ema: list[Tensor]
) -> None:
    """Write master weights, moments and EMA into this rank's fragments, and set the counters.

    Args:
        engine: made from a model that `restore_weights` filled.
        reader: the checkpoint.
        fragments: what this rank keeps.
        ema: the averaged weights of each fragment.
    """
    from diffmoe_ds.distributed.deepspeed_seam import restore_schedule, set_adam_step

    for fragment, averaged in zip(fragments, ema, strict=True):
        targets = {"fp32": fragment.fp32, "ema": averaged, **fragment.moments}
        for kind, target in targets.items():
            target.copy_(reader.read(kind, fragment.name, fragment.start, target.numel()))
    set_adam_step(engine, reader.meta["adam_step"])
    engine.global_steps = reader.meta["step"]
    engine.global_samples = reader.meta["images"]
    if engine.lr_scheduler is not None:
        restore_schedule(engine, reader.meta["lr_scheduler"], reader.meta["lr_now"])
