"""The recipe that ``diffmoe init`` writes: a model, a length and intervals that fit the images and the device."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Initial:
    """A model to fine-tune, whose architecture the run takes over."""

    path: str
    """For ``model.init_from``."""
    name: str
    """The model's name, such as ``S-E8``."""
    objective: str
    """``flow`` or ``ddpm``."""
    has_guidance: bool
    """Whether it was trained with label dropout, which guidance requires."""


@dataclass(frozen=True)
class Facts:
    """What a recipe depends on."""

    path: str
    """The images, for ``data.path``."""
    title: str
    """One line about the images."""
    num_images: int
    num_classes: int
    class_names: Sequence[str]
    """Name of each class; empty if they have none."""
    channels: int
    """Channels C of the model's input."""
    size: int
    """Height and width of the model's input."""
    vae: str | None
    """The VAE that encodes the images during training."""
    gpu_gb: float | None
    """Memory of the GPU; None on a CPU."""
    file: str
    """The recipe's own name, for the commands in its comments."""
    initial: Initial | None = None
    """The model to fine-tune."""
    text_encoder: str | None = None
    """The encoder of the captions; None for a class model."""


@dataclass(frozen=True)
class Scale:
    """A model and how long it trains on a device."""

    model: str
    width: int
    """Width D of a token."""
    lr: float
    betas: str
    batch: int
    """Images per optimizer step."""
    total: int
    """Images of the run."""
    side: int
    """Tokens per row and column of an image, at least."""
    workers: int
    """Processes that read images."""
    why: str
    """Comment on the model."""


# Small batches: in a short run, the number of steps matters more than the noise of the gradient.
CPU = Scale("tiny-E8", 256, 1e-3, "[0.9, 0.99]", 8, 30_000, 8, 1, "for a CPU; use S-E8 or larger on a GPU")
SMALL_GPU = Scale("S-E8", 384, 3e-4, "[0.9, 0.99]", 256, 4_000_000, 16, 8, "for one GPU; B-E8 learns more, more slowly")
LARGE_GPU = Scale(
    "B-E8", 768, 2e-4, "[0.9, 0.99]", 256, 10_000_000, 16, 8, "for a large GPU; S-E8 is three times as fast"
)
PATCH_SHARE = 0.75
"""Largest number of values in a patch, as a share of the width: narrower tokens cannot carry the noise that the network
predicts, and images stay noisy."""
SLOW_TOKENS = 576
"""Tokens per image above which training on pixels is a bad choice."""
MAX_PASSES = 1_000
"""Passes over a small set after which more training only copies it."""
MIN_IMAGES = 100_000
"""Images that a GPU trains on, however small the set is."""
FINE_TUNING = 0.3
"""Learning rate of fine-tuning, relative to that of training from scratch."""
DEEPSPEED = """\
deepspeed:
  train_batch_size: BATCH
  train_micro_batch_size_per_gpu: auto
  gradient_accumulation_steps: 1
  optimizer: {type: AdamW, params: {lr: auto, betas: auto, eps: auto, weight_decay: auto, torch_adam: auto}}
  gradient_clipping: 1.0
  bf16: {enabled: auto}
  zero_optimization: {stage: 1}
  expert_parallel: {autoep_size: auto}
  tensorboard: {enabled: true}
"""
LARGE_GB = 40
"""Memory from which `LARGE_GPU` fits with its gradients and optimizer state."""


