"""The Python interface: load a trained model and sample from it, or train one, in a script or a notebook.

Legend: N images, H, W height and width, C channels.
"""

from __future__ import annotations

import argparse
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from diffmoe_ds.api_arguments import (
    Classes,
    Integers,
    SamplingOptions,
    check_fit,
    check_numbers,
    check_options,
    checked_classes,
    checked_encoders,
    checked_prompts,
    checked_seeds,
    named_as_arguments,
    overrides_of,
    usable_device,
)
from diffmoe_ds.api_samples import Samples
from diffmoe_ds.checkpoint.export import WEIGHTS, initial_weights_warning, require_weights
from diffmoe_ds.checkpoint.layout import default_directory
from diffmoe_ds.checkpoint.load import WeightsReader, best_kind
from diffmoe_ds.checkpoint.verify import candidates
from diffmoe_ds.cli.sample_images import find_class
from diffmoe_ds.cli.sample_model import read_decoder, read_model
from diffmoe_ds.cli.sample_prompts import ChosenPrompts, open_encoders, prompt_set
from diffmoe_ds.cli.sampling_plan import DTYPES, WEIGHTS_NAMES, default_dtype
from diffmoe_ds.config.fields import short_repr
from diffmoe_ds.config.load import DEFAULT_RECIPE
from diffmoe_ds.config.nearest import unknown
from diffmoe_ds.config.schema import Config
from diffmoe_ds.data.text_encoder import TextEncoders
from diffmoe_ds.diffusion.objective import make_objective
from diffmoe_ds.distributed import signals
from diffmoe_ds.distributed.launch import restored_environment
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.sampling.capacity import Calibration, apply, calibrate, check_capacity, unchanged
from diffmoe_ds.sampling.generate import PIXEL_CHANNELS, SamplingSettings
from diffmoe_ds.sampling.grid import Pixels
from diffmoe_ds.sampling.labels import cycle_labels
from diffmoe_ds.sampling.prompts import set_prompts
from diffmoe_ds.sampling.stream import Decode, generate_batches
from diffmoe_ds.text import counted
from diffmoe_ds.topology import Topology

if TYPE_CHECKING:
    from typing_extensions import Unpack

FIT_OPTIONS = ("config", "set", "deepspeed", "run-dir", "resume")
"""Options of ``diffmoe train`` that are arguments of `fit`; ``deepspeed`` is the start of ``--deepspeed_config``."""


