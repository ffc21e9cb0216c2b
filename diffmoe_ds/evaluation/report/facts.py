"""The numbers of a report: what was trained, sampled and measured, as text."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from diffmoe_ds.checkpoint.load import CheckpointReader, WeightsReader
from diffmoe_ds.config.schema import Config
from diffmoe_ds.evaluation.report.history import History
from diffmoe_ds.evaluation.report.probe import Probe
from diffmoe_ds.evaluation.report.style import short_number
from diffmoe_ds.planning.flops import flops_per_image
from diffmoe_ds.planning.parameters import count_parameters
from diffmoe_ds.sampling.generate import SamplingSettings
from diffmoe_ds.sampling.grid import Pixels
from diffmoe_ds.sampling.samplers import ADAPTIVE
from diffmoe_ds.text import counted, shortened

PACKAGES = ("diffmoe_ds", "torch", "deepspeed", "numpy", "matplotlib")
"""Packages whose versions are listed in a report."""
SHOWN_CLASSES = 20
"""Largest number of classes in a table."""
ROUTERS = {
    "token_choice": "token choice (TC-DiT)",
    "expert_choice": "expert choice (EC-DiT)",
    "batch_pool": "batch pool (DiffMoE)",
    "expert_race": "expert race (Race-DiT)",
}
"""Names of the routers of models with experts."""


def router_name(config: Config) -> str:
    """Return the name of a model's router in reports and model cards; ``dense`` without experts."""
    return "dense" if config.num_experts == 1 else ROUTERS[config.routing.kind]


class Nouns(NamedTuple):
    """What the labels of generated images are."""

    one: str
    many: str


CLASSES, PROMPTS = Nouns("class", "classes"), Nouns("prompt", "prompts")


@dataclass(frozen=True)
class ModelUse:
    """A model and how it is used."""

    reader: WeightsReader
    """The weights."""
    kind: str
    """Which of them: a kind of the reader."""
    routing: str
    """The inference rule."""
    dtype: torch.dtype
    """Type of the weights and activations."""
    device: torch.device
    """Where it runs."""
    vae: str | None
    """Decoder of a latent model."""
    capacity: float | None = None
    """The requested capacity; None for the training capacity."""


@dataclass(frozen=True)
class Sampled:
    """The generated images of a report and how they were generated."""

    used: ModelUse
    """The model."""
    settings: SamplingSettings
    """Sampler and guidance."""
    seed: int
    """The first seed of each class or prompt."""
    classes: tuple[int, ...]
    """The classes, or the numbers of the prompts."""
    probe: Probe
    """The images and their routing."""
    guided: Sequence[int]
    """Classes or prompts of the images generated at several guidance scales."""
    pictures_G: Mapping[float, Pixels]
    """These images, uint8 [N, H, W, C], by guidance scale; empty for a model without guidance."""
    thresholds: Mapping[int, Sequence[float]]
    """The checkpoint's thresholds by block of the MoE layer; empty without a capacity predictor."""
    seconds: float
    """Generation time."""
    prompts: tuple[str, ...] = ()
    """The prompts of a text model."""

    @property
    def nouns(self) -> Nouns:
        """What the labels are."""
        return PROMPTS if self.prompts else CLASSES

    @property
    def evidence(self) -> str:
        """Number of images and steps in the routing figures."""
        images, labels = len(self.probe.label_N), len(self.classes)
        each = " each" if images > 1 else ""
        return f"{counted(images, 'image')} of {labels:,} {self.nouns[labels > 1]}, {self.steps}{each}"

    @property
    def steps(self) -> str:
        """The number of sampler steps, in words."""
        if self.settings.sampler in ADAPTIVE:
            return "adaptive steps"
        return f"{self.settings.steps} step{'s' * (self.settings.steps > 1)}"


