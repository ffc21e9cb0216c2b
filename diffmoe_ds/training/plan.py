"""The plan of a run, resolved from its arguments.

Planning is read-only: it writes no files and contacts no other rank, so ``--dry-run`` needs nothing else. torch and
DeepSpeed are imported after the recipe is read, so that typos fail fast.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from diffmoe_ds.checkpoint.layout import default_directory
from diffmoe_ds.config.deepspeed import DeepSpeedSettings, read_deepspeed_json, resolve_deepspeed
from diffmoe_ds.config.deepspeed_keys import check_keys
from diffmoe_ds.config.load import config_to_dict, read_recipe
from diffmoe_ds.config.schema import Config
from diffmoe_ds.distributed.elastic import fit_ranks
from diffmoe_ds.distributed.launch import Launch, local_device
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.training.weights_and_biases import check_wandb_login

if TYPE_CHECKING:
    from diffmoe_ds.checkpoint.load import CheckpointReader, WeightsReader
    from diffmoe_ds.checkpoint.metadata import FeatureNetwork
    from diffmoe_ds.data.reader import Dataset
    from diffmoe_ds.evaluation.held_out import HeldOut
    from diffmoe_ds.text_features import TextFormat


@dataclass(frozen=True)
class TrainRequest:
    """The arguments of ``diffmoe train``; see its ``--help``."""

    recipe: str
    """Name of a packaged recipe, or a YAML file."""
    overrides: list[str]
    """``section.key=value``."""
    deepspeed_json: str | None
    """DeepSpeed JSON, or the name of a shipped one, that replaces the recipe's ``deepspeed`` section."""
    run_dir: Path | None
    """Run directory; `default_directory` of the recipe if None."""
    resume: str
    """``auto``, ``none`` or a path."""


@dataclass(frozen=True)
class TrainPlan:
    """Everything that is known about a run before its ranks join."""

    launch: Launch
    """This process's place among the ranks."""
    config: Config
    """The resolved recipe."""
    settings: DeepSpeedSettings
    """The resolved DeepSpeed JSON."""
    directory: Path
    """The run directory."""
    resume: str
    """``auto``, ``none`` or a path."""
    dataset: Dataset
    """The training images, opened."""
    held_out: HeldOut | None = None
    """The held-out images, opened; None if the run does not evaluate."""
    choices: tuple[Path, ...] = ()
    """Checkpoints to resume from, in order of preference."""
    reader: CheckpointReader | None = None
    """The first choice whose files are all present; None for a new run."""
    initial: WeightsReader | None = None
    """The model of ``model.init_from``, for a new run only."""
    inherited: tuple[str, ...] = ()
    """What a new run takes over from `initial`, as ``section.key value``."""

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes."""
        return self.launch.rank == 0

    @property
    def text(self) -> TextFormat | None:
        """The encoders of a text model's captions."""
        return self.dataset.text if self.config.is_text else None

    @property
    def repa_network(self) -> FeatureNetwork | None:
        """The network of the image features, with REPA."""
        from diffmoe_ds.checkpoint.metadata import FeatureNetwork

        if self.config.aligned_block is None:
            return None
        assert self.dataset.features is not None, "checked by `with_features`"
        return FeatureNetwork(self.dataset.features.name, self.dataset.features.sha256)

    @property
    def images(self) -> int:
        """Images that the checkpoint has been trained on; 0 for a new run."""
        return 0 if self.reader is None else self.reader.metadata.images

    @property
    def began_from(self) -> str | None:
        """The absolute PATH of the ``--resume PATH`` that the run began with, now or before it was interrupted."""
        if self.resume not in ("auto", "none"):
            return os.path.abspath(self.resume)
        return None if self.reader is None else self.reader.metadata.began_from

    def fingerprint(self) -> str:
        """Return a hash of everything that must be identical on all ranks."""
        versions = [version(name) for name in ("diffmoe_ds", "deepspeed", "torch")]
        resolved = [config_to_dict(self.config), self.settings.json, *versions]
        return hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()

    def with_launch(self, launch: Launch) -> TrainPlan:
        """Return the plan with the launch that the rendezvous resolved."""
        return replace(self, launch=launch)

    def with_start(self) -> TrainPlan:
        """Return the plan with its starting point re-read from the file system.

        Raises:
            CheckpointError: `resume` contradicts the run directory, all checkpoints are damaged, or one does not match
                the model.
        """
        from diffmoe_ds.training.start import check_resumable, check_same_encoders, first_complete, resume_choices

        choices = resume_choices(self.resume, self.directory, self.launch)
        reader = first_complete(choices, self.launch, self.reader)
        if reader is not None:
            check_resumable(reader, self.config, self.settings, self.text, self.repa_network)
        initial, name = self.initial if reader is None else None, self.config.model.init_from
        if reader is None and initial is None and name is not None:  # the checkpoint is gone
            from diffmoe_ds.checkpoint.export import require_weights

            initial = require_weights(Path(name), "model.init_from")
        if initial is not None:
            check_same_encoders(initial, self.text, f"model.init_from {name}")
        return replace(self, choices=tuple(choices), reader=reader, initial=initial)

    def with_checkpoint(self, path: Path | None) -> TrainPlan:
        """Return the plan for resuming from another checkpoint; the same plan if it is the one already chosen.

        Raises:
            CheckpointError: the checkpoint does not match the model.
        """
        if path is None or (self.reader is not None and path == self.reader.path):
            return self
        from diffmoe_ds.checkpoint.load import CheckpointReader
        from diffmoe_ds.training.start import check_resumable

        reader = CheckpointReader(path)
        check_resumable(reader, self.config, self.settings, self.text, self.repa_network)
        return replace(self, reader=reader, initial=None)


