"""Describe the contents of a checkpoint, a run directory or an exported model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffmoe_ds.checkpoint.export import WEIGHTS_FILE, ModelFileReader, not_a_model
from diffmoe_ds.checkpoint.load import CheckpointReader, WeightsReader
from diffmoe_ds.checkpoint.verify import candidates, check_contents, check_sizes
from diffmoe_ds.errors import CheckpointError

SMALL = 1 << 30
"""Bytes up to which checkpoints are verified completely unless the user chooses; a second or two."""


def describe(path: Path, *, full: bool | None) -> dict[str, Any]:
    """Describe the contents of a path.

    Args:
        path: a run directory, a checkpoint, or an exported model (its directory or its file).
        full: verify checksums of checkpoints, not only sizes; None does so up to `SMALL` bytes.

    Returns:
        Plain data with ``checkpoints``, the first choice of a resume first, or ``model``.

    Raises:
        CheckpointError: the path is none of these.
    """
    directory = path.parent if path.name == WEIGHTS_FILE else path
    if (directory / WEIGHTS_FILE).is_file():
        reader = ModelFileReader(directory)
        model = {"path": str(reader.path), "weights": reader.weights, "images": reader.images, **_model(reader)}
        model["checked"] = "names, types and shapes"  # an exported model has no checksums
        return {"checkpoints": [], "model": model}
    every = [_checkpoint(candidate, full) for candidate in candidates(path)]
    if not every:
        raise CheckpointError(f"{path}: {not_a_model(path)}.")
    return {"checkpoints": every, "model": None}


def readable(found: dict[str, Any]) -> str:
    """Return the data of `describe` as lines of text."""
    lines = []
    for entry in [found["model"]] if found["model"] else found["checkpoints"]:
        lines.append(entry["path"])
        lines += [f"{key.replace('_', ' '):>14}  {_text(entry[key])}" for key in entry if key != "path" and entry[key]]
    return "\n".join(lines)


def _checkpoint(path: Path, full: bool | None) -> dict[str, Any]:
    entry: dict[str, Any] = {"path": str(path), "problem": "", "checked": "sizes"}
    try:
        files = check_sizes(path)
        if full or (full is None and sum(digest.size for digest in files.values()) <= SMALL):
            entry["checked"] = "every byte"
            check_contents(path, files)
        reader = CheckpointReader(path)
        kinds = reader.kinds()
        reader.close()
    except CheckpointError as error:
        return {**entry, "problem": str(error)}
    saved = reader.metadata
    return {
        **entry,
        "images": saved.images,
        "step": saved.step,
        "layout": saved.layout.known(),
        **_model(reader),
        "parameters": sum(torch.Size(shape).numel() for shape in saved.shapes.values()),
        "tensors": len(saved.shapes),
        "kinds": kinds,
        "files": {name: digest.size for name, digest in files.items()},
        "checked": entry["checked"],
    }


def _model(reader: WeightsReader) -> dict[str, Any]:
    config, text = reader.config, reader.text
    names = [] if text is None else [f"{each.name} (SHA-256 {each.sha256[:12]})" for each in text.encoders]
    return {
        "name": config.model_name,
        "routing": config.routing.kind,
        "experts": config.num_experts,
        "objective": config.objective.kind,
        "image": [config.model.in_channels, config.model.input_size, config.model.input_size],
        "conditioning": config.size.conditioning,
        **({"classes": config.model.num_classes} if text is None else {"text_encoders": names}),
    }


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return " x ".join(map(str, value)) if value and isinstance(value[0], int) else ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
