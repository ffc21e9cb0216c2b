"""Pretrained networks: how images are converted to their input, and checks of a folder in Hugging Face format.

Legend: B images, C channels, H, W height and width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffmoe_ds.control_files import MAX_TEXT_BYTES, read_json
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.text import reason

MAX_LABELS = 100_000
"""Most labels in a `config.json`, those of classifiers."""
MAX_LAYERS = 512
"""Most layers of a network; large ones have about 100."""
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""Arguments of ``from_pretrained``; without the second, transformers asks whether to run the code of a folder."""


def download(name: str, patterns: list[str], what: str) -> Path:
    """Return the folder of a network on the Hugging Face hub, which is downloaded unless it is in the cache.

    Args:
        name: its name on the hub.
        patterns: of the files that are needed.
        what: names it in messages.

    Raises:
        ConfigError: it cannot be downloaded.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises many types
        why = " ".join(reason(error).split())[:300]
        raise ConfigError(f"{what} {name} cannot be downloaded from the Hugging Face hub: {why}.") from None


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


def to_rgb(images_BCHW: Tensor) -> Tensor:
    """Return uint8 images with 3 channels; a single channel is repeated."""
    assert images_BCHW.dtype == torch.uint8 and images_BCHW.shape[1] in (1, 3), describe(images_BCHW)
    return images_BCHW.expand(-1, 3, -1, -1)


def resize(images_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 images bicubically with antialiasing to a height and width, ignoring the aspect ratio."""
    if images_BCHW.shape[-2:] == size:
        return images_BCHW
    resized = functional.interpolate(images_BCHW.float(), size, mode="bicubic", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


def state_digest(network: nn.Module) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of a network's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def describe(tensor: Tensor) -> str:
    """Return dtype and shape, for messages."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
