"""Implementation of ``diffmoe report``: read the logs, generate images, draw the figures, write the page."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from diffmoe_ds.checkpoint.export import WEIGHTS, not_a_model, open_weights, require_weights
from diffmoe_ds.checkpoint.layout import RESOLVED_RECIPE
from diffmoe_ds.checkpoint.load import WeightsReader, best_kind, check_same_model
from diffmoe_ds.cli.report_prompts import ReportPrompts, choose_report_prompts
from diffmoe_ds.cli.sample_images import parse_classes
from diffmoe_ds.cli.sample_model import read_decoder, read_model
from diffmoe_ds.cli.sampling_options import REPORT_CLASSES, open_guide, resolve_settings
from diffmoe_ds.cli.sampling_plan import DTYPES, default_dtype
from diffmoe_ds.config.load import load_config
from diffmoe_ds.config.schema import Config
from diffmoe_ds.distributed.launch import local_device, resolve_launch
from diffmoe_ds.errors import CheckpointError, ConfigError, DataError
from diffmoe_ds.evaluation.report.build import Contents, build_page
from diffmoe_ds.evaluation.report.facts import ModelUse, Sampled
from diffmoe_ds.evaluation.report.history import History, read_history
from diffmoe_ds.evaluation.report.page import Page, render
from diffmoe_ds.evaluation.report.probe import Images, probe
from diffmoe_ds.evaluation.report.style import styled
from diffmoe_ds.files import write_text
from diffmoe_ds.model.dit import DiT
from diffmoe_ds.outputs import write_together
from diffmoe_ds.precision import set_tf32
from diffmoe_ds.sampling.capacity import apply, calibrate, check_capacity
from diffmoe_ds.sampling.fields import Progress
from diffmoe_ds.sampling.generate import PIXEL_CHANNELS, SamplingSettings
from diffmoe_ds.sampling.labels import cycle_labels
from diffmoe_ds.sampling.stream import Decode, generate_batches
from diffmoe_ds.topology import Topology

GUIDANCE_SCALES = (1.0, 1.5, 2.0, 3.0, 5.0)
"""Scales in the guidance figure, in addition to that of the other images."""
GUIDED_CLASSES = 8
"""Maximum number of images per guidance scale."""
HEAT_MAPS = 16
"""Maximum number of images whose compute per token is recorded."""


@dataclass(frozen=True)
class ReportPlan:
    """The resolved arguments."""

    run: Path | None
    """The run directory; None for a checkpoint or an exported model."""
    reader: WeightsReader | None
    """The model's weights; None for a run without a checkpoint."""
    config: Config
    """The model's configuration."""
    trained: Config
    """The run's configuration; that of the model without a run."""
    classes: tuple[int, ...]
    """The classes to generate, or the numbers of the prompts."""
    settings: SamplingSettings
    """Sampler and guidance."""
    prompts: ReportPrompts | None = None
    """The prompts of a text model."""
    no_images: str = ""
    """Why no images are generated, if none are."""


def run_report(args: argparse.Namespace) -> None:
    """Write a report.

    Args:
        args: of `cli.report.add_report_arguments`, with valid numbers.

    Raises:
        CheckpointError: the run cannot be read, or the report cannot be written.
        ConfigError: an option does not fit the model.
    """
    if resolve_launch().world > 1:
        raise ConfigError("diffmoe report runs in one process; start it without a launcher.")
    plan = plan_report(args)
    _make_folder(args.out)
    history = History() if plan.run is None else read_history(plan.run)
    sampled = None if plan.reader is None or plan.no_images else sample_images(args, plan, plan.reader)
    with styled():
        page = build_page(
            Contents(
                source=str(args.run_path),
                config=plan.config,
                trained=plan.trained,
                history=history,
                sampled=sampled,
                is_foreign=is_foreign(plan),
                command=args.command_line,
                no_images=plan.no_images,
            )
        )
        write_report(page, args.out)


