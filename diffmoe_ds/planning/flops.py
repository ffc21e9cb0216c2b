"""Floating-point operations of one image: 2 per multiply-add of every matrix product, convolution and attention.

Element-wise work, softmax and norms are left out, as is what activation checkpointing or attention recomputes: these
are the model's operations, those by which MFU (arXiv 2204.02311, appendix B) divides.

Text counts at its padded length, as the model computes it.

Legend: S tokens per image, D width, H hidden width, E experts, C capacity.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffmoe_ds.config.schema import Config
from diffmoe_ds.diffusion.objective import make_objective
from diffmoe_ds.model.conditioning import context_width
from diffmoe_ds.model.layers import TIME_FREQUENCIES
from diffmoe_ds.moe.capacity import tokens_per_expert


@dataclass(frozen=True)
class FlopCounts:
    """Floating-point operations of one image, averaged over images where routing varies."""

    attention: float
    """Of the forward pass: projections, scores and weighted sums of all blocks, those of cross-attention included."""
    ffn: float
    """Of the forward pass: dense FFNs, routed experts at capacity C, and shared experts."""
    routing: float
    """Of the forward pass: routers and capacity predictors."""
    other: float
    """Of the forward pass: patch, time, text and final layers, and the adaLN of all blocks."""
    training: float
    """Of a training step: the forward pass, the gradients of all weights, and those of the inputs that need one."""

    @property
    def forward(self) -> float:
        """Of the forward pass."""
        return self.attention + self.ffn + self.routing + self.other


def flops_per_image(config: Config) -> FlopCounts:
    """Count the floating-point operations of one image.

    Args:
        config: the run's configuration.

    Returns:
        The counts; 1e9 of them are a GFLOP, twice a "GMAC".
    """
    model, routing, size = config.model, config.routing, config.size
    tokens, width = config.tokens_per_image, size.hidden_size
    patch = model.patch_size**2
    moe_blocks = len(config.moe_blocks)
    attention = size.depth * (2 * tokens * width * 4 * width + 2 * 2 * tokens**2 * width)
    cross, text, features = _text_flops(config)
    attention += size.depth * cross
    ffn: float = (size.depth - moe_blocks) * tokens * _ffn_flops(model.mlp, width, config.ffn_hidden)
    if moe_blocks:
        ffn += moe_blocks * _rows_per_image(config) * _ffn_flops(config.expert_mlp, width, config.expert_hidden)
        ffn += moe_blocks * tokens * _ffn_flops(config.expert_mlp, width, config.shared_hidden)
    embed = 2 * tokens * patch * model.in_channels * width + 2 * TIME_FREQUENCIES * width
    out_channels = make_objective(config.objective.kind).out_channels(model.in_channels)
    final = 2 * tokens * width * patch * out_channels + 2 * width * 2 * width
    other = embed + 2 * width * width + size.depth * 2 * width * 6 * width + final + text
    predictor = moe_blocks * 2 * tokens * width * config.num_experts
    read = width * (2 if routing.router_input == "time" else 1)
    router = moe_blocks * 2 * tokens * read * (config.num_experts + (read if routing.affinity == "mlp" else 0))
    first = second = 0
    if config.has_capacity_predictor and moe_blocks:
        first, second = moe_blocks * 2 * tokens * width * width, predictor
    forward = attention + ffn + router + first + second + other
    # the backward pass has two products for each of the forward pass, but images, times, text features and
    # what the capacity predictor reads (detached) need no gradient
    heads = moe_blocks * 2 * tokens * read * patch * model.in_channels if routing.per_layer_weight else 0
    training = 3 * (forward + _projector_flops(config) + heads) - embed - features - first
    return FlopCounts(attention, ffn, router + first + second, other, training)


def _projector_flops(config: Config) -> int:
    """Return the operations of REPA's projector for an image, which only training uses."""
    if config.aligned_block is None:
        return 0
    hidden, (_, features) = config.loss.repa_hidden, config.loss.repa_features
    return 2 * config.tokens_per_image * hidden * (config.size.hidden_size + hidden + features)


def _text_flops(config: Config) -> tuple[int, int, int]:
    """Return the operations of a text model for an image.

    Returns:
        Those of a block's cross-attention, those of the conditioner, and those of the conditioner's layers that read
        text features; 0 for a class model.
    """
    if not config.is_text:
        return 0, 0, 0
    tokens, width = config.tokens_per_image, config.size.hidden_size
    encoders, context = config.text_layout.encoders, context_width(config.text_layout, width)
    length = sum(encoder.tokens for encoder in encoders)
    cross = 2 * 2 * tokens * width**2 + 2 * length * context * 2 * width + 2 * 2 * tokens * length * width
    features = sum(2 * e.pooled * width + 2 * e.tokens * e.width * context for e in encoders)
    return cross, features + 2 * width**2, features


def _ffn_flops(mlp: str, width: int, hidden: int) -> int:
    """Return the operations of an FFN for a token."""
    return 2 * width * hidden * (3 if mlp == "swiglu" else 2)


def _rows_per_image(config: Config) -> float:
    """Return the average number of rows that the experts of a layer compute for an image, in training."""
    routing, tokens = config.routing, config.tokens_per_image
    rows = tokens * routing.capacity
    if routing.kind == "expert_choice":  # exact: K is rounded down for each image
        rows = config.num_experts * tokens_per_expert(routing.capacity, tokens, config.num_experts)
    return (1 - config.null_fraction) * rows + config.null_fraction * tokens
