"""Export a model as a folder that diffusers loads: its own classes where they fit, otherwise our two files.

model_index.json
README.md               model card
pipeline.py             our pipeline
conditioner/            of a text model: config.json, the weights and diffmoe_conditioner.py
transformer/            config.json, the weights and, unless diffusers has the class, diffmoe_transformer.py
scheduler/              for `DiTPipeline`, if it can generate with the model
vae/                    copy of the VAE of a latent model, if it is known
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffmoe_ds.checkpoint.architecture import has_null
from diffmoe_ds.checkpoint.export import WEIGHTS
from diffmoe_ds.checkpoint.layout import BUFFER
from diffmoe_ds.checkpoint.load import PROJECTOR, WeightsReader
from diffmoe_ds.checkpoint.stream import Entry, write_safetensors
from diffmoe_ds.config.fields import short_repr
from diffmoe_ds.config.schema import Config
from diffmoe_ds.control_files import read_json
from diffmoe_ds.errors import CheckpointError, ConfigError
from diffmoe_ds.files import expand_user, write_json, write_text
from diffmoe_ds.interop.stock import scheduler_config, stock_problems, transformer_config, transformer_weights
from diffmoe_ds.model.conditioning import context_width
from diffmoe_ds.model.dit import empty_model
from diffmoe_ds.outputs import new_directory
from diffmoe_ds.sampling.generate import PIXEL_CHANNELS
from diffmoe_ds.text import counted
from diffmoe_ds.text_features import TextFormat

STANDALONE = Path(__file__).parent / "standalone"
"""The files that are copied into the folder."""
VAE_CONFIG = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
CONDITIONER = "y_embedder."
"""What the names of a conditioner's tensors start with in our model."""
HUB_NAMES = {"minilm": "sentence-transformers/all-MiniLM-L6-v2"}
"""The hub's names of text encoders that the package finds by itself."""
STOCK_CLASSES = 1000
"""Number of classes of `DiTPipeline`, which takes the label after them for "no label"."""
OLDEST_DIFFUSERS = "0.35.0"
"""Version named in the files; the ``vae`` extra's minimum."""


UNSUPPORTED = {
    "model": ("qk_norm", "norm", "positions"),
    "routing": (
        "expert_mlp", "expert_width", "shared_width", "dense_blocks", "affinity", "score", "router_input",
        "renormalize", "weight_scale", "groups", "bias_rate", "unconditional_expert",
    ),
    "objective": ("flow_direction",),
}  # fmt: skip
"""Keys that `DiffMoETransformer2DModel` does not have, by section."""


@dataclass(frozen=True)
class Vae:
    """A VAE's folder that can be copied."""

    folder: Path
    """The folder with its ``config.json`` and weights."""
    settings: dict[str, Any]
    """Its ``config.json``."""


@dataclass(frozen=True)
class FolderExport:
    """What an export contains, decided before anything is written."""

    reader: WeightsReader
    """The model."""
    weights: str
    """``ema`` or ``raw``."""
    dtype: torch.dtype
    """Type of the weights in the file; thresholds stay fp32."""
    vae: Vae | None
    """The VAE to copy, if any."""

    @property
    def config(self) -> Config:
        """The model's configuration."""
        return self.reader.config

    @property
    def is_latent(self) -> bool:
        """Whether the model generates latents."""
        return self.config.model.in_channels not in PIXEL_CHANNELS

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each class; empty if they are unknown, or images are generated from prompts."""
        names = () if self.config.is_text else self.reader.class_names or ()
        return names[: self.config.model.num_classes]

    @property
    def has_stock_transformer(self) -> bool:
        """Whether the transformer is diffusers' `DiTTransformer2DModel`."""
        return not stock_problems(self.config)

    @property
    def obstacles(self) -> list[str]:
        """Why `DiTPipeline` cannot generate with the model, as phrases; an empty list if it can."""
        found = stock_problems(self.config)
        if not self.is_latent:
            found.append("the model generates pixels")
        if self.config.model.num_classes != STOCK_CLASSES:
            found.append(f"model.num_classes is {self.config.model.num_classes}")
        if self.vae is not None and self.vae.settings.get("shift_factor"):
            found.append("the VAE has a shift_factor")
        return found