def plan_report(args: argparse.Namespace) -> ReportPlan:
    """Resolve the arguments against the run, without loading weights.

    Raises:
        CheckpointError: there is no run, or its checkpoints are damaged.
        ConfigError: an option does not fit the model or the run.
    """
    path: Path = args.run_path
    is_run = any((path / name).is_file() for name in (RESOLVED_RECIPE, "metrics.jsonl"))
    if args.checkpoint is not None and not is_run:
        raise ConfigError(f"--checkpoint {args.checkpoint} needs a run, but {path} is not a run directory.")
    reader = open_weights(path) if args.checkpoint is None else require_weights(args.checkpoint, "--checkpoint")
    resolved = path / RESOLVED_RECIPE
    trained = load_config(str(resolved)) if resolved.is_file() else None
    if reader is not None and trained is not None and args.checkpoint is not None:
        check_same_model(reader, trained)
    config = trained if reader is None else reader.config
    if config is None:
        raise CheckpointError(f"{path}: {not_a_model(path)}.")
    if args.vae is not None and config.model.in_channels in PIXEL_CHANNELS:
        raise ConfigError(f"{path}: the model generates pixels ({config.model.in_channels} channels); omit --vae.")
    plan = ReportPlan(
        run=path if is_run else None,
        reader=reader,
        config=config,
        trained=trained or config,
        classes=(),
        settings=resolve_settings(args, config),
    )
    if reader is None:
        return replace(plan, no_images="The run has no checkpoint yet, so the report has no images.")
    try:
        prompts = choose_report_prompts(args, reader, plan.trained)
    except DataError as error:
        return replace(plan, no_images=f"The report has no images: {error}.")
    return replace(plan, classes=choose_classes(args, config, reader.class_names or (), prompts), prompts=prompts)


def is_foreign(plan: ReportPlan) -> bool:
    """Return whether the curves are of a run, and the model is from elsewhere."""
    if plan.run is None or plan.reader is None:
        return False
    return not plan.reader.path.resolve().is_relative_to(plan.run.resolve())


