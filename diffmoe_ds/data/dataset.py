"""From a recipe's ``data`` section to a data set that the loader can read."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from diffmoe_ds.config.schema import Config
from diffmoe_ds.data.loader import LoaderSettings, PositionLoader
from diffmoe_ds.data.reader import Dataset
from diffmoe_ds.data.sources.cache import ShardCache, shard_cache
from diffmoe_ds.data.sources.folder import ImageFolder, Source, images_below
from diffmoe_ds.data.sources.index_files import refuse_unfinished
from diffmoe_ds.data.sources.raw import RawImages
from diffmoe_ds.data.sources.shard_paths import expand, is_shard
from diffmoe_ds.data.sources.shards import EMBEDDED, ShardDataset
from diffmoe_ds.errors import ConfigError, DataError
from diffmoe_ds.rng import training_draws


def open_dataset(config: Config) -> Dataset:
    """The images that ``data.path`` names.

    Raises ``DataError`` for what is wrong with the images, ``ConfigError`` for settings that do not fit them.
    """
    data, model = config.data, config.model
    source = open_source(data.path or EMBEDDED, cache=shard_cache(data))
    if isinstance(source, ShardDataset):
        _check_cache(config, source)
    if data.vae is not None:
        if isinstance(source, ShardDataset) and source.latents is not None:
            raise ConfigError(f"data.vae is {data.vae}, but {data.path} holds latents already; leave data.vae out.")
        from diffmoe_ds.data.vae import downsampling, vae_settings

        settings = vae_settings(data.vae)
        if settings["latent_channels"] != model.in_channels:
            raise ConfigError(
                f"model.in_channels is {model.in_channels}, but the latents of data.vae {data.vae} have "
                f"{settings['latent_channels']} channels."
            )
        return RawImages(source, model.input_size * downsampling(settings))
    return source if isinstance(source, ShardDataset) else RawImages(source, model.input_size)


def check_first_image(config: Config, dataset: Dataset) -> None:
    """DataError unless the run's first image is one that the model takes; asks nothing of images behind URLs."""
    if isinstance(dataset, ShardDataset) and dataset.remote_bytes():
        return
    model = config.model
    draws = partial(
        training_draws,
        config.run.seed,
        shape=(model.in_channels, model.input_size, model.input_size),
        label_dropout=model.label_dropout,
        posterior=dataset.latents is not None or config.data.vae is not None,
    )
    settings = LoaderSettings(
        seed=config.run.seed, global_batch=1, micro_batch=1, accumulation=1, rank=0, world=1,
        image_shape=image_shape(config), num_classes=model.num_classes,
    )  # fmt: skip
    loader = PositionLoader(dataset, settings, draws)
    try:
        next(iter(loader))
    except DataError as error:
        if config.data.path is None:
            raise DataError(f"data.path is not set, and the embedded images do not fit this model: {error}") from None
        raise


def open_source(path: str | Path, unlabelled: bool = False, cache: ShardCache | None = None) -> ShardDataset | Source:
    """Shards, or a folder of images; raises ``DataError`` for one that holds both, since either may be meant."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        refuse_unfinished(folder)
        shard = min((p.name for p in folder.iterdir() if is_shard(p.name)), default=None)
        if shard is None:
            return ImageFolder(folder, unlabelled)
        image = next(images_below(folder), None)
        if image is not None:
            raise DataError(
                f"{folder} holds both shards, such as {shard}, and images, such as {image}; give {folder}/*.tar for "
                "the shards, or move them away for the images"
            )
    return ShardDataset(expand(path), cache, unlabelled=unlabelled)


def image_shape(config: Config) -> tuple[int, int, int]:
    """(C, H, W) of what the loader reads: the model's input, or the pixels that ``data.vae`` makes it from."""
    model = config.model
    if config.data.vae is None:
        return model.in_channels, model.input_size, model.input_size
    from diffmoe_ds.data.vae import downsampling, vae_settings

    size = model.input_size * downsampling(vae_settings(config.data.vae))
    return 3, size, size


def _check_cache(config: Config, shards: ShardDataset) -> None:
    """Shards behind URLs are read from this host's cache; what is needed at one time must fit into it."""
    data, limit = config.data, config.data.cache_gb * 1e9
    remote = shards.remote_bytes()
    if data.shuffle == "window":
        sizes = shards.shard_sizes
        # This window and the next, and the shards that lie across their ends.
        remote = min(remote, remote / len(shards) * 2 * (data.shuffle_window + 2 * max(sizes)))
    if remote > limit:
        remedy = "raise it" if data.shuffle == "window" else "raise it, or set data.shuffle=window"
        raise ConfigError(
            f"data.cache_gb is {data.cache_gb:g}, but data.shuffle={data.shuffle} reads {remote / 1e9:.3g} GB of "
            f"fetched shards at a time; {remedy}."
        )
