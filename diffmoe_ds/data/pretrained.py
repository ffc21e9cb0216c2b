"""Checks of a folder in Hugging Face format before transformers builds a network from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffmoe_ds.control_files import MAX_TEXT_BYTES, read_json

MAX_LABELS = 100_000
"""Most labels in a `config.json`, those of classifiers."""
MAX_LAYERS = 512
"""Most layers of a network; large ones have about 100."""
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""Arguments of ``from_pretrained``; without the second, transformers asks whether to run the code of a folder."""


def read_config(folder: Path) -> dict[str, Any]:
    """Return a `config.json`, checked before transformers reads it, which builds a name for each of ``num_labels``.

    Raises:
        OSError: it cannot be read, or is too large.
        ValueError: it is invalid, or has too many labels.
    """
    tree = read_json(folder / "config.json", MAX_TEXT_BYTES)
    if not isinstance(tree, dict):
        raise ValueError("config.json must contain an object")
    labels = tree.get("num_labels", 0)
    if type(labels) is not int or not 0 <= labels <= MAX_LABELS:
        raise ValueError(f"num_labels in config.json must be from 0 to {MAX_LABELS:,}, got {labels}")
    return tree


def check_size(build: Callable[[Any], nn.Module], config: Any, stored: int) -> None:
    """Check that a network is not larger than its weights, so that a hostile `config.json` costs little memory.

    Args:
        build: returns the network for a configuration.
        config: the configuration of transformers.
        stored: bytes of the files of weights.

    Raises:
        ValueError: it is.
    """
    layers = config.num_hidden_layers
    if type(layers) is not int or not 0 < layers <= MAX_LAYERS:
        raise ValueError(f"num_hidden_layers in config.json must be from 1 to {MAX_LAYERS}, got {layers}")
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in build(config).parameters())
    if count > stored:
        raise ValueError(f"config.json describes {count:,} parameters, but the files of weights have {stored:,} bytes")
