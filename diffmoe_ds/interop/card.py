"""The model card of an exported folder: what the model is, how to load it, and its figures."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffmoe_ds.checkpoint.export import initial_weights_warning
from diffmoe_ds.checkpoint.load import WeightsReader
from diffmoe_ds.evaluation.report.facts import router_name
from diffmoe_ds.evaluation.report.history import log_rows
from diffmoe_ds.evaluation.report.style import short_number
from diffmoe_ds.evaluation.table import INCEPTION_LABELS, LABELS
from diffmoe_ds.interop.folder import FolderExport, encoder_name
from diffmoe_ds.interop.stock import FREQ_SHIFT_HINT, stock_problems
from diffmoe_ds.planning.parameters import count_parameters
from diffmoe_ds.text import counted

FRONT_MATTER = """\
---
# license: choose one that the training images permit
library_name: diffusers
pipeline_tag: {pipeline}
tags: [{tags}]
---
"""
HUB_ID = re.compile(r"[\w.-]*\w/[\w.-]+")
"""A VAE on the Hugging Face hub, as opposed to a path."""


def model_card(export: FolderExport) -> str:
    """Return the contents of ``README.md``."""
    is_text = export.config.is_text
    tags = ["image-generation", "class-conditional" if _has_classes(export) else "unconditional"]
    tags = ["text-to-image"] if is_text else tags
    tags += ["diffmoe", "mixture-of-experts"] if export.config.num_experts > 1 else ["dit"]
    sections = [
        FRONT_MATTER.format(
            pipeline="text-to-image" if is_text else "unconditional-image-generation", tags=", ".join(tags)
        ),
        f"# {export.config.model_name}\n\n{_summary(export)}\n",
        f"## Use\n\n{_usage(export)}\n",
        f"## Model\n\n{_table(_facts(export))}\n",
    ]
    figures = evaluation(export.reader)
    if figures and export.weights == "ema":
        sections.append(f"## Evaluation\n\nOf the averaged weights, during training.\n\n{_table(figures)}\n")
    found = notes(export)
    if found:
        sections.append("## Notes\n\n" + "\n".join(f"- {note}" for note in found) + "\n")
    return "\n".join(sections)


def notes(export: FolderExport) -> list[str]:
    """Return what a user of the folder must know, in sentences; the console prints them, too."""
    found = []
    if export.is_latent and export.vae is None:
        found.append(
            "The model generates latents, and the folder has no VAE: pass the AutoencoderKL that encoded the training "
            f"images to from_pretrained, {_vae_argument(export)}, or export again with --vae DIR."
        )
    if not export.obstacles:
        found.append(
            "DiTPipeline loads the model, but computes different time embeddings, because its downscale_freq_shift "
            "is 1 and no configuration changes it. The model card shows under Use the two lines that set it to 0; the "
            "pipeline.py of the folder does so by itself."
        )
    elif export.has_stock_transformer:
        found.append(
            "The transformer is diffusers' DiTTransformer2DModel, but DiTPipeline cannot use it, because "
            f"{_listed(export.obstacles)}; the folder has its own pipeline.py. If you load the transformer alone, "
            "set downscale_freq_shift to 0 in every block (block.norm1.emb.time_proj)."
        )
    else:
        found.append(
            "The folder has its own transformer and pipeline, which need trust_remote_code=True, because diffusers' "
            f"DiT cannot represent the model: {_listed(stock_problems(export.config))}."
        )
    warning = initial_weights_warning(export.reader, export.weights)
    if warning is not None:
        found.append(warning[0].upper() + warning[1:] + ".")
    return found


def _listed(phrases: list[str]) -> str:
    """Return phrases as an English list: "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(phrases[:-1])] * (len(phrases) > 1) + phrases[-1:])


def _vae_argument(export: FolderExport) -> str:
    """Return the argument of ``from_pretrained`` where the folder has no VAE."""
    named = export.config.eval.vae or export.config.data.vae or ""
    return f'vae=AutoencoderKL.from_pretrained("{named if HUB_ID.fullmatch(named) else "..."}")'


def evaluation(reader: WeightsReader) -> dict[str, str]:
    """Return the figures of the newest evaluation of a run that is not newer than its checkpoint, by name."""
    run = Path(reader.path).absolute().parent.parent  # RUN/checkpoints/images_...
    rows = [row for row in log_rows(run / "validation.jsonl") if row["images"] <= reader.images]
    if not rows or run.joinpath("checkpoints") != Path(reader.path).absolute().parent:
        return {}
    last = rows[-1]
    figures = {"after": f"{int(last['images']):,} images"}
    if isinstance(last.get("validation_loss"), float):
        figures["validation loss"] = f"{last['validation_loss']:.4f} ({last.get('validation_images')} held-out images)"
    metrics = last.get("metrics")
    is_inception = reader.config.eval.extractor.startswith("inception:")
    return figures | (_metrics(metrics, is_inception) if isinstance(metrics, dict) else {})