class Model:
    """A trained model; `load` creates it.

    >>> model = diffmoe_ds.load("runs/demo")
    >>> model.config.routing.kind, model.class_names[8]
    ('batch_pool', 'bag')
    """

    def __init__(
        self,
        reader: WeightsReader,
        kind: str,
        device: torch.device,
        dtype: torch.dtype,
        vae: str | None,
        encoders: Sequence[str] = (),
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
        H, W], times t [N] and labels y [N], in text models features of prompts."""
        self._text = reader.text
        self._encoder_paths = encoders
        self._vae = vae
        self._calibrations: dict[object, Calibration] = {}

    def __repr__(self) -> str:
        model = self.config.model
        classes = f", {model.num_classes} classes" if model.num_classes > 1 else ""
        classes = ", text to image" if self.config.is_text else classes
        shape = f"{model.input_size}x{model.input_size}x{model.in_channels}"
        trained = f", trained on {counted(self.trained_images, 'image')}" if self.trained_images else ""
        return f"Model({self.config.model_name}, {shape}{classes}{trained})"

    def sample(
        self,
        classes: Classes | None = None,
        seeds: Integers | None = None,
        steps: int = 50,
        cfg_scale: float = 1.0,
        *,
        prompts: Sequence[str] | None = None,
        negative_prompt: str = "",
        **options: Unpack[SamplingOptions],
    ) -> Samples:
        """Generate one image per seed.

        An image depends on its seed, its class or prompt and the settings; with the default routing, ``per_token``, it
        does not depend on the other images. The same seed and class give the image of ``diffmoe sample``.

        >>> model.sample(classes=["bag", 3], seeds=range(4), steps=2).labels.tolist()
        [8, 3, 8, 3]

        Args:
            classes: labels or names, which repeat over the images; all classes if None.
            seeds: one per image, from 0 to 2^64 - 1; ``range(8)`` if None, for prompts one per prompt.
            steps: sampler steps.
            cfg_scale: guidance scale; 1 disables guidance.
            prompts: prompts of a text model, which repeat over the images.
            negative_prompt: what guidance of a text model steers away from.
            options: ``sampler``, ``routing``, ``capacity`` and ``batch_size``; see `SamplingOptions`.

        Raises:
            ConfigError: an argument is invalid or does not fit the model.
            NonFiniteError: an image contains NaN or Inf.
        """
        check_options(options)
        capacity, batch_size = options.get("capacity"), options.get("batch_size", 50)
        cfg_scale, capacity, batch_size = check_numbers(steps, batch_size, cfg_scale, capacity)
        sampler = options.get("sampler") or make_objective(self.config.objective.kind).samplers[0]
        routing = options.get("routing") or self.config.inference_choices[0]
        settings = SamplingSettings(sampler, steps, cfg_scale)
        chosen_seeds = None if seeds is None else checked_seeds(seeds)
        chosen = self._choose_prompts(classes, prompts, negative_prompt, cfg_scale)
        labels = self._classes(classes) if chosen is None else range(len(chosen.texts))
        chosen_seeds = chosen_seeds or list(range(8 if chosen is None else len(labels)))
        labels_N = cycle_labels(range(len(chosen_seeds)), labels)
        images = self._generate(labels_N, chosen_seeds, settings, routing, capacity, batch_size, chosen)
        return Samples(images, labels_N.numpy(), self.class_names, None if chosen is None else chosen.texts)

    def _generate(
        self,
        labels_N: torch.Tensor,
        seeds: list[int],
        settings: SamplingSettings,
        routing: str,
        capacity: float | None,
        batch_size: int,
        chosen: ChosenPrompts | None,
    ) -> Pixels:
        """Return the images of `sample`, uint8 [N, H, W, C]."""
        with named_as_arguments():
            settings.check(self.config)
            if capacity is not None:
                check_capacity(capacity, routing, self.config)
            self.network.set_inference(routing)
        key = (capacity, settings, routing, batch_size if self.network.images_compete else None, chosen)
        bar = tqdm(total=settings.steps * -(-len(seeds) // batch_size), desc="sample", unit="step", leave=False)
        with bar, self._at(capacity, settings, batch_size, key):
            batches = generate_batches(
                self.network, labels_N, seeds, settings, self._decode, batch_size, lambda done, total: bar.update()
            )
            return np.concatenate([pixels for _, pixels in batches])

    def _choose_prompts(
        self, classes: Classes | None, prompts: Sequence[str] | None, negative_prompt: str, cfg_scale: float
    ) -> ChosenPrompts | None:
        """Return the prompts of a text model, and make them the labels of the network; None for a class model."""
        if self._text is None:
            for name, value in (("prompts", prompts), ("negative_prompt", negative_prompt)):
                if value is not None and (name == "prompts" or value != ""):
                    raise ConfigError(f"{name}: the model generates images from classes, not prompts; use classes.")
            return None
        chosen = checked_prompts(classes, prompts, negative_prompt, cfg_scale)
        found, warning = prompt_set(chosen, self._text, self._encoders)
        set_prompts(self.network, found)
        if warning is not None:
            tqdm.write(f"warning: {warning}")
        return chosen

    @cached_property
    def _encoders(self) -> TextEncoders:
        """The text encoders of a text model."""
        assert self._text is not None, "class models have no text encoders"
        with named_as_arguments():
            return open_encoders(self._encoder_paths, self._text, self.network.pos_embed.device)

    def _classes(self, classes: Classes | None) -> Sequence[int]:
        """Return the labels of classes, or all labels."""
        num_classes = self.config.model.num_classes
        if classes is None:
            return range(num_classes)
        names = (self.class_names or ())[:num_classes]
        words = checked_classes(classes)
        if num_classes == 1 and set(words) != {"0"}:
            raise ConfigError(f"classes {classes!r}: the model was trained without classes; omit the argument.")
        return [find_class(word, num_classes, names, "classes") for word in words]

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
    def _at(self, capacity: float | None, settings: SamplingSettings, batch_size: int, key: Hashable) -> Iterator[None]:
        """Set the capacity within the context; the calibration is kept under a key."""
        with nullcontext() if capacity is None else unchanged(self.network):
            if capacity is not None:
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
    text_encoder: str | PathLike[str] | Sequence[str | PathLike[str]] | None = None,
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
        text_encoder: folder or hub ID of the text encoder of a text model, or a list if it has several; None is that of
            the training run. The first `Model.sample` loads it.

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
    encoders = checked_encoders(text_encoder, reader.config)
    place = usable_device(device)
    warning = initial_weights_warning(reader, WEIGHTS_NAMES[kind])
    if warning is not None:
        tqdm.write("warning: " + warning.replace("--weights raw", "weights='raw'"))
    of_type = DTYPES[dtype] if dtype else default_dtype(place)
    with named_as_arguments(("weights",)):
        return Model(reader, kind, place, of_type, None if vae is None else str(vae), encoders)


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