def resolve_plan(request: TrainRequest, launch: Launch) -> TrainPlan:
    """Resolve the arguments of ``diffmoe train``.

    Raises:
        ConfigError: an argument, the recipe or the DeepSpeed JSON is invalid.
        CheckpointError: the checkpoint to resume from is missing, damaged or does not match the model.
        DataError: the dataset is missing or damaged.
    """
    directory = request.run_dir or default_directory(request.recipe)
    config, initial, inherited = _read_recipe(request, directory, launch)
    config, source = _choose_deepspeed_section(config, request)

    # Everything below needs torch or DeepSpeed.
    import torch

    from diffmoe_ds.data.dataset import (
        check_classes,
        check_exists,
        check_first_image,
        open_dataset,
        with_classes,
        with_features,
        with_text,
    )
    from diffmoe_ds.evaluation.held_out import open_held_out

    check_exists(config)
    dataset = open_dataset(config)
    config = with_features(with_text(with_classes(config, dataset), dataset), dataset)
    _check_sampling(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    launch, settings = fit_ranks(launch, lambda ranks: _resolve_settings(config, source, ranks, device))
    if "wandb" in settings.json and launch.rank == 0:
        check_wandb_login()
    if not settings.json.get("csv_monitor", {"output_path": "x"}).get("output_path"):
        settings.json["csv_monitor"].update(output_path=str(directory), job_name="csv")
    held_out = open_held_out(config, local_device(launch), dataset.text if config.is_text else None)
    plan = TrainPlan(
        launch, config, settings, directory, request.resume, dataset, held_out, initial=initial, inherited=inherited
    ).with_start()
    if plan.reader is None:  # a run that began with more classes may continue
        check_classes(config, dataset)
    check_first_image(config, dataset)
    if config.data.text_encoder:
        from diffmoe_ds.data.encoded_captions import release_encoders

        release_encoders()
    return plan


def _resolve_settings(config: Config, source: str, launch: Launch, device: str) -> DeepSpeedSettings:
    """Return the DeepSpeed settings for a number of ranks.

    Raises:
        ConfigError: the section is invalid, or the configuration is invalid for this number of ranks.
    """
    from diffmoe_ds.planning.pool import pool_rows

    settings = resolve_deepspeed(
        config.deepspeed, config, source, world=launch.world, local_world=launch.local_world, device=device,
        is_prebuilt=_is_prebuilt,
    )  # fmt: skip
    check_adaptive_previews(config, settings.ep_size, launch.world)
    pool_rows(config, settings, launch.world)
    return settings


def _read_recipe(
    request: TrainRequest, directory: Path, launch: Launch
) -> tuple[Config, WeightsReader | None, tuple[str, ...]]:
    """Return the configuration, and the model of ``model.init_from`` with what a new run takes over from it."""
    recipe = read_recipe(request.recipe, request.overrides)
    if recipe.init_from is None:
        return recipe.config(), None, ()
    from diffmoe_ds.training.fine_tuning import resolve_start
    from diffmoe_ds.training.start import first_complete, resume_choices

    own = first_complete(resume_choices(request.resume, directory, launch), launch)
    return resolve_start(recipe, None if own is None else own.config)


def _choose_deepspeed_section(config: Config, request: TrainRequest) -> tuple[Config, str]:
    """Return the configuration with the effective DeepSpeed section, and the name of its source."""
    if request.deepspeed_json is None:
        if not config.deepspeed:
            raise ConfigError(
                f"{request.recipe}: the recipe has no deepspeed section; pass --deepspeed_config, such as zero2."
            )
        return config, _source_of_section(config, request)
    if any(map(_is_deepspeed, request.overrides)):
        raise ConfigError(
            "--set deepspeed... changes the recipe's deepspeed section, which --deepspeed_config replaces; omit either."
        )
    raw = read_deepspeed_json(request.deepspeed_json)
    return config.model_copy(update={"deepspeed": raw}), str(request.deepspeed_json)


def _is_deepspeed(override: str) -> bool:
    return override.startswith("deepspeed.")


def _source_of_section(config: Config, request: TrainRequest) -> str:
    """Return a name for the recipe's ``deepspeed`` section, for errors.

    Raises:
        ConfigError: ``--set`` makes its keys invalid.
    """
    source = f"{request.recipe}: deepspeed"
    if not any(map(_is_deepspeed, request.overrides)):
        return source
    own = read_recipe(request.recipe, [text for text in request.overrides if not _is_deepspeed(text)]).tree
    try:
        check_keys(own.get("deepspeed") or {}, source)
    except ConfigError:
        return f"{request.recipe} with --set: deepspeed"
    check_keys(config.deepspeed, "--set: deepspeed")
    return f"{request.recipe} with --set: deepspeed"


def _is_prebuilt(operator: str) -> bool:
    from diffmoe_ds.distributed.deepspeed_seam import operator_state  # only on a GPU: importing DeepSpeed takes seconds

    return operator_state(operator) == "prebuilt"


def _check_sampling(config: Config) -> None:
    """Raise ConfigError if the sample grids of the run, or the images of its metrics, cannot be generated."""
    from diffmoe_ds.diffusion.objective import make_objective
    from diffmoe_ds.sampling.guidance import check_guidance
    from diffmoe_ds.sampling.samplers import check_sampling

    sampler = config.sample.sampler or make_objective(config.objective.kind).samplers[0]
    check_sampling(config.objective.kind, sampler, config.sample.steps, prefix="sample.")
    if config.run.sample_every_images or config.eval.metrics:
        check_guidance(config.sample.cfg_scale, None, config)


def check_adaptive_previews(config: Config, ep_size: int, world: int) -> None:
    """Check that the sampler of the sample grids runs the same number of forward passes on ranks that need it.

    Args:
        config: the run's configuration.
        ep_size: number of ranks that share the experts.
        world: number of ranks.

    Raises:
        ConfigError: the number of forward passes depends on the images.
    """
    from diffmoe_ds.sampling.samplers import ADAPTIVE

    share_tokens = config.has_pool and config.inference_choices[0] != "per_token" and world > 1
    generates = config.run.sample_every_images or config.eval.metrics
    if generates and config.sample.sampler in ADAPTIVE and (ep_size > 1 or share_tokens):
        raise ConfigError(
            f"sample.sampler {config.sample.sampler} runs as many forward passes as a rank's images need, but in this "
            "run the ranks share experts and must run the same number; use heun."
        )
