"""The Python interface: load a trained model and sample from it, or train one, in a script or a notebook.

Legend: N images, H, W height and width, C channels.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from diffmoe_ds.api_arguments import (
    Classes,
    Integers,
    check_fit,
    check_numbers,
    checked_classes,
    checked_seeds,
    named_as_arguments,
    overrides_of,
    usable_device,
)
from diffmoe_ds.checkpoint.export import WEIGHTS, initial_weights_warning, require_weights
from diffmoe_ds.checkpoint.layout import default_directory
from diffmoe_ds.checkpoint.load import WeightsReader, best_kind
from diffmoe_ds.checkpoint.verify import candidates
from diffmoe_ds.cli.sample_images import find_class
from diffmoe_ds.cli.sample_model import read_decoder, read_model
from diffmoe_ds.cli.sampling_plan import DTYPES, WEIGHTS_NAMES, default_dtype
from diffmoe_ds.config.fields import short_repr
from diffmoe_ds.config.load import DEFAULT_RECIPE
from diffmoe_ds.config.nearest import unknown
from diffmoe_ds.config.schema import Config
from diffmoe_ds.diffusion.objective import make_objective
from diffmoe_ds.distributed import signals
from diffmoe_ds.distributed.launch import restored_environment
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.sampling.capacity import Calibration, apply, calibrate, check_capacity, unchanged
from diffmoe_ds.sampling.generate import PIXEL_CHANNELS, SamplingSettings
from diffmoe_ds.sampling.grid import Pixels, class_grid
from diffmoe_ds.sampling.stream import Decode, generate_batches
from diffmoe_ds.text import counted
from diffmoe_ds.topology import Topology

FIT_OPTIONS = ("config", "set", "deepspeed", "run-dir", "resume")
"""Options of ``diffmoe train`` that are arguments of `fit`; ``deepspeed`` is the start of ``--deepspeed_config``."""


@dataclass(frozen=True)
class Samples:
    """Generated images. Notebooks show them as a grid, with one column per class if the classes repeat.

    >>> samples = diffmoe_ds.load("runs/demo").sample(classes=["bag"], seeds=range(2), steps=2)
    >>> samples.images.shape, samples.labels.tolist()
    ((2, 32, 32, 1), [8, 8])
    >>> samples.to_pil()[0].size
    (32, 32)
    """

    images: Pixels
    """uint8 [N, H, W, C], C 1 or 3."""
    labels: np.ndarray
    """int64 [N]: the class of each image."""
    class_names: tuple[str, ...] | None = None
    """The name of each class, if the training set had names."""

    def __repr__(self) -> str:
        """Return one line: interactive sessions would print all pixels."""
        count, height, width, channels = self.images.shape
        return f"Samples({counted(count, 'image')}, {height}x{width}x{channels})"

    def to_pil(self) -> list[Image.Image]:
        """Return the images as Pillow images, gray or RGB.

        >>> samples.to_pil()[0].save("first.png")
        """
        return [Image.fromarray(image[..., 0] if image.shape[2] == 1 else image) for image in self.images]

    def _repr_png_(self) -> bytes:
        file, labels = BytesIO(), self.labels.tolist()
        classes = list(dict.fromkeys(labels))
        cycle = all(label == classes[image % len(classes)] for image, label in enumerate(labels))
        grid = class_grid(self.images, classes if cycle else (), self.class_names or ())
        Image.fromarray(grid).save(file, "PNG")
        return file.getvalue()


class Model:
    """A trained model; `load` creates it.

    >>> model = diffmoe_ds.load("runs/demo")
    >>> model.config.routing.kind, model.class_names[8]
    ('batch_pool', 'bag')
    """

    def __init__(
        self, reader: WeightsReader, kind: str, device: torch.device, dtype: torch.dtype, vae: str | None
    ) -> None:
        """Read the weights; see `load`."""
        self.config: Config = reader.config
        """The configuration of the run that trained the model."""
        self.class_names: tuple[str, ...] | None = reader.class_names
        """The name of each class, if the training set had names."""
        self.trained_images: int = reader.images
        """Number of images that the model was trained on; 0 if unknown."""
        self.weights: str = WEIGHTS_NAMES[kind]
        """``ema`` or ``raw``."""
        choice = self.config.inference_choices[0]
        alone = Topology(0, 1, 1, self.config.num_experts)
        self.network = read_model(reader, kind, choice, alone, device, dtype)
        """The transformer, a `torch.nn.Module` in eval mode: ``network(x, t, y).prediction`` with noisy images x [N, C,
        H, W], times t [N] and labels y [N]."""
        self._vae = vae
        self._calibrations: dict[object, Calibration] = {}

    def __repr__(self) -> str:
        model = self.config.model
        classes = f", {model.num_classes} classes" if model.num_classes > 1 else ""
        shape = f"{model.input_size}x{model.input_size}x{model.in_channels}"
        trained = f", trained on {counted(self.trained_images, 'image')}" if self.trained_images else ""
        return f"Model({self.config.model_name}, {shape}{classes}{trained})"

    def sample(
        self,
        classes: Classes | None = None,
        seeds: Integers = range(8),
        steps: int = 50,
        cfg_scale: float = 1.0,
        sampler: str | None = None,
        routing: str | None = None,
        capacity: float | None = None,
        batch_size: int = 50,
    ) -> Samples:
        """Generate one image per seed.

        An image depends on its seed, its class and the settings; with the default routing, ``per_token``, it does not
        depend on the other images. The same seed and class give the image of ``diffmoe sample``.

        >>> model.sample(classes=["bag", 3], seeds=range(4), steps=2).labels.tolist()
        [8, 3, 8, 3]

        Args:
            classes: labels or names, which repeat over the images; all classes if None.
            seeds: one per image, from 0 to 2^64 - 1.
            steps: sampler steps.
            cfg_scale: guidance scale; 1 disables guidance.
            sampler: flow: euler (default), heun, dopri5, sde; ddpm: ddpm (default), ddim, dpm.
            routing: ``per_token``, ``dynamic`` or ``static``, as the router supports; None is the model's default.
            capacity: average number of experts per token; None keeps that of training. The first call with other
                settings calibrates, which takes the time of a few hundred images.
            batch_size: images per batch.

        Raises:
            ConfigError: an argument is invalid or does not fit the model.
            NonFiniteError: an image contains NaN or Inf.
        """
        cfg_scale, capacity, batch_size = check_numbers(steps, batch_size, cfg_scale, capacity)
        settings = SamplingSettings(sampler or make_objective(self.config.objective.kind).samplers[0], steps, cfg_scale)
        seeds = checked_seeds(seeds)
        labels_N = torch.tensor(self._labels(classes, len(seeds)))
        choice = routing or self.config.inference_choices[0]
        with named_as_arguments():
            settings.check(self.config)
            if capacity is not None:
                check_capacity(capacity, choice, self.config)
            self.network.set_inference(choice)
        bar = tqdm(total=steps * -(-len(seeds) // batch_size), desc="sample", unit="step", leave=False)
        with bar, self._at(capacity, settings, choice, batch_size):
            batches = generate_batches(
                self.network, labels_N, seeds, settings, self._decode, batch_size, lambda done, total: bar.update()
            )
            return Samples(np.concatenate([pixels for _, pixels in batches]), labels_N.numpy(), self.class_names)

    def _labels(self, classes: Classes | None, count: int) -> list[int]:
        """Return the label of each image."""
        num_classes = self.config.model.num_classes
        if classes is None:
            chosen = list(range(num_classes))
        else:
            names = (self.class_names or ())[:num_classes]
            words = checked_classes(classes)
            if num_classes == 1 and set(words) != {"0"}:
                raise ConfigError(f"classes {classes!r}: the model was trained without classes; omit the argument.")
            chosen = [find_class(word, num_classes, names, "classes") for word in words]
        return [chosen[image % len(chosen)] for image in range(count)]

    @cached_property
    def _decode(self) -> Decode:
        """The function that decodes the network's output to pixels."""
        channels = self.config.model.in_channels
        if channels in PIXEL_CHANNELS:
            return lambda pixels: pixels
        if self._vae is None:
            raise ConfigError(
                f"the model generates latents ({counted(channels, 'channel')}); decode them with load(..., vae=...)."
            )
        return read_decoder(self._vae, channels, self.network.pos_embed.device)

    @contextmanager
    def _at(self, capacity: float | None, settings: SamplingSettings, routing: str, batch_size: int) -> Iterator[None]:
        """Set the capacity within the context."""
        with nullcontext() if capacity is None else unchanged(self.network):
            if capacity is not None:
                key = (capacity, settings, routing, batch_size if self.network.images_compete else None)
                if key not in self._calibrations:
                    self._calibrations[key] = calibrate(self.network, settings, capacity, batch_size=batch_size)
                apply(self.network, self._calibrations[key])
            yield


