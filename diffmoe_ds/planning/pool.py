"""Sizes of the routing pool: ranks, competing tokens, and tokens per expert."""

from __future__ import annotations

from diffmoe_ds.config.deepspeed import DeepSpeedSettings
from diffmoe_ds.config.schema import Config
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.moe.capacity import tokens_per_expert


def pool_ranks(config: Config, settings: DeepSpeedSettings, world: int) -> int:
    """Return the number of ranks in the pool selected by `routing.pool`."""
    return {"rank": 1, "ep": settings.ep_size, "world": world}[config.routing.pool]


def selection_ranks(config: Config, settings: DeepSpeedSettings, world: int) -> int:
    """Return the number of ranks whose tokens compete: those of the pool, or of a pool of `routing.pool_images`."""
    images = config.routing.pool_images
    return pool_ranks(config, settings, world) if images is None else max(1, images // settings.micro_batch)


def pool_rows(config: Config, settings: DeepSpeedSettings, world: int) -> tuple[int, int]:
    """Return (tokens T that compete, rows K that each expert takes of them) for one micro-batch.

    Raises:
        ConfigError: the pool is too small for each expert to take at least one token, or `routing.pool_images` does not
            divide it.
    """
    ranks = pool_ranks(config, settings, world)
    images = _images_that_compete(config, settings.micro_batch, ranks)
    tokens = images * config.tokens_per_image
    rows = tokens_per_expert(config.routing.capacity, tokens, config.num_experts)
    if config.routing.kind == "expert_race":
        if tokens_per_expert(config.routing.capacity, tokens, 1) < 1:
            raise ConfigError(
                f"routing.capacity is {config.routing.capacity}: a pool of {tokens} tokens gives all experts together "
                "less than one token; raise the capacity or the number of images in a pool."
            )
    elif rows < 1:
        raise ConfigError(
            f"routing.capacity is {config.routing.capacity}: a pool of {tokens} tokens gives each of "
            f"{config.num_experts} experts less than one token; raise the capacity or the number of images in a pool."
        )
    return tokens, rows


def _images_that_compete(config: Config, micro_batch: int, ranks: int) -> int:
    """Return the number of images in a pool; check that `routing.pool_images` gives pools of equal size."""
    images, whole = config.routing.pool_images, micro_batch * ranks
    if images is None:
        return whole
    if whole % images or (images % micro_batch and micro_batch % images):
        valid = [n for n in range(1, whole + 1) if not whole % n and (not n % micro_batch or not micro_batch % n)]
        raise ConfigError(
            f"routing.pool_images must be one of {', '.join(map(str, valid))}, because the pool has {ranks} rank(s) "
            f"with {micro_batch} images each, got {images}."
        )
    return images
