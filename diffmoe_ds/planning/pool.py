"""Sizes of the routing pool: competing tokens, and tokens per expert."""

from __future__ import annotations

from diffmoe_ds.config.deepspeed import DeepSpeedSettings
from diffmoe_ds.config.schema import Config
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.moe.capacity import tokens_per_expert


def pool_rows(config: Config, settings: DeepSpeedSettings, world: int) -> tuple[int, int]:
    """Return (tokens T of a pool, rows K that each expert takes from it) for one micro-batch.

    Raises:
        ConfigError: the pool is too small for each expert to take at least one token.
    """
    ranks = {"rank": 1, "ep": settings.ep_size, "world": world}[config.routing.pool]
    tokens = settings.micro_batch * ranks * config.tokens_per_image
    rows = tokens_per_expert(config.routing.capacity, tokens, config.num_experts)
    if rows < 1:
        raise ConfigError(
            f"routing.capacity is {config.routing.capacity}: a pool of {tokens} tokens gives each of "
            f"{config.num_experts} experts less than one token; raise the capacity or the micro-batch."
        )
    return tokens, rows
