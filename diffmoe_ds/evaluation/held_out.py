"""Held-out images with fixed noise and times, so that every evaluation sees the same noisy images.

Legend: N images, B images of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from diffmoe_ds.config.schema import Config
from diffmoe_ds.data.dataset import image_shape, open_dataset, with_text
from diffmoe_ds.data.loader import MicroBatch, to_micro_batch
from diffmoe_ds.data.reader import Dataset, Reader, Task, check_labels, check_latents, text_shape
from diffmoe_ds.data.sources.shard_paths import why_not_shards
from diffmoe_ds.data.sources.shards import ShardDataset
from diffmoe_ds.diffusion.objective import NOISE_BINS
from diffmoe_ds.errors import ConfigError, DataError
from diffmoe_ds.evaluation.extractors import count_features, load_extractor, reported_as
from diffmoe_ds.rng import held_out_draws
from diffmoe_ds.sampling.generate import PIXEL_CHANNELS
from diffmoe_ds.text_features import TextFormat, difference

CPU = torch.device("cpu")
MIN_IMAGES = 2
"""Minimum number of images in a set; the covariance of their features needs two."""


class HeldOut:
    """N evenly spaced images of a dataset, which may be sorted by class.

    Their random numbers depend only on their position, from 0 to N - 1. Labels are never dropped, images never
    mirrored, and every noise level gets the same number of images (see `rng.held_out_draws`). Text models see the
    first caption of each image.
    """

    def __init__(self, dataset: Dataset, config: Config, num_images: int = 0) -> None:
        """Check that the dataset fits the model.

        Args:
            dataset: the images.
            config: the run's configuration; with ``data.vae``, batches hold pixels and noise for the posterior.
            num_images: N; 0, or more than the dataset has, uses all images.

        Raises:
            DataError: the labels or latents do not fit the model. `batches` raises it for an image that cannot be read
                or does not fit.
        """
        self.dataset = dataset
        self._order = _EvenlySpaced(min(num_images or len(dataset), len(dataset)), len(dataset))
        model = config.model
        if not config.is_text:
            check_labels(dataset, model.num_classes)
        check_latents(dataset.latents, image_shape(config))
        shape = (model.in_channels, model.input_size, model.input_size)
        is_encoded_later = config.data.vae is not None
        self._draws = partial(
            held_out_draws, shape=shape, strata=NOISE_BINS, posterior=is_encoded_later or dataset.latents is not None
        )
        self._shapes: dict[str, tuple[int, ...]] = {"x": image_shape(config), "noise": shape}
        if is_encoded_later:
            self._shapes["posterior"] = shape
        self._choose = _first_caption if config.is_text else None
        if config.is_text:
            self._shapes["text"] = text_shape(dataset)

    def __len__(self) -> int:
        return self._order.positions

    def batches(self, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[MicroBatch]:
        """Read a rank's share of the images, in dataset order.

        All ranks get the same number of batches of the same sizes. Shares are padded with rows whose `position` is N or
        more, which `validation_loss` ignores.

        Args:
            batch_size: B; the last batch may be smaller.
            rank: this rank.
            world: number of ranks.

        Raises:
            DataError: an image cannot be read or does not fit the model.
        """
        share = math.ceil(len(self) / world)
        return self.read(range(rank * share, (rank + 1) * share), batch_size)

    def read(self, share: range, batch_size: int) -> Iterator[MicroBatch]:
        """Read the images at consecutive positions; those from N on are padding.

        Args:
            share: the positions.
            batch_size: B; the last batch may be smaller.

        Raises:
            DataError: an image cannot be read or does not fit the model.
        """
        for first in range(share.start, share.stop, batch_size):
            positions = range(first, min(first + batch_size, share.stop))
            shapes = {name: (len(positions), *shape) for name, shape in self._shapes.items()}
            reader = Reader(self.dataset, self._order, self._draws, shapes, slots=None, choose=self._choose)
            item = reader[Task(0, positions)]
            if isinstance(item, DataError):
                raise item
            yield to_micro_batch(reader, 0, item)


def _first_caption(position: int) -> float:
    return 0.0


def open_held_out(config: Config, device: torch.device = CPU, text: TextFormat | None = None) -> HeldOut | None:
    """Open the held-out images of a run and read the first one, unless it is behind a URL.

    Args:
        config: the run's configuration.
        device: where the extractor of ``eval.metrics`` is tried; it may need a GPU.
        text: see `read_held_out`.

    Returns:
        The images; None if the run does not evaluate.

    Raises:
        ConfigError: `eval` and `data.validation_path` do not fit together.
        DataError: the images cannot be read or do not fit the model.
    """
    data, evaluation = config.data, config.eval
    if not evaluation.every_images:
        if evaluation.metrics:
            raise ConfigError("eval.metrics is set, but eval.every_images is 0; set it to the interval in images.")
        return None
    if data.validation_path is None:
        raise ConfigError(
            f"eval.every_images is {evaluation.every_images}, but data.validation_path is not set; set it to the "
            "held-out images."
        )
    held_out = read_held_out(config, data.validation_path, "data.validation_path", text, evaluation.num_images)
    if evaluation.metrics:
        check_metrics(config, device)
    return held_out


def read_held_out(config: Config, path: str, name: str, text: TextFormat | None = None, num_images: int = 0) -> HeldOut:
    """Open held-out images and read the first one, unless it is behind a URL.

    Args:
        config: the model's configuration.
        path: the images, in any form that `data.path` accepts.
        name: name of the key or option, for messages.
        text: the encoders of a text model.
        num_images: see `HeldOut`.

    Raises:
        ConfigError: the images and `data.vae` do not fit together.
        DataError: the images cannot be read or do not fit the model.
    """
    problem = why_not_shards(path)
    if problem is not None:
        raise DataError(f"{name} {path}: {problem}; expected a folder of images or shards (*.tar or *.tar.gz)")
    try:
        of_path = config.model_copy(update={"data": config.data.model_copy(update={"path": path})})
        dataset = open_dataset(of_path, keeps_text=True)
        if len(dataset) < MIN_IMAGES:
            raise DataError(f"evaluation needs at least {MIN_IMAGES} images, got {len(dataset)}")
        with_text(of_path, dataset)  # only checks the shapes
        differs = None if text is None or dataset.text is None else difference(dataset.text, text)
        if differs is not None:
            raise DataError(f"the captions were encoded with text encoders other than the model's: {differs}")
        held_out = HeldOut(dataset, config, num_images)
        if not (isinstance(dataset, ShardDataset) and dataset.remote_bytes()):
            next(held_out.batches(1))
    except DataError as error:
        raise DataError(f"{name} {path}: {error}") from None
    return held_out


def decoder_path(config: Config) -> str | None:
    """Return the VAE that decodes generated latents for ``eval.metrics``; None if the model generates pixels.

    Raises:
        ConfigError: ``eval.vae`` is missing or not needed.
    """
    channels, vae = config.model.in_channels, config.eval.vae
    if channels in PIXEL_CHANNELS:
        if vae is not None:
            raise ConfigError(f"eval.vae is {vae}, but the model generates pixels ({channels} channels); remove it.")
        return None
    if vae is None and config.data.vae is None:
        raise ConfigError(
            f"eval.metrics needs eval.vae, because the model generates latents ({channels} channels); set it to the "
            "AutoencoderKL that decodes them."
        )
    return vae or config.data.vae


def check_metrics(config: Config, device: torch.device) -> None:
    """Check that ``eval.metrics`` can be computed: try the extractor and read the configuration of the VAE.

    Args:
        config: the run's configuration.
        device: where to try the extractor.

    Raises:
        ConfigError: the extractor or the VAE is unknown, cannot be used or does not fit the model, or
            ``eval.metric_images`` is less than 2.
        DataError: the extractor's weights cannot be read.
    """
    if config.eval.metric_images < MIN_IMAGES:
        raise ConfigError(f"eval.metric_images must be at least {MIN_IMAGES}, got {config.eval.metric_images}.")
    path, side = decoder_path(config), config.model.input_size
    if path is not None:
        from diffmoe_ds.data.vae import downsampling, vae_settings  # imports diffusers, an extra

        settings = vae_settings(path)
        found, side = settings["latent_channels"], side * downsampling(settings)
        if found != config.model.in_channels:
            raise ConfigError(
                f"eval.vae {path} decodes latents of {found} channels, but the model generates "
                f"{config.model.in_channels}."
            )
    with reported_as("eval.extractor"):
        count_features(load_extractor(config.eval.extractor, device), (side, side))


@dataclass(frozen=True)
class _EvenlySpaced:
    """The order in which held-out images are read; implements `shuffle.Shuffle`."""

    positions: int
    images: int

    def __call__(self, position: int) -> int:
        """Return the index of the image at a position; that of the last one for positions past the end."""
        return min(position, self.positions - 1) * self.images // self.positions

    def next_shards(self, position: int) -> tuple[int, ...]:
        """Return nothing to prefetch: a shard behind a URL is downloaded when it is read."""
        return ()