def model_table(config: Config) -> dict[str, str]:
    """Describe a model."""
    model, routing, size = config.model, config.routing, config.size
    counts, flops = count_parameters(config), flops_per_image(config)
    shape = f"{model.input_size} by {model.input_size}, patch {model.patch_size}"
    rows = {
        "model": config.model_name,
        "blocks, width, heads": f"{size.depth}, {size.hidden_size}, {size.num_heads}",
        "input": f"{counted(model.in_channels, 'channel')}, {shape}",
        "tokens per image": f"{config.tokens_per_image:,}",
        **({"conditioning": "text"} if config.is_text else {"classes": f"{model.num_classes:,}"}),
        "objective": "rectified flow" if config.objective.kind == "flow" else "DDPM",
        "router": router_name(config),
    }
    if config.num_experts > 1:
        rows |= {
            "experts per MoE layer": f"{config.num_experts} in {len(config.moe_blocks)} layers",
            **({"router options": ", ".join(config.router_options)} if config.router_options else {}),
            "training capacity": f"{routing.capacity:g} expert{'s' * (routing.capacity != 1)} per token",
        }
    if config.has_pool:
        rows["pool"] = routing.pool
    return rows | {
        "parameters": f"{counts.total:,}",
        "activated per token": f"{counts.activated:,}",
        "forward pass": f"{flops.forward / 1e9:.3g} GFLOP per image",
    }


def training_table(config: Config, history: History, reader: WeightsReader | None) -> dict[str, str]:
    """Describe a training run from its logs and its checkpoint.

    Args:
        config: of the run.
        history: of the run.
        reader: the run's checkpoint; None without one.
    """
    kind = reader.metadata.optimizer if isinstance(reader, CheckpointReader) else "AdamW"
    rows = {
        "data": config.data.path or "embedded Fashion-MNIST",
        "optimizer": f"{kind}, lr {config.optimizer.lr:g}, betas {', '.join(f'{b:g}' for b in config.optimizer.betas)}",
        "EMA decay": f"{config.ema.decay:g}{' with warm-up' if config.ema.warmup else ''}",
        "label dropout": f"{config.model.label_dropout:g}",
        "seed": str(config.run.seed),
        "planned length": f"{config.run.total_images:,} images",
    }
    if history.rows:
        rows["logged"] = f"{history.last['images']:,.0f} images in {history.rows:,} steps"
        if history.seconds > 0:
            speed = history.last["images"] / history.seconds
            rows["time in steps"] = f"{clock(history.seconds)}, {speed:,.0f} images per second on average"
        if isinstance(memory := history.last.get("peak_memory_mb"), (int, float)):
            rows["peak memory"] = f"{memory:,.0f} MiB on rank 0"
    if isinstance(reader, CheckpointReader):
        layout = reader.metadata.layout.known()
        labels = {"world": "ranks", "ep_size": "expert-parallel size", "zero_stage": "ZeRO stage"}
        labels |= {"global_batch": "global batch", "micro_batch": "micro-batch", "accumulation": "accumulation"}
        rows |= {labels[key]: f"{value:,}" for key, value in layout.items()}
    return rows


def sampling_table(sampled: Sampled, names: Mapping[int, str]) -> dict[str, str]:
    """Describe how the images were generated; ``names`` holds the known class names."""
    settings, used = sampled.settings, sampled.used
    listed = [f"{label} {names[label]}" if label in names else str(label) for label in sampled.classes]
    classes = ", ".join(listed[:SHOWN_CLASSES]) + (", …" if len(listed) > SHOWN_CLASSES else "")
    images = len(sampled.probe.label_N)
    last_seed = sampled.seed + (images - 1) // len(sampled.classes)
    seeds = f"{sampled.seed} to {last_seed}" if last_seed > sampled.seed else str(sampled.seed)
    rows = {
        "checkpoint": str(used.reader.path),
        "trained on": f"{used.reader.images:,} images" if used.reader.images else "unknown",
        "written": _modified(used.reader.path),
        "weights": "EMA" if used.kind == "ema" else "last (raw)",
        "sampler": f"{settings.sampler}, {sampled.steps}",
        "guidance scale": f"{settings.cfg_scale:g}" + (" (none)" if settings.cfg_scale == 1 else ""),
        **({"routing": used.routing} if sampled.probe.layers else {}),
        **({"capacity": f"{used.capacity:g}"} if used.capacity is not None else {}),
        "precision": str(used.dtype).removeprefix("torch."),
        "device": device_name(used.device),
        "images": f"{images:,}",
        "seeds": seeds + (f", the same for every {sampled.nouns.one}" if len(sampled.classes) > 1 else ""),
    }
    if used.reader.text is not None:
        rows["text encoders"] = ", ".join(encoder.name for encoder in used.reader.text.encoders)
    else:
        rows["classes"] = classes
    if sampled.pictures_G:
        count = sum(len(pictures) for pictures in sampled.pictures_G.values())
        rows["images for guidance"] = f"{count}, seed {sampled.seed}"
    if settings.guidance_interval is not None:
        rows["guidance interval"] = "noise level {:g} to {:g}".format(*settings.guidance_interval)
    for name, value in {"autoguidance": settings.autoguidance, "VAE": used.vae}.items():
        if value is not None:
            rows[name] = value
    return rows | {"time": clock(sampled.seconds)}


