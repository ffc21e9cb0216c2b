"""Checks between fields of the configuration; `Config` runs them once each field is valid on its own."""

from __future__ import annotations

from diffmoe_ds.config.fields import AUTO_TEXT
from diffmoe_ds.config.presets import Size
from diffmoe_ds.config.sections import DataConfig, LossConfig, ModelConfig, RoutingConfig, SampleConfig
from diffmoe_ds.errors import ConfigError

MAX_TOKENS = 2**20
"""Maximum tokens per image: more than attention can handle, yet small enough for the position table."""

MAX_POSITIONS = 2**28
"""Maximum numbers in the table of positions."""
MAX_PARAMETERS = 1e12
"""Maximum number of parameters."""


def check_shapes(model: ModelConfig, size: Size, tokens_per_image: int, num_experts: int) -> None:
    """Check that the transformer can be built.

    Args:
        model: the section.
        size: the size that it resolves to.
        tokens_per_image: tokens S.
        num_experts: experts E per MoE layer.

    Raises:
        ConfigError: widths, heads, patches or the number of tokens are incompatible.
    """
    width, heads = size.hidden_size, size.num_heads
    hidden = width * model.mlp_ratio
    if not 1 <= hidden < 2**63:
        raise ConfigError(
            f"model.mlp_ratio must give an FFN a hidden width from 1 to 2^63, got {model.mlp_ratio}, which gives "
            f"{hidden:g} at a token width of {width}."
        )
    parameters = size.depth * width * (10 * width + 2 * hidden * max(1, num_experts))
    if parameters > MAX_PARAMETERS:
        raise ConfigError(
            f"model: depth {size.depth}, width {width}, mlp_ratio {model.mlp_ratio:g} and {num_experts} expert(s) give "
            f"about {parameters:.1e} parameters; at most {MAX_PARAMETERS:.0e} are possible."
        )
    if model.input_size % model.patch_size:
        raise ConfigError(
            f"model.patch_size must divide model.input_size ({model.input_size}), got {model.patch_size}."
        )
    if tokens_per_image > MAX_TOKENS:
        raise ConfigError(
            f"model.input_size must give at most {MAX_TOKENS:,} tokens per image, got {model.input_size}, which gives "
            f"{tokens_per_image:,}; raise model.patch_size."
        )
    if tokens_per_image * width > MAX_POSITIONS:
        raise ConfigError(
            f"model.hidden_size times tokens per image must be at most {MAX_POSITIONS:,}, the size of the table of "
            f"positions, got {width} times {tokens_per_image:,}."
        )
    if width % 4 or width % heads:
        raise ConfigError(f"model.hidden_size must be divisible by 4 and by model.num_heads ({heads}), got {width}.")


def check_experts(routing: RoutingConfig, num_experts: int, tokens_per_image: int) -> None:
    """Check that the router can fill the experts.

    Args:
        routing: the section.
        num_experts: experts E per MoE layer.
        tokens_per_image: tokens S.

    Raises:
        ConfigError: the capacity is invalid for the router.
    """
    capacity = routing.capacity
    if routing.kind != "dense" and capacity > num_experts:
        raise ConfigError(f"routing.capacity must not exceed the number of experts ({num_experts}), got {capacity}.")
    if routing.kind == "token_choice" and capacity != int(capacity):
        raise ConfigError(f"routing.capacity must be an integer for token_choice, got {capacity}.")
    if routing.kind != "batch_pool" and routing.pool_images is not None:
        raise ConfigError(
            f"routing.pool_images must be unset for the router {routing.kind}, got {routing.pool_images}; only "
            "batch_pool has a pool."
        )
    if routing.kind == "expert_choice" and tokens_per_image * capacity < num_experts:
        raise ConfigError(
            f"routing.capacity must be at least {num_experts / tokens_per_image:g} for expert_choice, else an expert "
            f"takes none of the {tokens_per_image} tokens of an image, got {capacity}; a smaller model.patch_size also "
            "helps."
        )


def check_aligned_block(loss: LossConfig, depth: int) -> None:
    """Check that the block that is aligned with image features exists.

    Raises:
        ConfigError: it does not.
    """
    if loss.repa_block is not None and loss.repa_block > depth:
        raise ConfigError(f"loss.repa_block must be at most the number of blocks ({depth}), got {loss.repa_block}.")


def check_no_text(model: ModelConfig, data: DataConfig, sample: SampleConfig) -> None:
    """Check that a class model sets no key of text models.

    Args:
        model: the section.
        data: the section.
        sample: the section.

    Raises:
        ConfigError: it does.
    """
    for key, value, default in (
        ("model.text_encoders", model.text_encoders, AUTO_TEXT),
        ("data.text_encoder", data.text_encoder, ()),
        ("data.captions", data.captions, None),
        ("sample.prompts", sample.prompts, ()),
    ):
        if value != default:
            raise ConfigError(f"{key} needs a text model; set model.conditioning=text.")


def check_captions(data: DataConfig) -> None:
    """Check that a table of captions has an effect.

    Raises:
        ConfigError: it has none.
    """
    if data.captions is not None and not data.text_encoder:
        raise ConfigError(f"data.captions {data.captions} needs data.text_encoder, which encodes the captions.")
