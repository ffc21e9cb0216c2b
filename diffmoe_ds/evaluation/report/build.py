"""Assemble a report: the sections, figures and tables for a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffmoe_ds.config.schema import Config
from diffmoe_ds.data.sources.shards import EMBEDDED_CLASSES
from diffmoe_ds.evaluation.report.curves import threshold_drawings, training_drawings, validation_drawings
from diffmoe_ds.evaluation.report.facts import (
    ModelUse,
    Sampled,
    key_numbers,
    model_table,
    prompt_table,
    router_name,
    sampling_table,
    shown_prompt,
    software_table,
    training_table,
)
from diffmoe_ds.evaluation.report.history import History
from diffmoe_ds.evaluation.report.page import Page, Section
from diffmoe_ds.evaluation.report.routing import Routed, compute_drawings, findings, load
from diffmoe_ds.evaluation.report.samples import class_drawing, guidance_drawing
from diffmoe_ds.evaluation.report.style import shorten
from diffmoe_ds.sampling.generate import PIXEL_CHANNELS


@dataclass(frozen=True)
class Contents:
    """Inputs of a report."""

    source: str
    """The run, as given by the user."""
    config: Config
    """The model's configuration."""
    trained: Config
    """The run's configuration, which may have changed since the checkpoint."""
    history: History
    """The run's logs."""
    sampled: Sampled | None
    """Generated images, if any."""
    is_foreign: bool
    """Whether the model is from outside the run, so that it may belong to another run."""
    command: str
    """The command line."""
    no_images: str
    """Why there are no images, if there are none."""


def build_page(contents: Contents) -> Page:
    """Return the page of a report, with figures in the current style."""
    config, history, sampled = contents.config, contents.history, contents.sampled
    sections = [_training(history)]
    if sampled is not None:
        known = class_names(config, sampled)
        names = {label: known.get(label, f"{sampled.nouns.one} {label}") for label in sampled.classes}
        sections += [_samples(sampled, names), *_routing(contents, sampled, names)]
    size = config.model.input_size
    kind = "pixels" if config.model.in_channels in PIXEL_CHANNELS else "latents"
    reader = None if sampled is None or contents.is_foreign else sampled.used.reader
    tables = {
        "Model": model_table(config),
        "Training": {"run": contents.source, **training_table(contents.trained, history, reader)},
    }
    if sampled is not None:
        tables["Generated images"] = sampling_table(sampled, class_names(config, sampled))
        if sampled.prompts:
            tables["Prompts"] = prompt_table(sampled)
    return Page(
        title=Path(contents.source).resolve().name,
        subtitle=(
            f"{config.model_name}, {router_name(config)}, "
            f"{'rectified flow' if config.objective.kind == 'flow' else 'DDPM'} on {size} by {size} {kind}, "
            f"trained on {shorten(config.data.path or 'the embedded Fashion-MNIST', 80)}"
        ),
        numbers=key_numbers(config, history, sampled),
        sections=sections,
        tables={**tables, "Software": software_table()},
        command=contents.command,
        notes=notes(contents),
    )


def class_names(config: Config, sampled: Sampled) -> dict[int, str]:
    """Return the class names or the prompts of the generated images by label; empty if unknown.

    Bytes of a folder's name that are not valid UTF-8 become escapes, which can be drawn.
    """
    if sampled.prompts:
        return {label: shown_prompt(sampled.prompts[label]) for label in sampled.classes}
    known: Sequence[str] = sampled.used.reader.class_names or ()
    if not known and config.data.path is None and config.model.num_classes == len(EMBEDDED_CLASSES):
        known = EMBEDDED_CLASSES
    drawn = {label: known[label].encode(errors="backslashreplace") for label in sampled.classes if label < len(known)}
    return {label: name.decode() for label, name in drawn.items()}


