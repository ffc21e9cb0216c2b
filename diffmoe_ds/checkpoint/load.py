"""Read a checkpoint in any layout.  Only safetensors and JSON are read: nothing is unpickled."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from diffmoe_ds.checkpoint.layout import BUFFER, parse_key, rank_file
from diffmoe_ds.checkpoint.metadata import read_metadata
from diffmoe_ds.checkpoint.safetensors_header import open_safetensors
from diffmoe_ds.config.deepspeed_keys import MOMENTS
from diffmoe_ds.config.load import config_to_dict
from diffmoe_ds.config.schema import Config
from diffmoe_ds.errors import CheckpointError
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
"""Keys that decide the shapes or the meaning of the weights, so they cannot change between save and resume."""
CLASS_EMBEDDING = "y_embedder.embedding_table.weight"
"""The one parameter whose shape depends on the classes."""


class WeightsReader(Protocol):
    """Source of a model's weights: a checkpoint or an exported model."""

    path: Path
    """Where the weights are, for messages."""
    config: Config
    """Configuration of the run that trained the model."""
    images: int
    """Number of images that the model was trained on; 0 if unknown."""
    class_names: tuple[str, ...] | None
    """Name of each label, if labels have names."""
    initial_share: float
    """Share of the initial weights in the averaged ones; 0 if unknown."""

    def kinds(self) -> list[str]:
        """Return what is stored of each parameter: some of `layout.KINDS`, and `layout.BUFFER`."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the logical shape of a parameter.

        Raises:
            CheckpointError: the parameter does not exist.
        """

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Return the elements [start, start + numel) of a flattened logical tensor, fp32 on the CPU.

        Raises:
            CheckpointError: the elements do not exist or cannot be read.
        """


class _Piece(NamedTuple):
    """A fragment of a logical tensor in one of the files."""

    start: int
    """First element."""
    numel: int
    """Elements."""
    file: Any
    """The open file."""
    key: str
    """Key in the file."""


class CheckpointReader:
    """Random access to the tensors of a checkpoint (a `WeightsReader`)."""

    def __init__(self, path: Path) -> None:
        """Read the metadata and the headers of all files, but no weights.

        Args:
            path: the checkpoint's directory.

        Raises:
            CheckpointError: a file is missing, damaged or of another format.
        """
        self.path = path
        self.metadata = read_metadata(path)
        self.config = self.metadata.config
        self.images = self.metadata.images
        self.class_names = self.metadata.class_names
        self.initial_share = self.metadata.initial_share
        self._pieces: dict[tuple[str, str], list[_Piece]] = defaultdict(list)
        for rank in range(self.metadata.files):
            self._open(path / rank_file(rank))
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece.start)

    def _open(self, file: Path) -> None:
        try:
            opened = open_safetensors(file)
            for key in opened.keys():  # noqa: SIM118 - not a mapping
                kind, name, start = parse_key(key)
                part = opened.get_slice(key)
                if part.get_dtype() != "F32" or len(part.get_shape()) != 1:
                    raise ValueError(f"{key!r} is {part.get_dtype()} {part.get_shape()}, not flat F32")
                self._pieces[kind, name].append(_Piece(start, part.get_shape()[0], opened, key))
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"{file}: cannot be read: {error}.") from None

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the logical shape of a parameter; see `WeightsReader.shape`."""
        if name not in self.metadata.shapes:
            raise CheckpointError(f"{self.path}: holds no tensor {name!r}; it is from a different model.")
        return self.metadata.shapes[name]

    def kinds(self) -> list[str]:
        """Return what is stored of each parameter; see `WeightsReader.kinds`."""
        return sorted({kind for kind, _ in self._pieces})

    def buffers(self) -> dict[str, int]:
        """Return the number of elements of each buffer, by name."""
        return {name: pieces[0].numel for (kind, name), pieces in self._pieces.items() if kind == BUFFER}

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Return a range of a flattened logical tensor; see `WeightsReader.read`."""
        out = torch.empty(numel, dtype=torch.float32)
        filled = 0
        for piece in self._pieces[kind, name]:
            low, high = max(start + filled, piece.start), min(start + numel, piece.start + piece.numel)
            if low < high and low == start + filled:  # pieces are sorted, so this never skips a gap
                try:
                    part = piece.file.get_slice(piece.key)[low - piece.start : high - piece.start]
                except SafetensorError as error:
                    raise CheckpointError(f"{self.path}: {piece.key} cannot be read: {error}.") from None
                out[low - start : high - start] = part
                filled = high - start
        if filled != numel:
            raise CheckpointError(f"{self.path}: holds {filled} of the {numel} elements requested of {kind} {name!r}.")
        return out


def best_kind(reader: WeightsReader) -> str:
    """Return the kind of the averaged weights if they are stored, otherwise that of the last weights."""
    return "ema" if "ema" in reader.kinds() else "fp32"


def check_same_model(reader: WeightsReader, config: Config, hint: str = "") -> None:
    """Check that weights belong to the model of a configuration.

    Args:
        reader: the weights.
        config: the configuration.
        hint: end of the error's sentence: what the user can do.

    Raises:
        CheckpointError: names the first key that differs, and both values.
    """
    different = first_difference(reader.config, config)
    if different is not None:
        key, old, new = different
        raise CheckpointError(
            f"{reader.path}: belongs to another model: {key} is {old!r} there and {new!r} here{hint}."
        )


def first_difference(saved: Config, wanted: Config, except_for: tuple[str, ...] = ()) -> tuple[str, Any, Any] | None:
    """Return the first key in which two models differ, and its value in each; None if weights of one fit the other.

    Args:
        saved: the one model.
        wanted: the other one.
        except_for: keys of the model that may differ.
    """
    size = vars(saved.size)
    pairs: list[tuple[str, Any, Any]] = [("routing.num_experts", saved.num_experts, wanted.num_experts)]
    pairs += [(f"model.{key}", getattr(saved.size, key), getattr(wanted.size, key)) for key in size]
    was, now = config_to_dict(saved), config_to_dict(wanted)
    pairs += [
        (f"{section}.{key}", was[section][key], now[section][key])
        for section, keys in FIXED.items()
        for key in keys
        if key not in size and key not in except_for
    ]
    if "label_dropout" not in except_for and _has_null(saved) != _has_null(wanted):
        dropout = saved.model.label_dropout, wanted.model.label_dropout
        pairs.append(("model.label_dropout (zero or positive)", *dropout))
    return next((pair for pair in pairs if pair[1] != pair[2]), None)


def check_same_moments(reader: CheckpointReader, optimizer: str) -> None:
    """Check that a run can continue with the moments of a checkpoint; those of Adam and AdamW are the same.

    Args:
        reader: the checkpoint.
        optimizer: type of the optimizer that wants them.

    Raises:
        CheckpointError: names both optimizers.
    """
    saved = reader.metadata.optimizer
    if MOMENTS[saved] != MOMENTS[optimizer]:
        raise CheckpointError(
            f"{reader.path}: has the moments of {saved}, but optimizer.type is {optimizer}; set {saved}, or start a "
            "new run from its weights with model.init_from."
        )


@torch.no_grad()
def restore_weights(model: DiT, reader: WeightsReader, topology: Topology, kind: str) -> None:
    """Fill a model with weights.

    Args:
        model: holds the experts of this rank; its values need not be initialized, except for the class embedding.
        reader: the weights; if their class embedding has other rows, the model keeps its own.
        topology: which experts this rank holds.
        kind: ``fp32`` or ``ema``.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
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
    """Restore this rank's master weights, moments and averaged weights, and the counters.

    Args:
        engine: built from a model that `restore_weights` filled.
        reader: the checkpoint.
        fragments: the fragments of this rank.
        ema: the averaged weights of each fragment.

    Raises:
        CheckpointError: the checkpoint lacks a part of a fragment.
    """
    from diffmoe_ds.distributed.deepspeed_seam import set_adam_step

    for fragment, averaged in zip(fragments, ema, strict=True):
        targets = {"fp32": fragment.fp32, "ema": averaged, **fragment.moments}
        for kind, target in targets.items():
            target.copy_(reader.read(kind, fragment.name, fragment.start, target.numel()))
    saved = reader.metadata
    set_adam_step(engine, saved.adam_step)
    engine.global_steps = saved.step
    engine.global_samples = saved.images
    if engine.lr_scheduler is None:  # or no longer: the learning rate is that of the optimizer's settings
        return
    if saved.step:  # computed, not restored: the schedule may have been added or changed since
        engine.lr_scheduler.step((saved.lr_scheduler or {}).get("last_batch_iteration", saved.step - 1))


def _has_null(config: Config) -> bool:
    """Return whether a model's class embedding has a row for "no label"."""
    return config.model.label_dropout > 0