def prompt_table(sampled: Sampled) -> dict[str, str]:
    """Describe the compute of each prompt, the hardest first; without experts, its number of images."""
    names = {label: f"{label + 1}. {shown_prompt(sampled.prompts[label])}" for label in sampled.classes}
    capacity_NKL, label_N = sampled.probe.capacity_NKL, sampled.probe.label_N
    if capacity_NKL is None:
        return {name: counted(int((label_N == label).sum()), "image") for label, name in names.items()}
    mean_N = np.nanmean(capacity_NKL, axis=(1, 2))
    mean = {label: float(mean_N[label_N == label].mean()) for label in names}
    hardest = sorted(names, key=lambda label: -mean[label])
    return {names[label]: f"{mean[label]:.3f} experts per token" for label in hardest}


def shown_prompt(prompt: str) -> str:
    """Return a prompt in one line that can be drawn."""
    letters = (letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(prompt.split()))
    return shortened("".join(letters), 300) or "(empty prompt)"


def software_table() -> dict[str, str]:
    """Describe the software and the machine that made the report."""
    now = datetime.now(timezone.utc)
    rows = {"report made": f"{now:%Y-%m-%d %H:%M} UTC", "Python": platform.python_version()}
    for name in PACKAGES:
        try:
            rows[name] = version(name)
        except PackageNotFoundError:  # our own package, if it runs from a checkout
            continue
    return rows | {"system": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} CPU threads"}


def key_numbers(config: Config, history: History, sampled: Sampled | None) -> dict[str, str]:
    """Return the most important numbers by name."""
    counts = count_parameters(config)
    numbers = {"parameters": short_number(counts.total)}
    if counts.activated != counts.total:
        numbers["activated per token"] = short_number(counts.activated)
    if sampled is not None and sampled.used.reader.images:
        numbers["images trained on"] = short_number(sampled.used.reader.images)
    elif history.rows:  # without a checkpoint
        numbers["images trained on"] = short_number(history.last["images"])
    if "diffusion_loss" in history.curves:
        values = history.curves["diffusion_loss"].value_P
        numbers["diffusion loss"] = f"{values[-max(1, len(values) // 20) :].mean():.4f}"
    if history.validation is not None and len(history.validation.loss.value_P):
        numbers["validation loss"] = f"{history.validation.loss.value_P[-1]:.4f}"
    if sampled is not None and sampled.probe.capacity_NKL is not None:
        numbers["experts per token, sampling"] = f"{np.nanmean(sampled.probe.capacity_NKL):.2f}"
    if history.seconds >= 1:
        numbers["time in steps"] = clock(history.seconds)  # without validation, checkpoints and startup
    return numbers


def device_name(device: torch.device) -> str:
    """Return the name of the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def clock(seconds: float) -> str:
    """Return a duration, such as 45 s, 2:03 min or 3:20 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def _modified(path: Path) -> str:
    try:
        return f"{datetime.fromtimestamp(path.stat().st_mtime, timezone.utc):%Y-%m-%d %H:%M} UTC"
    except OSError:
        return "unknown"
