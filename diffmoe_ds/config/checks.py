"""Checks between fields of the configuration; `Config` runs them once each field is valid on its own."""

from __future__ import annotations

from diffmoe_ds.config.fields import AUTO_TEXT
from diffmoe_ds.config.presets import Size
from diffmoe_ds.config.routing import RoutingConfig
from diffmoe_ds.config.sections import DataConfig, LossConfig, ModelConfig, SampleConfig
from diffmoe_ds.errors import ConfigError

MAX_TOKENS = 2**20
"""Maximum tokens per image: more than attention can handle, yet small enough for the position table."""

MAX_POSITIONS = 2**28
"""Maximum numbers in the table of positions."""
MAX_PARAMETERS = 1e12
"""Maximum number of parameters."""


def check_shapes(
    model: ModelConfig, routing: RoutingConfig, size: Size, tokens_per_image: int, num_experts: int
) -> None:
    """Check that the transformer can be built.

    Args:
        model: the section.
        routing: the section.
        size: the size that the model resolves to.
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
    expert = routing.expert_width or hidden
    experts = num_experts * expert + routing.shared_experts * (routing.shared_width or expert)
    parameters = size.depth * width * (10 * width + 2 * (experts if num_experts > 1 else hidden))
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
            "batch_pool has such pools."
        )
    if routing.kind == "expert_choice" and tokens_per_image * capacity < num_experts:
        raise ConfigError(
            f"routing.capacity must be at least {num_experts / tokens_per_image:g} for expert_choice, else an expert "
            f"takes none of the {tokens_per_image} tokens of an image, got {capacity}; a smaller model.patch_size also "
            "helps."
        )


def check_router(routing: RoutingConfig, num_experts: int, has_capacity_predictor: bool) -> None:
    """Check that keys which only some routers have fit the router.

    Args:
        routing: the section.
        num_experts: experts E per MoE layer.
        has_capacity_predictor: whether the layers have a capacity predictor.

    Raises:
        ConfigError: they do not.
    """
    if num_experts == 1:
        return
    kept = routing.used_groups
    if routing.kind != "token_choice" and (routing.groups > 1 or routing.bias_rate is not None):
        key, value = ("groups", routing.groups) if routing.groups > 1 else ("bias_rate", routing.bias_rate)
        raise ConfigError(
            f"routing.{key} must be unset for the router {routing.kind}, got {value:g}; only token_choice has it."
        )
    if num_experts % routing.groups or (kept < routing.groups and num_experts < 2 * routing.groups):
        raise ConfigError(
            f"routing.groups must divide the {num_experts} experts into groups of two or more, got {routing.groups}."
        )
    if not kept <= routing.groups or kept * (num_experts // routing.groups) < routing.capacity:
        raise ConfigError(
            f"routing.groups_kept must be at most routing.groups ({routing.groups}) and leave enough experts "
            f"for routing.capacity ({routing.capacity:g}), got {kept}."
        )
    if routing.renormalize and routing.score == "identity":
        raise ConfigError("routing.score must be softmax or sigmoid for routing.renormalize, got identity.")
    if routing.unconditional_expert and (
        routing.kind not in ("token_choice", "expert_choice") or has_capacity_predictor
    ):
        raise ConfigError(
            "routing.unconditional_expert needs routing.kind token_choice, or expert_choice with "
            f"routing.capacity_predictor false; got {routing.kind}"
            f"{' with a capacity predictor' if has_capacity_predictor else ''}."
        )


def check_blocks(model: ModelConfig, routing: RoutingConfig, size: Size, num_experts: int) -> None:
    """Check that the layers of a block fit each other.

    Args:
        model: the section.
        routing: the section.
        size: the size that the model resolves to.
        num_experts: experts E per MoE layer.

    Raises:
        ConfigError: they do not.
    """
    if model.positions == "rope" and size.hidden_size // size.num_heads % 4:
        raise ConfigError(
            f"model.positions rope needs a head width divisible by 4, got {size.hidden_size // size.num_heads}; change "
            "model.num_heads."
        )
    if num_experts > 1 and model.mlp == "silu" and routing.expert_mlp is None:
        raise ConfigError("routing.expert_mlp must be gelu or swiglu if model.mlp is silu, which experts cannot be.")
    last = size.depth - 1 - (size.depth % 2 if routing.interleave else 0)
    if num_experts > 1 and routing.dense_blocks > max(0, last):
        raise ConfigError(
            f"routing.dense_blocks must leave at least one block with experts, so be at most {max(0, last)}, got "
            f"{routing.dense_blocks}."
        )
    if num_experts > 1 and routing.unconditional_expert and model.label_dropout == 0:
        raise ConfigError(
            "model.label_dropout must be positive for routing.unconditional_expert, which takes the images whose label "
            "is dropped, got 0."
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