def read_vae(path: Path, config: Config, name: str = "--vae") -> Vae:
    """Return a VAE that can be copied.

    Args:
        path: its folder, or that of a pipeline with a ``vae`` in it.
        config: the model whose latents it decodes.
        name: the option or key that names it, for messages.

    Raises:
        ConfigError: it is not an `AutoencoderKL` with safetensors weights, or does not fit the model.
    """
    folder = path / "vae" if os.path.isdir(path / "vae") else path
    try:
        settings = read_json(folder / VAE_CONFIG)
        channels = settings["latent_channels"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{name} {path}: not a folder with a diffusers AutoencoderKL.") from None
    if not list(folder.glob("*.safetensors")):
        raise ConfigError(f"{name} {path}: holds no weights in safetensors files.")
    if config.model.in_channels in PIXEL_CHANNELS:
        raise ConfigError(
            f"{name} {path}: the model generates pixels ({counted(config.model.in_channels, 'channel')}); omit it."
        )
    if channels != config.model.in_channels:
        raise ConfigError(
            f"{name} {path} decodes latents of {short_repr(channels)} channels, but the model generates "
            f"{config.model.in_channels}."
        )
    return Vae(folder, settings)


def find_vae(config: Config) -> Vae | None:
    """Return the VAE that a run's configuration names, if it is a folder on this machine; otherwise None.

    Raises:
        ConfigError: it is a folder, but does not fit the model.
    """
    name, path = ("eval.vae", config.eval.vae) if config.eval.vae else ("data.vae", config.data.vae)
    if path is None or config.model.in_channels in PIXEL_CHANNELS or not expand_user(path).is_dir():
        return None
    return read_vae(expand_user(path), config, f"{name} of the run,")


def write_folder(export: FolderExport, out: Path, card: str) -> None:
    """Write the folder; it appears when it is complete.

    Args:
        export: what it contains.
        out: the folder; must not exist, or be empty.
        card: contents of ``README.md``.

    Raises:
        CheckpointError: ``out`` exists, the model cannot be read, or the folder cannot be written; nothing of it is
            left.
    """
    check_new(out)
    out = Path(os.path.abspath(out))  # "." has no name
    with new_directory(out) as tmp:
        (tmp / "transformer").mkdir()
        write_text(tmp / "README.md", card)
        write_json(tmp / "model_index.json", _model_index(export))
        write_text(tmp / "pipeline.py", (STANDALONE / "pipeline.py").read_text(encoding="utf-8"))
        _write_transformer(export, tmp / "transformer")
        if export.reader.text is not None:
            _write_conditioner(export, export.reader.text, tmp / "conditioner")
        if not export.obstacles:
            (tmp / "scheduler").mkdir()
            write_json(tmp / "scheduler" / "scheduler_config.json", _versioned(scheduler_config()))
        if export.vae is not None:
            (tmp / "vae").mkdir()
            for file in (export.vae.folder / VAE_CONFIG, *export.vae.folder.glob("*.safetensors*")):
                shutil.copyfile(file, tmp / "vae" / file.name)


def check_new(out: Path) -> None:
    """Check that a folder can be created.

    Raises:
        CheckpointError: something is there already.
    """
    if os.path.lexists(out) and not (os.path.isdir(out) and not os.listdir(out)):
        raise CheckpointError(f"--out {out}: already exists; pass a new folder.")


def check_supported(config: Config) -> None:
    """Check that our `DiffMoETransformer2DModel` has everything that a model uses.

    Raises:
        ConfigError: it has not.
    """
    defaults = Config()
    for section, keys in UNSUPPORTED.items():
        for key in keys:
            value, default = getattr(getattr(config, section), key), getattr(getattr(defaults, section), key)
            if value != default and (section != "routing" or config.num_experts > 1):
                raise ConfigError(
                    f"--format diffusers: {section}.{key} is {value}, but folders for diffusers support only its "
                    "default so far; omit the option to export the model in our own format."
                )
    if config.routing.kind == "expert_race":
        raise ConfigError("--format diffusers: routing.kind expert_race is not supported so far; omit the option.")
    if config.model.mlp == "silu":
        raise ConfigError(
            "--format diffusers: model.mlp is silu, but folders for diffusers support only gelu and swiglu so far."
        )


def _model_index(export: FolderExport) -> dict[str, Any]:
    if export.has_stock_transformer:
        transformer = ["diffusers", "DiTTransformer2DModel"]
    else:
        transformer = ["diffmoe_transformer", "DiffMoETransformer2DModel"]
    tree: dict[str, Any] = {
        "_class_name": ["pipeline", "DiffMoEPipeline"] if export.obstacles else "DiTPipeline",
        "transformer": transformer,
    }
    if not export.obstacles:
        tree["scheduler"] = ["diffusers", "DDIMScheduler"]
    if export.config.is_text:
        tree["conditioner"] = ["diffmoe_conditioner", "DiffMoETextConditioner"]
    if export.vae is not None:
        tree["vae"] = ["diffusers", "AutoencoderKL"]
    if export.class_names:
        tree["id2label"] = {str(label): name for label, name in enumerate(export.class_names)}
    return _versioned(tree)


def _versioned(tree: dict[str, Any]) -> dict[str, Any]:
    return {"_class_name": tree["_class_name"], "_diffusers_version": OLDEST_DIFFUSERS, **tree}


def _write_transformer(export: FolderExport, folder: Path) -> None:
    is_stock = export.has_stock_transformer
    tree = transformer_config(export.config) if is_stock else diffmoe_config(export.config)
    write_json(folder / "config.json", _versioned(tree))
    if not is_stock:
        name = "diffmoe_transformer.py"
        write_text(folder / name, (STANDALONE / name).read_text(encoding="utf-8"))
    entries = list(_stock_entries(export) if is_stock else _entries(export))
    if export.config.is_text:
        entries = [entry for entry in entries if not entry.name.startswith(CONDITIONER)]
    write_safetensors(folder / WEIGHTS_FILE, entries, {"format": "pt"})


def encoder_name(name: str) -> str:
    """Return the folder or hub ID of a text encoder for users without this package."""
    return HUB_NAMES.get(name, name)


def _write_conditioner(export: FolderExport, text: TextFormat, folder: Path) -> None:
    folder.mkdir()
    width = export.config.size.hidden_size
    encoders = [asdict(encoder) | {"name": encoder_name(encoder.name)} for encoder in text.encoders]
    tree = {"_class_name": "DiffMoETextConditioner", "width": width, "encoders": encoders}
    tree["context_width"] = context_width(text.layout, width)
    write_json(folder / "config.json", _versioned(tree))
    name = "diffmoe_conditioner.py"
    write_text(folder / name, (STANDALONE / name).read_text(encoding="utf-8"))
    entries = [
        entry._replace(name=entry.name.removeprefix(CONDITIONER))
        for entry in _entries(export)
        if entry.name.startswith(CONDITIONER)
    ]
    write_safetensors(folder / WEIGHTS_FILE, entries, {"format": "pt"})


def diffmoe_config(config: Config) -> dict[str, Any]:
    """Return ``transformer/config.json`` of any model as our `DiffMoETransformer2DModel`."""
    size, model, routing, objective = config.size, config.model, config.routing, config.objective
    return {
        "_class_name": "DiffMoETransformer2DModel",
        "sample_size": model.input_size,
        "in_channels": model.in_channels,
        "patch_size": model.patch_size,
        "num_classes": model.num_classes,
        "has_null_class": has_null(config),
        "objective": {
            "kind": objective.kind,
            "time_scale": objective.flow_time_scale if objective.kind == "flow" else 1.0,
        },
        "size": {
            "hidden_size": size.hidden_size,
            "depth": size.depth,
            "num_heads": size.num_heads,
            "ffn": model.mlp,
            "ffn_hidden_size": int(size.hidden_size * model.mlp_ratio),
            "cross_attention": {
                "context_width": context_width(config.text_layout, size.hidden_size),
                "qk_norm": model.text_qk_norm,
            }
            if config.is_text
            else None,
        },
        "routing": {
            "kind": routing.kind,
            "num_experts": config.num_experts,
            "capacity": routing.capacity,
            "interleave": routing.interleave,
            "shared_experts": routing.shared_experts,
            "capacity_predictor": config.has_capacity_predictor,
            "rules": list(config.inference_choices),
        },
    }


def _entries(export: FolderExport) -> Iterator[Entry]:
    """Yield the tensors under our names; each is read when it is written."""
    model = empty_model(export.config)
    buffers = dict(model.named_buffers())
    for name, tensor in model.state_dict().items():
        if name.startswith(PROJECTOR):
            continue  # only training uses it
        kind, dtype = (BUFFER, torch.float32) if name in buffers else (WEIGHTS[export.weights], export.dtype)
        yield Entry(name, tuple(tensor.shape), dtype, _read_lazily(export.reader, kind, name, dtype, tensor.numel()))


def _read_lazily(reader: WeightsReader, kind: str, name: str, dtype: torch.dtype, numel: int) -> Iterator[Tensor]:
    yield reader.read(kind, name, 0, numel).to(dtype)


def _stock_entries(export: FolderExport) -> Iterator[Entry]:
    """Yield the tensors under diffusers' names."""
    read = {entry.name: torch.cat(list(entry.pieces)).view(entry.shape) for entry in _entries(export)}
    for name, tensor in transformer_weights(read):
        yield Entry(name, tuple(tensor.shape), export.dtype, [tensor])