def load(
    path: str | PathLike[str],
    weights: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | None = None,
    vae: str | PathLike[str] | None = None,
) -> Model:
    """Load a trained model; nothing in its files is unpickled.

    >>> model = diffmoe_ds.load("runs/demo", weights="ema")
    >>> model.weights, model.trained_images
    ('ema', 96)

    Args:
        path: a run directory (its newest checkpoint), a checkpoint, or an exported model.
        weights: ``ema`` or ``raw``; None is ``ema`` if they are stored.
        device: where the model runs; None is a GPU if there is one.
        dtype: ``fp32`` or ``bf16``; None is bf16 on GPUs that support it, otherwise fp32.
        vae: directory or hub ID of the `AutoencoderKL` of a latent model.

    Raises:
        CheckpointError: there is no model, or it is damaged.
        ConfigError: an argument is invalid.
    """
    if not isinstance(path, (str, PathLike)):
        raise ConfigError(f"path must be a run directory, a checkpoint or an exported model, got {path!r}.")
    for name, value, valid in (("weights", weights, WEIGHTS), ("dtype", dtype, DTYPES)):
        if value is not None and value not in list(valid):  # a list, because values may not be hashable
            raise ConfigError(unknown(name, value if isinstance(value, str) else short_repr(value), valid))
    reader = require_weights(Path(path))
    kind = best_kind(reader) if weights is None else WEIGHTS[weights]
    if vae is not None and reader.config.model.in_channels in PIXEL_CHANNELS:
        channels = counted(reader.config.model.in_channels, "channel")
        raise ConfigError(f"vae {vae}: the model generates pixels ({channels}); omit it.")
    place = usable_device(device)
    warning = initial_weights_warning(reader, WEIGHTS_NAMES[kind])
    if warning is not None:
        tqdm.write("warning: " + warning.replace("--weights raw", "weights='raw'"))
    with named_as_arguments(("weights",)):
        return Model(
            reader, kind, place, DTYPES[dtype] if dtype else default_dtype(place), None if vae is None else str(vae)
        )