def choose_classes(
    args: argparse.Namespace, config: Config, names: Sequence[str], prompts: ReportPrompts | None
) -> tuple[int, ...]:
    """Return the labels to generate: all prompts, or the classes of ``--classes``, otherwise evenly spaced ones.

    Args:
        args: of `cli.report.add_report_arguments`.
        config: of the run.
        names: names of the classes; empty if unknown.
        prompts: of a text model with a checkpoint.

    Raises:
        ConfigError: the model does not have one of the classes, or there are fewer images than labels.
    """
    if prompts is not None:
        count = len(prompts.chosen.texts)
        if args.images < count:
            raise ConfigError(f"--images must be at least the number of prompts, {count}, got {args.images}.")
        return tuple(range(count))
    available = config.model.num_classes
    count = args.num_classes or min(REPORT_CLASSES, available, args.images)
    if count > available:
        raise ConfigError(f"--num-classes must be from 1 to {available} for this model, got {count}.")
    classes = tuple(number * available // count for number in range(count))
    if args.classes is not None:
        classes = parse_classes(args.classes, available, names)
    if args.images < len(classes):
        raise ConfigError(f"--images must be at least the number of classes, {len(classes)}, got {args.images}.")
    return classes


def sample_images(args: argparse.Namespace, plan: ReportPlan, reader: WeightsReader) -> Sampled:
    """Generate the images of a report.

    Raises:
        DiffMoEError: the weights or the VAE cannot be read, or the images contain NaN or Inf.
    """
    used = choose_model(args, plan.config, reader)
    model, guide, decode = load_model(used), load_guide(used, plan.settings), load_decoder(used)
    if plan.prompts is not None:
        plan.prompts.attach([model] if guide is None else [model, guide], reader, used.device)
    thresholds = {
        block: layer.expert_threshold.tolist()
        for block, layer in model.moe_layers().items()
        if layer.capacity_predictor is not None
    }
    if args.capacity is not None:
        apply(model, calibrate(model, plan.settings, args.capacity, guide, args.batch_size))
    labels = cycle_labels(range(args.images), plan.classes)
    seeds = [args.seed + image // len(plan.classes) for image in range(args.images)]
    images = Images(labels, seeds, min(HEAT_MAPS, len(plan.classes), args.images))
    scales, guided = choose_guidance(plan)
    batches = math.ceil(args.images / args.batch_size) + len(scales) * math.ceil(len(guided) / args.batch_size)
    start = time.perf_counter()
    with tqdm(total=batches * plan.settings.steps, unit="step", desc="report") as bar:
        progress = progress_of(bar, plan.settings.steps)
        found = probe(model, images, plan.settings, decode, args.batch_size, progress, guide)
        pictures_G = {}
        for scale in scales:
            settings = replace(plan.settings, cfg_scale=scale)
            same_seed = torch.tensor(guided), [args.seed] * len(guided)
            stream = generate_batches(model, *same_seed, settings, decode, args.batch_size, progress, guide)
            pictures_G[scale] = np.concatenate([pictures for _, pictures in stream])
    return Sampled(
        used=used,
        settings=plan.settings,
        seed=args.seed,
        classes=plan.classes,
        probe=found,
        guided=guided,
        pictures_G=pictures_G,
        thresholds=thresholds,
        seconds=time.perf_counter() - start,
        prompts=() if plan.prompts is None else plan.prompts.chosen.texts,
    )


def choose_model(args: argparse.Namespace, config: Config, reader: WeightsReader) -> ModelUse:
    """Resolve which weights to use, and how to run the model.

    Raises:
        ConfigError: the weights are missing, or the capacity is invalid for the model.
    """
    routing = args.routing or config.inference_choices[0]
    if args.capacity is not None:
        check_capacity(args.capacity, routing, config)
    kind = best_kind(reader) if args.weights is None else WEIGHTS[args.weights]
    if kind not in reader.kinds():
        raise ConfigError(f"--weights {args.weights}: {reader.path} does not hold these weights.")
    device = local_device(resolve_launch())
    return ModelUse(
        reader=reader,
        kind=kind,
        routing=routing,
        dtype=DTYPES[args.dtype] if args.dtype else default_dtype(device),
        device=device,
        vae=args.vae,
        capacity=args.capacity,
    )


def choose_guidance(plan: ReportPlan) -> tuple[list[float], list[int]]:
    """Return the guidance scales to compare and the classes to use; empty lists for a model without guidance."""
    if plan.config.model.label_dropout == 0 and plan.settings.autoguidance is None:
        return [], []
    count = min(GUIDED_CLASSES, len(plan.classes))
    guided = [plan.classes[number * len(plan.classes) // count] for number in range(count)]
    return sorted({*GUIDANCE_SCALES, plan.settings.cfg_scale}), guided


def load_model(used: ModelUse) -> DiT:
    """Return the model in eval mode.

    Raises:
        CheckpointError: the weights cannot be read.
        ConfigError: the model does not support the routing.
    """
    set_tf32(True)
    alone = Topology(0, 1, 1, used.reader.config.num_experts)
    return read_model(used.reader, used.kind, used.routing, alone, used.device, used.dtype)


def load_guide(used: ModelUse, settings: SamplingSettings) -> DiT | None:
    """Return the guiding model of autoguidance, if any.

    Raises:
        CheckpointError: it cannot be read.
        ConfigError: it cannot guide the model.
    """
    reader = open_guide(settings, used.reader.config)
    if reader is None:
        return None
    return load_model(replace(used, reader=reader, kind=best_kind(reader), routing=reader.config.inference_choices[0]))


def load_decoder(used: ModelUse) -> Decode:
    """Return the function that decodes the model's output to pixels in about [-1, 1].

    Without a VAE, latents are shown in gray or false colors, as in the sample grids of training.

    Raises:
        ConfigError: the VAE cannot be loaded, or its latents have a different number of channels.
    """
    channels = used.reader.config.model.in_channels
    if channels in PIXEL_CHANNELS:
        return lambda pixels: pixels
    if used.vae is None:
        shown = 3 if channels > 3 else 1
        return lambda latents: latents[:, :shown] / 4
    return read_decoder(used.vae, channels, used.device)


def progress_of(bar: tqdm[Any], steps: int) -> Progress:
    """Return a progress callback for several consecutive batches.

    Args:
        bar: counts the steps of all batches.
        steps: steps per batch.
    """
    before, last, total_steps = 0, 0.0, bar.total or 0

    def progress(done: int, total: int) -> None:
        nonlocal before, last
        if done / total < last or last == 1:  # the next batch
            before += steps
        last = done / total
        bar.update(min(before + round(last * steps), total_steps) - bar.n)

    return progress


def write_report(page: Page, out: Path) -> None:
    """Write the figures, then the page; each file appears only once complete.

    Raises:
        CheckpointError: a file cannot be written.
    """
    files = {drawing.name: drawing.png() for section in page.sections for drawing in section.drawings}
    writers = {f"{name}.png": partial(_write_bytes, data) for name, data in files.items()}
    write_together(out / "figures", writers)
    write_text(out / "report.html", render(page, files))
    print(f"report in {out / 'report.html'}, {len(files)} figures in {out / 'figures'}")


def _write_bytes(data: bytes, path: Path) -> None:
    path.write_bytes(data)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"--out {path}: cannot create the directory: {error.strerror}.") from None
