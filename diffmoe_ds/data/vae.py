"""The VAE between pixels and latents: diffusers' `AutoencoderKL` from a folder or the Hugging Face hub.

Legend: B images, H and W pixels, C channels of a latent, h and w its height and width.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffmoe_ds.config.fields import short_repr
from diffmoe_ds.data.loader import MicroBatch
from diffmoe_ds.data.sources.latents import LatentFormat
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.files import expand_user

REQUIRED = ("block_out_channels", "latent_channels", "scaling_factor")
"""Values of a `config.json` that are used here."""
MAX_BLOCKS = 16
"""Most resolutions of a VAE, each half the one before."""
MAX_LAYERS = 64
"""Most ResNet layers per resolution."""
MAX_CHANNELS = 16_384
"""Most channels of a layer or of the latents."""
MAX_PARAMETERS = 1 << 28
"""Most parameters, three times those of the VAEs of Stable Diffusion and FLUX; 1 GB."""


def vae_settings(path: str) -> dict[str, Any]:
    """Read the `config.json` of a VAE, without its weights.

    Returns:
        Its values, and diffusers' defaults for those of `REQUIRED` that it lacks.

    Raises:
        ConfigError: there is none, or a value that is used here is invalid.
    """
    autoencoder = _autoencoder()
    stored: Any = _either(path, lambda place, extra: autoencoder.load_config(place, **extra))
    if not isinstance(stored, dict):
        raise ConfigError(f"the VAE {path} has a config.json that is not an object, but {short_repr(stored)}.")
    parameters = inspect.signature(autoencoder.__init__).parameters
    settings = {**{key: parameters[key].default for key in REQUIRED}, **stored}
    blocks, channels = settings["block_out_channels"], settings["latent_channels"]
    scaling, shift = settings["scaling_factor"], settings.get("shift_factor")
    valid = {
        "block_out_channels": isinstance(blocks, (list, tuple))
        and 1 <= len(blocks) <= MAX_BLOCKS
        and all(_is_count(block, MAX_CHANNELS) for block in blocks),
        "latent_channels": _is_count(channels, MAX_CHANNELS),
        "layers_per_block": _is_count(settings.get("layers_per_block", 1), MAX_LAYERS),
        "scaling_factor": _is_factor(scaling) and scaling > 0,
        "shift_factor": shift is None or _is_factor(shift),
    }
    for key, is_valid in valid.items():
        if not is_valid:
            raise ConfigError(f"the VAE {path} has an invalid {key} in its config.json: {short_repr(settings[key])}.")
    return settings


def _is_count(value: object, most: int) -> bool:
    return type(value) is int and 1 <= value <= most


def _is_factor(value: object) -> bool:
    """Return whether a value is a number of JSON that a float can hold; integers of JSON have any length."""
    return isinstance(value, (int, float)) and type(value) is not bool and abs(value) <= sys.float_info.max


def downsampling(settings: dict[str, Any]) -> int:
    """Return the image pixels per latent pixel, in each direction."""
    return int(2 ** (len(settings["block_out_channels"]) - 1))


class VAE:
    """An `AutoencoderKL` in fp32 for encoding and decoding.  Its weights are read from safetensors only."""

    def __init__(self, path: str, device: torch.device | str = "cpu") -> None:
        """Load the VAE.

        Args:
            path: a VAE's folder, a pipeline's folder that contains `vae`, or the name of either on the hub.
            device: where to run it.

        Raises:
            ConfigError: it cannot be loaded.
        """
        autoencoder = _autoencoder()
        self.settings = vae_settings(path)
        self.device = torch.device(device)
        self._model: Any = _either(path, lambda place, extra: _load(autoencoder, place, extra))
        self._model.to(self.device).eval().requires_grad_(False)

    def format(self, image_size: int, dtype: str) -> LatentFormat:
        """Return how latents of images of a size are stored.

        Raises:
            ConfigError: the VAE cannot encode this size.
        """
        factor = downsampling(self.settings)
        if image_size % factor or image_size < factor:
            raise ConfigError(f"--size must be a positive multiple of {factor} for this VAE, got {image_size}.")
        scaling, shift = scaling_and_shift(self.settings)
        channels = self.settings["latent_channels"]
        return LatentFormat(channels, image_size // factor, image_size, dtype, scaling, shift, self.sha256())

    def sha256(self) -> str:
        """Return the SHA-256 of the relevant configuration and all weights."""
        digest = hashlib.sha256()
        kept = {key: value for key, value in self.settings.items() if not key.startswith("_")}
        digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self._model.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @torch.inference_mode()
    def moments(self, images: np.ndarray) -> np.ndarray:
        """Return mean and log-variance of the posterior, fp32 [B, 2, C, h, w], for uint8 images [B, 3, H, W]."""
        return self._moments(torch.from_numpy(images).to(self.device).float() / 127.5 - 1).cpu().numpy()

    @torch.inference_mode()
    def sample(self, images: Tensor, noise: Tensor) -> Tensor:
        """Return scaled latents [B, C, h, w] for images [B, 3, H, W] in [-1, 1] and standard normal noise."""
        mean, log_variance = self._moments(images).unbind(1)
        scaling, shift = scaling_and_shift(self.settings)
        return (mean + torch.exp(0.5 * log_variance) * noise - shift) * scaling

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Return images [B, 3, H, W], approximately in [-1, 1], for scaled latents [B, C, h, w]."""
        scaling, shift = scaling_and_shift(self.settings)
        images: Tensor = self._model.decode(latents.to(self.device, torch.float32) / scaling + shift).sample
        return images

    def _moments(self, images: Tensor) -> Tensor:
        posterior = self._model.encode(images).latent_dist
        return torch.stack([posterior.mean, posterior.logvar], dim=1)


