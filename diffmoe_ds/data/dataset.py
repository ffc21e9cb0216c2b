"""Open the dataset that the `data` section of a recipe names."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from diffmoe_ds.config.fields import AUTO_CLASSES, AUTO_FEATURES, AUTO_TEXT
from diffmoe_ds.config.schema import Config
from diffmoe_ds.data.captions import open_captions
from diffmoe_ds.data.loader import LoaderSettings, PositionLoader
from diffmoe_ds.data.reader import Dataset
from diffmoe_ds.data.sources.cache import ShardCache, shard_cache
from diffmoe_ds.data.sources.folder import ImageFolder, Source, images_below, is_image
from diffmoe_ds.data.sources.index_files import refuse_unfinished
from diffmoe_ds.data.sources.raw import RawImages
from diffmoe_ds.data.sources.remote import is_url
from diffmoe_ds.data.sources.shard_paths import expand, is_shard
from diffmoe_ds.data.sources.shards import EMBEDDED, ShardDataset
from diffmoe_ds.errors import ConfigError, DataError
from diffmoe_ds.files import expand_user
from diffmoe_ds.rng import training_draws
from diffmoe_ds.text import counted

PREPARED_BY = {
    "emoji": "in a checkout, `npm pack emoji-datasource-google@16.0.0` and `python -m examples.emoji.prepare_emoji "
    "emoji-datasource-google-16.0.0.tgz` make the set of this recipe",
    "emoji-text": "docs/text.md has the three commands that make the set of this recipe",
}
"""How to make the data of packaged recipes that `diffmoe prepare` alone does not, by ``data.path``."""


def open_dataset(config: Config, *, keeps_text: bool = False) -> Dataset:
    """Open the images that `data.path` names.

    Args:
        config: the run's configuration.
        keeps_text: use text features that the images have already in spite of `data.text_encoder`.

    Raises:
        DataError: the images cannot be read.
        ConfigError: the settings do not fit the images.
    """
    data = config.data
    source = open_source(data.path or EMBEDDED, cache=shard_cache(data))
    if isinstance(source, ShardDataset):
        _check_cache(config, source)
    images = _images(config, source)
    if not data.text_encoder or (keeps_text and images.text is not None):
        return images
    if images.text is not None:
        raise ConfigError(
            f"data.text_encoder is {', '.join(data.text_encoder)}, but {data.path} already holds text features; remove "
            "data.text_encoder."
        )
    from diffmoe_ds.data.encoded_captions import EncodedCaptions, load_encoders

    return EncodedCaptions(images, open_captions(source, data.captions), load_encoders(data.text_encoder))


def _images(config: Config, source: ShardDataset | Source) -> Dataset:
    """Return the images of a source as training reads them.

    Raises:
        ConfigError: the settings do not fit the images.
    """
    data, model = config.data, config.model
    if data.vae is not None:
        if isinstance(source, ShardDataset) and source.latents is not None:
            raise ConfigError(f"data.vae is {data.vae}, but {data.path} holds latents already; remove data.vae.")
        from diffmoe_ds.data.vae import downsampling, vae_settings

        settings = vae_settings(data.vae)
        if settings["latent_channels"] != model.in_channels:
            raise ConfigError(
                f"model.in_channels is {model.in_channels}, but the latents of data.vae {data.vae} have "
                f"{settings['latent_channels']} channels."
            )
        return RawImages(source, model.input_size * downsampling(settings))
    return source if isinstance(source, ShardDataset) else RawImages(source, model.input_size, model.in_channels)


def check_exists(config: Config) -> None:
    """Check that the training images exist, unless they are remote.

    Raises:
        DataError: they do not; names the command that makes them.
    """
    path, model = config.data.path, config.model
    if path is None or not is_missing(path):
        return
    if path in PREPARED_BY:
        remedy = PREPARED_BY[path]
    elif config.data.vae is None and model.in_channels > 3:
        size = 8 * model.input_size  # of latents of the Stable Diffusion VAEs
        remedy = f"`diffmoe prepare latents --images IMAGES --vae VAE --size {size} --out {path}` makes it"
    else:
        remedy = (
            "set it to a folder of images or to shards, or run `diffmoe init IMAGES`, which writes a recipe for them"
        )
    raise DataError(f"data.path {path} does not exist; {remedy}")


def is_missing(path: str) -> bool:
    """Return whether a path of images is neither a URL nor a pattern, and does not exist."""
    is_plain = not is_url(path) and not any(character in path for character in "*?[{")
    return is_plain and not expand_user(path).exists()


def with_classes(config: Config, dataset: Dataset) -> Config:
    """Return the configuration with the number of classes of the training set, if ``model.num_classes`` is ``auto``."""
    if config.model.num_classes != AUTO_CLASSES or config.is_text:
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"num_classes": _classes(dataset)})})


def with_text(config: Config, dataset: Dataset) -> Config:
    """Return the configuration of a text model with the shapes of the dataset's text features; others as they are.

    Raises:
        DataError: the dataset has no text features.
        ConfigError: ``model.text_encoders`` is set to other shapes.
    """
    if not config.is_text:
        return config
    model, path = config.model, config.data.path or "the embedded set"
    if dataset.text is None:
        raise DataError(
            f"{path} has no text features, which a text model needs; add them with `diffmoe prepare text --images "
            f"{config.data.path or 'IMAGES'} --encoder ENCODER --out DIR`, or set data.text_encoder to encode the "
            "captions of a small set at startup"
        )
    shapes = dataset.text.shapes
    if model.text_encoders not in (AUTO_TEXT, shapes):
        raise ConfigError(
            f"model.text_encoders is {[*map(list, model.text_encoders)]}, but the text features of {path} are "
            f"{[*map(list, shapes)]} (tokens, width, pooled width); use the same encoders, or set it to auto for a new "
            "model."
        )
    update = {"num_classes": 1, "text_encoders": shapes}
    return config.model_copy(update={"model": model.model_copy(update=update)})


def with_features(config: Config, dataset: Dataset) -> Config:
    """Return the configuration with the shape of the dataset's image features, if the run uses REPA.

    Raises:
        DataError: the dataset has no image features.
        ConfigError: ``loss.repa_features`` is set to another shape.
    """
    if config.aligned_block is None:
        return config
    loss, path = config.loss, config.data.path or "the embedded set"
    if dataset.features is None:
        raise DataError(
            f"{path} has no image features, which loss.repa_weight {loss.repa_weight:g} needs; prepare the images with "
            "`diffmoe prepare latents` or `diffmoe prepare images` and --features NETWORK, or set loss.repa_weight to 0"
        )
    shape = dataset.features.side, dataset.features.width
    if loss.repa_features not in (AUTO_FEATURES, shape):
        raise ConfigError(
            f"loss.repa_features is {[*loss.repa_features]}, but the image features of {path} are {[*shape]} (side, "
            "width); set it to auto."
        )
    return config.model_copy(update={"loss": loss.model_copy(update={"repa_features": shape})})


def check_classes(config: Config, dataset: Dataset) -> None:
    """Check that a new model has a class for every label, and images for every class of a set that names them.

    Raises:
        ConfigError: it does not.
    """
    if config.is_text:
        return
    count, found = config.model.num_classes, _classes(dataset)
    if dataset.labels.max() >= count or (dataset.classes is not None and count > found):
        raise ConfigError(
            f"model.num_classes is {count}, but {config.data.path or 'the embedded set'} has {found} classes; "
            "set it to auto."
        )


def missing_classes(config: Config, dataset: Dataset) -> str | None:
    """Return a sentence if classes of the model have no images; classes without names may legitimately have none."""
    count, found = config.model.num_classes, _classes(dataset)
    if count <= found or config.is_text:
        return None
    return (
        f"model.num_classes is {count}, but the labels of {config.data.path or 'the embedded set'} end at {found - 1}; "
        "the other classes remain untrained, unless model.num_classes is auto"
    )


def truncated_captions(config: Config, dataset: Dataset) -> str | None:
    """Return a sentence if captions that were encoded at startup are longer than an encoder reads."""
    if not config.data.text_encoder:
        return None
    from diffmoe_ds.data.encoded_captions import EncodedCaptions

    assert isinstance(dataset, EncodedCaptions), type(dataset)
    if not dataset.truncated:
        return None
    found = counted(dataset.truncated, "caption")
    return f"data.text_encoder truncates {found} of the training set to its maximum number of tokens"


def _classes(dataset: Dataset) -> int:
    return len(dataset.classes or ()) or max(1, int(dataset.labels.max()) + 1)  # unlabelled images have the label -1


def check_first_image(config: Config, dataset: Dataset) -> None:
    """Read the first image of a run, so that images which do not fit the model are found early; not behind a URL.

    Raises:
        DataError: the image cannot be read or does not fit the model.
    """
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
        image_shape=image_shape(config), num_classes=model.num_classes, reads_text=config.is_text,
        reads_features=config.aligned_block is not None,
        replaces_unreadable=config.data.max_unreadable > 0,
        shuffle="whole" if config.data.shuffle == "whole" else "feistel",
    )  # fmt: skip
    loader = PositionLoader(dataset, settings, draws)
    try:
        next(iter(loader))
    except DataError as error:
        if config.data.path is None:
            raise DataError(f"data.path is not set, and the embedded images do not fit this model: {error}") from None
        raise


def open_source(path: str | Path, unlabelled: bool = False, cache: ShardCache | None = None) -> ShardDataset | Source:
    """Open shards or a folder of images.

    Args:
        path: a folder, or what `expand` accepts.
        unlabelled: ignore labels and class folders.
        cache: for shards behind URLs.

    Raises:
        DataError: there are no images, or the folder holds both shards and images, which is ambiguous.
    """
    folder = expand_user(path)
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
    elif is_image(folder.name) and folder.is_file():
        raise DataError(f"{folder} is a single image; give the folder that holds it, {folder.parent}")
    return ShardDataset(expand(path), cache, unlabelled=unlabelled)


def image_shape(config: Config) -> tuple[int, int, int]:
    """Return the (C, H, W) that the loader reads: the model's input, or the pixels that `data.vae` encodes."""
    model = config.model
    if config.data.vae is None:
        return model.in_channels, model.input_size, model.input_size
    from diffmoe_ds.data.vae import downsampling, vae_settings

    size = model.input_size * downsampling(vae_settings(config.data.vae))
    return 3, size, size


def _check_cache(config: Config, shards: ShardDataset) -> None:
    """Check that the shards which are needed at the same time fit into the cache."""
    data, limit = config.data, config.data.cache_gb * 1e9
    remote: float = shards.remote_bytes()
    if data.shuffle == "window":
        sizes = shards.shard_sizes
        # This window and the next, and the shards that span their ends.
        remote = min(remote, remote / len(shards) * 2 * (data.shuffle_window + 2 * max(sizes)))
    if remote > limit:
        remedy = "increase it" if data.shuffle == "window" else "increase it, or set data.shuffle=window"
        raise ConfigError(
            f"data.cache_gb is {data.cache_gb:g}, but data.shuffle={data.shuffle} needs {remote / 1e9:.3g} GB of "
            f"downloaded shards at a time; {remedy}."
        )