def _metrics(found: dict[str, Any], is_inception: bool) -> dict[str, str]:
    labels = INCEPTION_LABELS if is_inception else LABELS
    space = f"{found.get('extractor')}, {found.get('n')} images against {found.get('n_reference')}"
    return {
        label: f"{found[name]:.4g} ({space})" for name, label in labels.items() if isinstance(found.get(name), float)
    }


def _summary(export: FolderExport) -> str:
    config, size = export.config, export.config.model.input_size
    what = "images"
    if export.is_latent:
        what = "latents" if export.vae is None else "images, with a VAE that decodes its latents"
    kind = "rectified flow" if config.objective.kind == "flow" else "DDPM with learned variance"
    return (
        f"A diffusion transformer (router: {router_name(config)}) that generates {what} of {size}x{size} with "
        f"{counted(config.model.in_channels, 'channel')}. It was trained with diffmoe-ds: {kind}."
    )


def _usage(export: FolderExport) -> str:
    names = export.class_names
    labels = [names[0], len(names) - 1] if len(names) > 1 else [0, 1]
    classes = f"class_labels={labels!r}, " if _has_classes(export) else ""
    if export.config.is_text:
        classes = 'prompt="red apple", '
    vae = f", {_vae_argument(export)}" if export.is_latent and export.vae is None else ""
    imports = "AutoencoderKL, DiffusionPipeline" if vae else "DiffusionPipeline"
    custom = "" if export.obstacles else ', custom_pipeline="DIR"'
    lines = [
        "```python",
        f"from diffusers import {imports}",
        f'pipe = DiffusionPipeline.from_pretrained("DIR"{custom}, trust_remote_code=True{vae})',
        f"images = pipe({classes}seeds=[0, 1]).images",
        "```",
        "",
        f"The same seed{_with(export)} the image of `diffmoe sample` in fp32.",
        "`pipeline.py` explains the arguments `num_inference_steps`, `guidance_scale`, `sampler` and `routing`.",
    ]
    if export.config.is_text:
        lines += [
            "The first prompt loads the text encoder, which the folder does not contain, with transformers: by its",
            "`name` in `conditioner/config.json`, which you can change. Guidance steers away from `negative_prompt`.",
        ]
    if not export.obstacles:
        lines += [
            "",
            "diffusers' own pipeline loads the model without code from this folder:",
            "",
            "```python",
            f"from diffusers import {'AutoencoderKL, ' * bool(vae)}DiTPipeline",
            f'pipe = DiTPipeline.from_pretrained("DIR"{vae})',
            *FREQ_SHIFT_HINT.splitlines(),
            "images = pipe(class_labels=[1, 2], num_inference_steps=50).images",
            "```",
        ]
    return "\n".join(lines)


def _facts(export: FolderExport) -> dict[str, str]:
    config, counts = export.config, count_parameters(export.config)
    size, routing, images = config.size, config.routing, export.reader.images
    rows = {
        "parameters": short_number(counts.total),
        "blocks, width, heads": f"{size.depth}, {size.hidden_size}, {size.num_heads}",
        "input": f"{config.model.input_size}x{config.model.input_size}x{config.model.in_channels}, "
        f"patches of {config.model.patch_size}x{config.model.patch_size}",
        **_conditions(export),
        "router": router_name(config),
    }
    if config.num_experts > 1:
        rows["activated per token"] = short_number(counts.activated)
        rows["experts"] = f"{config.num_experts} per layer, {routing.capacity:g} per token on average in training"
        rows["routing rules"] = ", ".join(config.inference_choices) + " (the first is the default)"
    return rows | {
        "objective": config.objective.kind,
        "trained on": f"{images:,} images" if images else "unknown",
        "weights": "averaged (EMA)" if export.weights == "ema" else "of the last step (raw)",
        "type": str(export.dtype).removeprefix("torch."),
    }


def _has_classes(export: FolderExport) -> bool:
    return export.config.model.num_classes > 1 and not export.config.is_text


def _with(export: FolderExport) -> str:
    """Return what an image depends on besides its seed, and the verb of both."""
    if export.config.is_text:
        return " and prompt give"
    return " and class give" if _has_classes(export) else " gives"


def _conditions(export: FolderExport) -> dict[str, str]:
    """Return what images are generated from: the classes, or the text encoders."""
    if export.reader.text is None:
        return {"classes": _classes(export)}
    encoders = export.reader.text.encoders
    shown = (f"{encoder_name(e.name)} ({e.tokens} tokens, {e.width} wide, sha256 {e.sha256[:12]})" for e in encoders)
    return {"text encoders" if len(encoders) > 1 else "text encoder": ", ".join(shown)}


def _classes(export: FolderExport) -> str:
    count, names = export.config.model.num_classes, export.class_names
    shown = f": {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}" if names else ""
    return f"{count:,}{shown}" if count > 1 else "none"


def _table(rows: dict[str, str]) -> str:
    return "\n".join(_lines(rows))


def _lines(rows: dict[str, str]) -> Iterator[str]:
    yield "| | |"
    yield "|---|---|"
    for name, value in rows.items():
        text = " ".join(value.split()).replace("|", "\\|")
        yield f"| {name} | {text} |"