def draft(facts: Facts) -> str:
    """Return the recipe as YAML with comments."""
    scale = CPU if facts.gpu_gb is None else (SMALL_GPU if facts.gpu_gb < LARGE_GB else LARGE_GPU)
    total = min(scale.total, max(MAX_PASSES * facts.num_images, MIN_IMAGES))
    steps = math.ceil(total / scale.batch)
    columns = 8 if facts.text_encoder else min(facts.num_classes, 8)
    grid = 4 * columns if columns > 1 else 16
    vae = f"  vae: {_text(facts.vae)}  # encodes the images during training\n" if facts.vae else ""
    encoder = f"  text_encoder: {_text(facts.text_encoder)}  # encodes the captions\n" if facts.text_encoder else ""
    prompt = ' --prompt "..."' if facts.text_encoder else ""
    sampler = "  sampler: ddim\n" if facts.initial and facts.initial.objective == "ddpm" else ""
    return f"""\
# {facts.title}
#   diffmoe train --config {facts.file}
#   diffmoe sample --checkpoint runs/{Path(facts.file).stem}{prompt} --cfg-scale {_guidance(facts)} --out samples
# `diffmoe config SECTION.KEY` explains a key.
{_model(facts, scale)}data:
  path: {_text(facts.path)}
{vae}{encoder}  horizontal_flip: true  # false if mirrored images would be wrong, such as letters
  num_workers: {scale.workers}
optimizer:
  lr: {scale.lr * (FINE_TUNING if facts.initial else 1):.1e}
  betas: {scale.betas}
  warmup_images: {_rounded(total / 50):_}
  schedule: cosine
ema:
  decay: {_decay(steps)}  # averages over the last twentieth of the run
run:
  total_images: {total:_}  # {_passes(total, facts.num_images)}
  log_every_images: {_rounded(total / 30):_}
  sample_every_images: {_rounded(total / 6):_}
  save_every_images: {_rounded(total / 6):_}
sample:
  num_images: {grid}
  steps: 25
{sampler}  cfg_scale: {_guidance(facts)}
""" + DEEPSPEED.replace("BATCH", str(scale.batch))


def _model(facts: Facts, scale: Scale) -> str:
    """Return the sections that describe the model."""
    classes = f"  # {_names(facts.class_names)}" if facts.class_names else ""
    condition = "conditioning: text" if facts.text_encoder else f"num_classes: {facts.num_classes}{classes}"
    kind = {1: "grayscale", 3: "color"}.get(facts.channels, "latents")
    if facts.initial is not None:
        what = f"{facts.initial.name}, {facts.size}x{facts.size}, {kind}"
        return f"""\
model:
  init_from: {_text(facts.initial.path)}  # weights and architecture: {what}
  num_classes: {facts.num_classes}{classes}
"""
    patch = _patch(facts.size, facts.channels, scale)
    tokens = (facts.size // patch) ** 2
    slow = "" if tokens <= SLOW_TOKENS else ", which is slow; for large images, use --vae"
    width = f"  hidden_size: {scale.width}\n" if scale is CPU else ""  # the others are those of the name
    return f"""\
model:
  name: {scale.model}  # {scale.why}
{width}  input_size: {facts.size}  # height and width
  in_channels: {facts.channels}  # {kind}
  patch_size: {patch}  # {tokens} tokens per image{slow}
  {condition}
  mlp_ratio: 2.0
objective:
  flow_time_scale: 1000
  time_distribution: logit_normal
  time_mean: 0.4  # more noise, at which the layout of an image is decided
"""


def _patch(size: int, channels: int, scale: Scale) -> int:
    """Return the largest patch that divides an image into enough tokens and fits into a token."""
    limit = min(size / scale.side, math.sqrt(PATCH_SHARE * scale.width / channels))
    return max(patch for patch in range(1, size + 1) if size % patch == 0 and patch <= max(1, limit))


def _passes(total: int, images: int) -> str:
    """Return a comment on the length of the run."""
    passes = total / images
    more = "with more, the model copies small sets" if passes > 100 else "more give better images"
    return f"{passes:,.{0 if passes >= 10 else 1}f} passes over the images; {more}"


def _guidance(facts: Facts) -> float:
    """Return the guidance scale of samples; without classes or captions, there is nothing to guide to."""
    if facts.text_encoder:
        return 3.0
    has_guidance = facts.initial is None or facts.initial.has_guidance
    return 2.0 if facts.num_classes > 1 and has_guidance else 1.0


def _decay(steps: int) -> float:
    """Return the decay of an average over the last twentieth of the run, and at most the paper's."""
    return min(0.9999, round(1 - 20 / max(steps, 40), 4))


def _rounded(images: float) -> int:
    """Return a number with one significant digit."""
    magnitude = int(10 ** math.floor(math.log10(images)))
    return round(images / magnitude) * magnitude


def _text(value: str) -> str:
    """Return text as YAML; JSON strings are valid YAML."""
    plain = value.replace("/", "").replace("-", "").replace("_", "").replace(".", "")
    return value if plain.isascii() and plain.isalnum() and not plain.isdigit() else json.dumps(value)


def _names(names: Sequence[str]) -> str:
    """Return the first names, on one line of a comment."""
    shown = ", ".join(" ".join(name.split()) for name in names[:6])
    return shown + (", ..." if len(names) > 6 else "")