def fit(
    recipe: str | PathLike[str] = DEFAULT_RECIPE,
    settings: Mapping[str, Any] | None = None,
    run_dir: str | PathLike[str] | None = None,
    deepspeed_config: str | PathLike[str] | None = None,
    resume: str = "auto",
) -> Model:
    """Train a model in this process, as ``diffmoe train`` does, and load it.

    Interrupting a notebook saves and returns the model so far; the same call continues. For several GPUs, use the
    command line.

    >>> settings = {"run.total_images": 64, "model.name": "nano-E4"}
    >>> model = diffmoe_ds.fit("fashion", settings, run_dir="runs/tiny")  # doctest: +ELLIPSIS
          model  nano-E4: 4 blocks, ...
    >>> model.trained_images
    64

    Args:
        recipe: name of a packaged recipe, or a YAML file.
        settings: keys of the recipe, ``{"run.seed": 1}`` or ``{"run": {"seed": 1}}``; see ``docs/configuration.md``.
        run_dir: the run directory; ``runs/RECIPE`` if None, or that of a run's ``resolved.yaml``.
        deepspeed_config: DeepSpeed JSON or name of a shipped one; replaces the recipe's ``deepspeed`` section.
        resume: ``auto``, ``none`` or a path.

    Raises:
        KeyboardInterrupt: interrupted before the first checkpoint.
        DiffMoEError: an argument is invalid, or the training failed; see `errors`.
    """
    from diffmoe_ds.cli.train import train_command
    from diffmoe_ds.distributed.shutdown import shutdown
    from diffmoe_ds.errors import Requeue

    check_fit(recipe, settings, run_dir, deepspeed_config, resume)
    directory = default_directory(recipe) if run_dir is None else Path(run_dir)
    args = argparse.Namespace(
        config=str(recipe), overrides=overrides_of(settings or {}),
        deepspeed_config=None if deepspeed_config is None else str(deepspeed_config),
        run_dir=directory, resume=resume, dry_run=False, thorough=False, json=False,
    )  # fmt: skip
    try:
        with restored_environment(), signals.listening(), named_as_arguments(FIT_OPTIONS):
            train_command(args)
    except Requeue as stop:
        tqdm.write(str(stop))
        if not candidates(directory):
            raise KeyboardInterrupt from None
    finally:
        shutdown()
    return load(directory)