def scaling_and_shift(settings: dict[str, Any]) -> tuple[float, float]:
    """Return (scale, shift): a latent is normalized as (latent - shift) * scale."""
    return float(settings["scaling_factor"]), float(settings.get("shift_factor") or 0.0)


class EncodingLoader:
    """Encodes the pixels of micro-batches into latents, on the training device."""

    def __init__(self, loader: Iterable[MicroBatch], vae: VAE) -> None:
        self._loader = loader
        self._vae = vae

    def __iter__(self) -> Iterator[MicroBatch]:
        for batch in self._loader:
            moved = batch.to(self._vae.device)
            assert moved.posterior is not None, "pixels come with noise for the posterior"
            # Cloned outside inference mode, because autograd may have to save them.
            latents = self._vae.sample(moved.x, moved.posterior).clone()
            yield moved._replace(x=latents, posterior=None)


def _autoencoder() -> Any:
    try:
        from diffusers import AutoencoderKL  # an extra, and slow to import
    except ImportError:
        raise ConfigError("a VAE needs diffusers, which is not installed: pip install 'diffmoe_ds[vae]'.") from None
    return AutoencoderKL


def _load(autoencoder: Any, place: str, extra: dict[str, str]) -> Any:
    """Return the model with its weights.

    Raises:
        ValueError: it is too large, or lacks weights, which diffusers would initialize at random.
    """
    with torch.device("meta"):
        outline = autoencoder.from_config(autoencoder.load_config(place, **extra))
    count = sum(parameter.numel() for parameter in outline.parameters())
    if count > MAX_PARAMETERS:
        raise ValueError(f"its config.json describes {count:,} parameters; the limit is {MAX_PARAMETERS:,}.")
    how = {"use_safetensors": True, "torch_dtype": torch.float32, "low_cpu_mem_usage": False}
    model, info = autoencoder.from_pretrained(place, output_loading_info=True, **how, **extra)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"its files lack {len(missing)} of the weights, such as {missing[0]}.")
    return model


def _either(path: str, load: Any) -> Any:
    """Call `load` for the VAE at `path` or in its subfolder `vae`, as in a pipeline."""
    folder = expand_user(path)
    if folder.is_dir():
        tries = [(str(folder), {"subfolder": "vae"} if (folder / "vae").is_dir() else {})]
    elif folder.exists() or path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ConfigError(
            f"the VAE {path} is neither a folder with a diffusers VAE nor a name on the Hugging Face hub."
        )
    else:
        tries = [(path, {}), (path, {"subfolder": "vae"})]
    for number, (place, extra) in enumerate(tries):
        try:
            found = load(place, extra)
        except Exception as error:  # diffusers and the hub's client raise many types
            if number + 1 < len(tries):
                continue
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(f"the VAE {path} cannot be loaded by diffusers' AutoencoderKL: {reason}") from None
        break
    return found