def notes(contents: Contents) -> list[str]:
    """Return notes on what is missing or easily misread."""
    config, history, sampled = contents.config, contents.history, contents.sampled
    found = []
    if sampled is not None and contents.is_foreign:
        found.append(
            f"The losses, the curves and the training table are of the run {contents.source}; the model and its images "
            f"are from {sampled.used.reader.path}, outside the run."
        )
    if sampled is None:
        found.append(contents.no_images)
    elif config.model.in_channels not in PIXEL_CHANNELS and sampled.used.vae is None:
        found.append(
            "The model generates latents. Without --vae, images show their first three channels, roughly scaled."
        )
    if sampled is not None and 0 < sampled.used.reader.images < config.run.total_images and history.rows:
        share = sampled.used.reader.images / config.run.total_images
        found.append(
            f"The checkpoint is from {share:.0%} of the planned training ({sampled.used.reader.images:,} of "
            f"{config.run.total_images:,} images)."
        )
    return found


def _training(history: History) -> Section:
    drawings = [*training_drawings(history), *validation_drawings(history.validation)]
    text = "Losses and throughput over the number of images trained on."
    if not history.rows:
        text = "There are no curves, because the run has no metrics.jsonl."
    elif history.validation is None:
        text += " The run has no validation loss."
    return Section("Training", text, drawings)


def _samples(sampled: Sampled, names: Mapping[int, str]) -> Section:
    settings = sampled.settings
    how = f"Sampler {settings.sampler}, {sampled.steps}"
    guided = f"{how}, guidance scale {settings.cfg_scale:g}"
    drawings = [class_drawing(sampled.probe, names, sampled.nouns, sampled.seed, guided)]
    text = f"Images from the first seeds, ordered by {sampled.nouns.one}."
    if sampled.pictures_G:
        about = f"{how}, seed {sampled.seed}"
        drawings.append(guidance_drawing(sampled.pictures_G, sampled.guided, names, sampled.nouns, about))
    else:
        text += " The model was trained without label dropout, so it does not support classifier-free guidance."
    return Section("Samples", text, drawings)


def _routing(contents: Contents, sampled: Sampled, names: Mapping[int, str]) -> list[Section]:
    """Return the sections on experts."""
    config = contents.config
    if not sampled.probe.layers:
        return [Section("Experts", "The model is dense: all tokens pass through the same layers, without routing.")]
    routed = Routed(sampled.probe, config.routing.capacity, names, sampled.nouns, sampled.evidence)
    compute = compute_drawings(routed)
    text = f"{_rule(config, sampled.used)} {findings(routed)}"
    if sampled.settings.cfg_scale != 1:
        text += " With guidance, only the conditional pass is shown."
    drawn_load = load(routed)
    experts = "How evenly the experts are used, and what determines which tokens they take."
    if drawn_load is None:
        experts = "All experts of a layer take the same number of tokens."
    drawings = [] if drawn_load is None else [drawn_load]
    drawings += threshold_drawings(contents.history, sampled.thresholds, threshold_meaning(sampled.used))
    return [Section("Compute", text, compute), Section("Experts", experts, drawings)]


def threshold_meaning(used: ModelUse) -> str:
    """Return a sentence on how the generated images depend on the trained thresholds."""
    if used.routing == "static":
        return "The images of this report do not depend on the thresholds: their routing is static."
    if used.capacity is not None:
        return f"The images of this report use other thresholds, calibrated to {used.capacity:g} experts per token."
    if used.routing == "dynamic":
        return "An expert takes as many tokens as have a predicted probability above its threshold."
    return "An expert takes a token if the capacity predictor's probability exceeds its threshold."


def _rule(config: Config, used: ModelUse) -> str:
    """Return a sentence on what determines how many experts a token takes."""
    capacity, routing = used.capacity or config.routing.capacity, used.routing
    if config.routing.kind == "token_choice":
        return f"Every token takes {capacity:g} expert{'s' * (capacity != 1)}: compute is the same everywhere."
    if config.routing.kind == "expert_race":
        return (
            "A token takes an expert if its score reaches the layer's threshold."
            if routing == "per_token"
            else "The pairs of a token and an expert in a batch with the highest scores are taken."
        )
    if routing == "per_token":
        return "A token takes an expert if the capacity predictor's probability exceeds the expert's threshold."
    if routing == "dynamic":
        return "The capacity predictor sets how many tokens an expert takes; it takes those with the highest scores."
    among = "each image" if config.routing.kind == "expert_choice" else "a batch of images at the same noise level"
    return f"Every expert takes a fixed number of tokens from {among}: those with the highest scores."
