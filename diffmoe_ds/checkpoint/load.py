"""Read a checkpoint in whatever layout the reader has.  Only safetensors and JSON are read: nothing is unpickled."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffmoe_ds.checkpoint.layout import BUFFER, FORMAT, checkpoint_root, parse_key, rank_file
from diffmoe_ds.config.load import config_from_dict, config_to_dict
from diffmoe_ds.config.schema import Config
from diffmoe_ds.errors import CheckpointError
from diffmoe_ds.model.dit import DiT
from diffmoe_ds.parallel.topology import Topology

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from diffmoe_ds.parallel.deepspeed_seam import Fragment

FIXED = {
    "model": (
        "hidden_size", "depth", "num_heads", "input_size", "in_channels", "patch_size", "num_classes", "mlp_ratio",
        "mlp",
    ),
    "routing": ("kind", "interleave", "shared_experts", "capacity_predictor"),
    "objective": ("kind", "flow_time_scale"),
}  # fmt: skip
"""What decides the shapes or the meaning of the weights and so cannot change between save and resume."""


def find_checkpoint(path: Path) -> Path | None:
    """The checkpoint that a path means: itself, or the newest of a run directory; none if there is none yet.

    Raises:
        CheckpointError: the path does not exist, or its ``latest`` names a checkpoint that is not there.
    """
    if (path / "meta.json").is_file():
        return path
    for root in (checkpoint_root(path), path):
        pointer = root / "latest"
        if pointer.is_file():
            name = pointer.read_text(encoding="utf-8").strip()
            if not (root / name / "meta.json").is_file():
                raise CheckpointError(f"{pointer}: names {name!r}, which is not a checkpoint in {root}.")
            return root / name
    return None


class CheckpointReader:
    """Random access to the tensors of a checkpoint."""

    def __init__(self, path: Path) -> None:
        """Read the description and the headers of all files, no weights yet.

        Raises:
            CheckpointError: a file is missing, damaged or of another format.
        """
        self.path = path
        try:
            self.meta: dict[str, Any] = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path / 'meta.json'}: cannot be read: {error}.") from None
        if self.meta.get("format") != FORMAT:
            raise CheckpointError(f"{path}: has format {self.meta.get('format')!r}, but this version reads {FORMAT}.")
        self.config = config_from_dict(self.meta["config"], str(path / "meta.json"))
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = defaultdict(list)
        for rank in range(self.meta["files"]):
            file = path / rank_file(rank)
            try:
                opened = safe_open(file, framework="pt")
                for key in opened.keys():  # noqa: SIM118 - not a mapping
                    kind, name, start = parse_key(key)
                    numel = opened.get_slice(key).get_shape()[0]
                    self._pieces[kind, name].append((start, numel, opened, key))
            except (OSError, SafetensorError, ValueError) as error:
                raise CheckpointError(f"{file}: cannot be read: {error}.") from None

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape of a parameter.  CheckpointError if the checkpoint has no such parameter."""
        if name not in self.meta["shapes"]:
            raise CheckpointError(f"{self.path}: holds no tensor {name!r}; it is a checkpoint of another model.")
        return tuple(self.meta["shapes"][name])

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a flattened logical tensor, fp32 on the CPU.

        Raises:
            CheckpointError: the files do not hold all of them.
        """
        out = torch.empty(numel, dtype=torch.float32)
        filled = 0
        for piece_start, piece_numel, opened, key in self._pieces[kind, name]:
            low, high = max(start, piece_start), min(start + numel, piece_start + piece_numel)
            if low < high:
                try:
                    part = opened.get_slice(key)[low - piece_start : high - piece_start]
                except SafetensorError as error:
                    raise CheckpointError(f"{self.path}: {key} cannot be read: {error}.") from None
                out[low - start : high - start] = part
                filled += high - low
        if filled != numel:
            raise CheckpointError(f"{self.path}: holds {filled} of the {numel} elements asked of {kind} {name!r}.")
        return out


def check_same_model(reader: CheckpointReader, config: Config) -> None:
    """CheckpointError with the key and both values unless the checkpoint is of the same model."""
    saved, wanted = reader.config, config
    pairs = [("routing.num_experts", saved.num_experts, wanted.num_experts)]
    pairs += [(f"model.{key}", getattr(saved.size, key), getattr(wanted.size, key)) for key in vars(saved.size)]
    was, now = config_to_dict(saved), config_to_dict(wanted)
    pairs += [
        (f"{section}.{key}", was[section][key], now[section][key])
        for section, keys in FIXED.items()
        for key in keys
        if key not in vars(saved.size)
    ]
    for key, old, new in pairs:
        if old != new:
            raise CheckpointError(f"{reader.path}: is of another model: {key} is {old!r} there and {new!r} here.")


@torch.no_grad()
def restore_weights(model: DiT, reader: CheckpointReader, topology: Topology, kind: str) -> None:
    """Fill a model whose storage is empty.

    Args:
        model: with the experts that ``topology`` says.
        reader: the checkpoint.
        topology: which experts this rank holds.
        kind: ``fp32`` or ``ema``.
    """
    for name, parameter in model.named_parameters():
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
    from diffmoe_ds.parallel.deepspeed_seam import set_adam_step

    for fragment, averaged in zip(fragments, ema, strict=True):
        targets = {"fp32": fragment.fp32, "ema": averaged, **fragment.moments}
        for kind, target in targets.items():
            target.copy_(reader.read(kind, fragment.name, fragment.start, target.numel()))
    set_adam_step(engine, reader.meta["adam_step"])
    engine.global_steps = reader.meta["step"]
    engine.global_samples = reader.meta["images"]
    if engine.lr_scheduler is not None:
        if reader.meta["lr_scheduler"] is None:
            raise CheckpointError(f"{reader.path}: was saved without a learning-rate scheduler, but this run has one.")
        engine.lr_scheduler.load_state_dict(reader.meta["lr_scheduler"])
