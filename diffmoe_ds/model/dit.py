"""The diffusion transformer (DiT), dense or with experts.

Legend: B images, S tokens per image, D width, C channels, E experts, F width of image features.
Source: DiT (arXiv 2212.09748) with the MoE blocks of DiffMoE (arXiv 2503.14487).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffmoe_ds.config.nearest import unknown
from diffmoe_ds.config.schema import Config
from diffmoe_ds.diffusion.objective import make_objective
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.model.conditioning import context_width, make_conditioner
from diffmoe_ds.model.layers import (
    FFN,
    Attention,
    Context,
    CrossAttention,
    FinalLayer,
    PatchEmbed,
    TimestepEmbedder,
    block_norm,
    layer_norm,
    modulate,
    rotations,
    sincos_positions,
    unpatchify,
)
from diffmoe_ds.moe.first_pass import both_passes
from diffmoe_ds.moe.layer import MoELayer, Routing, bounded_dispatch
from diffmoe_ds.moe.null_images import NullImages, find_null_images


class DiTOutput(NamedTuple):
    """Output of the transformer."""

    prediction: Tensor
    """fp32 [B, C, height, width]: the velocity (flow), or noise and variance (DDPM, twice the channels)."""
    routing: tuple[Routing, ...]
    """One entry for each MoE layer, in the order of the blocks."""
    aligned_BSF: Tensor | None = None
    """What REPA aligns with image features, in training only."""


class Observer(Protocol):
    """Observes the forward passes that generate images; all passes of a batch are repeated if any was invalid."""

    def start(self) -> None:
        """Start or restart a batch, discarding observations since the last `keep`."""

    def observe(self, t_B: Tensor, y_B: Tensor, output: DiTOutput) -> None:
        """Observe one forward pass, without synchronizing with the device.

        Args:
            t_B: the times, as passed to the model.
            y_B: int64 labels, or numbers of prompts; in unconditional passes, that of the null condition.
            output: the model's output, with the routing of each MoE layer.
        """

    def keep(self) -> None:
        """End a batch, keeping the observations since `start`."""


class BlockInputs(NamedTuple):
    """What every block reads besides its tokens."""

    vector_BD: Tensor
    """The conditioning of each image: the embeddings of its time and condition, added."""
    time_BD: Tensor
    """The embedding of the time alone."""
    context: Context | None = None
    """What the cross-attention reads, if there is one."""
    null: NullImages | None = None
    """The null images, with `routing.unconditional_expert`."""
    rotation: Tensor | None = None
    """By which attention rotates queries and keys, with rotary positions."""


class DiTBlock(nn.Module):
    """Attention, then an FFN or experts, both modulated by adaLN-zero; in text models, cross-attention between them."""

    def __init__(self, config: Config, mlp: nn.Module) -> None:
        """Allocate the weights.

        Args:
            config: the run's configuration.
            mlp: the FFN or the MoE layer.
        """
        super().__init__()
        model, width = config.model, config.size.hidden_size
        self.norm1 = block_norm(model.norm, width)
        self.attn = Attention(width, config.size.num_heads, model.qk_norm)
        self.norm_cross = layer_norm(width)
        self.cross_attn = _cross_attention(config)
        self.norm2 = block_norm(model.norm, width)
        self.mlp = mlp
        self.reads_time = config.routing.router_input == "time"
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x_BSD: Tensor, inputs: BlockInputs) -> tuple[Tensor, Routing | None]:
        """Transform the tokens of a batch.

        Args:
            x_BSD: tokens.
            inputs: what all blocks read.

        Returns:
            [B, S, D], and the routing of a MoE block (None for an FFN).
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(inputs.vector_BD).chunk(6, dim=1)
        x_BSD = x_BSD + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x_BSD), shift1, scale1), inputs.rotation)
        if self.cross_attn is not None and inputs.context is not None:
            x_BSD = x_BSD + self.cross_attn(self.norm_cross(x_BSD), inputs.context)
        normed_BSD = self.norm2(x_BSD)
        tokens_BSD = modulate(normed_BSD, shift2, scale2)
        if not isinstance(self.mlp, MoELayer):
            return x_BSD + gate2.unsqueeze(1) * self.mlp(tokens_BSD), None
        read_BSR = None
        if self.reads_time:
            time_BSD = inputs.time_BD.unsqueeze(1).expand_as(normed_BSD)
            read_BSR = torch.cat([normed_BSD, time_BSD], dim=-1)
        out_BSD, routing = self.mlp(tokens_BSD, read_BSR, inputs.null)
        return x_BSD + gate2.unsqueeze(1) * out_BSD, routing


class DiT(nn.Module):
    """A diffusion transformer for square images or latents."""

    pos_embed: Tensor
    """fp32 [1, S, D], fixed."""

    def __init__(self, config: Config, make_moe: Callable[[Config, int], MoELayer] = MoELayer) -> None:
        """Allocate the weights; `model/init.py` sets their values.

        Args:
            config: the run's configuration.
            make_moe: builds the layer that replaces a block's FFN from the configuration and the width; the default
                holds all experts.
        """
        super().__init__()
        model = config.model
        size, width = config.size, config.size.hidden_size
        self.config = config
        self.patch_size = model.patch_size
        is_flow = config.objective.kind == "flow"
        self.time_scale = config.objective.flow_time_scale if is_flow else 1.0
        self.is_reversed = is_flow and config.objective.flow_direction == "data_to_noise"
        self.out_channels = make_objective(config.objective.kind).out_channels(model.in_channels)
        self.x_embedder = PatchEmbed(model.patch_size, model.in_channels, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = make_conditioner(config)
        self.side = model.input_size // model.patch_size
        self.rotated_head = width // size.num_heads if model.positions == "rope" else None
        """Width of a head whose queries and keys are rotated; None with added positions."""
        self.register_buffer("pos_embed", torch.empty(1, self.side**2, width), persistent=False)
        if not self.pos_embed.is_meta:  # arithmetic on the meta device imports torch._dynamo, which takes a second
            self.reset_positions()
        self.blocks = nn.ModuleList()
        for index in range(size.depth):
            is_moe = index in config.moe_blocks
            mlp = make_moe(config, width) if is_moe else FFN[model.mlp](width, config.ffn_hidden)
            self.blocks.append(DiTBlock(config, mlp))
        self.aligned_block = config.aligned_block
        self.repa_projector = None if self.aligned_block is None else _projector(config)
        self.final_layer = FinalLayer(width, model.patch_size, self.out_channels)
        self.assumed_capacities = 2.0
        """Assumed upper bound on a layer's rows in `bounded_dispatch`, as a multiple of the training capacity. The
        capacity predictor routes a different number of tokens in each sampler step; on average, it is that capacity."""
        self.observer: Observer | None = None
        """Observes the forward passes of `sampling.generate`."""

    def forward(self, x_BCHW: Tensor, t_B: Tensor, y: Tensor, drop_B: Tensor | None = None) -> DiTOutput:
        """Predict velocity or noise from noisy images.

        Args:
            x_BCHW: noisy images or latents, any float dtype.
            t_B: fp32 in [0, 1] for flow, int64 timesteps 0..999 for DDPM.
            y: int64 labels [B]; in a text model, rows of text features, fp16 [B, N].
            drop_B: bool, images whose label or prompt is dropped; None drops none.
        """
        dtype = self.x_embedder.proj.weight.dtype
        x_BSD = self.x_embedder(x_BCHW.to(dtype)) + self.pos_embed.to(dtype)
        inputs = self._block_inputs(t_B, y, drop_B)
        routings, aligned_BSF = [], None
        recompute = self.config.model.activation_checkpointing and self.training
        for index, block in enumerate(self.blocks):
            if recompute:
                x_BSD, routing = checkpoint(block, x_BSD, inputs, use_reentrant=False, context_fn=both_passes)
            else:
                x_BSD, routing = block(x_BSD, inputs)
            if routing is not None:
                routings.append(routing)
            if index == self.aligned_block and self.repa_projector is not None and self.training:
                aligned_BSF = self.repa_projector(x_BSD)
        out = unpatchify(self.final_layer(x_BSD, inputs.vector_BD), self.patch_size, self.out_channels).float()
        return DiTOutput(-out if self.is_reversed else out, tuple(routings), aligned_BSF)

    def _block_inputs(self, t_B: Tensor, y: Tensor, drop_B: Tensor | None) -> BlockInputs:
        """Return what all blocks read."""
        condition = self.y_embedder(y, drop_B)
        time_BD = self.t_embedder((1 - t_B if self.is_reversed else t_B) * self.time_scale)
        null = find_null_images(self.y_embedder.is_null(y, drop_B)) if self.config.has_unconditional_expert else None
        rotation = None if self.rotated_head is None else rotations(self.rotated_head, self.side, time_BD.device)
        return BlockInputs(time_BD + condition.vector_BD, time_BD, condition.context, null, rotation)

    def reset_positions(self) -> None:
        """Recompute the position embedding after storage was allocated; checkpoints do not contain it."""
        if self.rotated_head is not None:
            self.pos_embed.zero_()
        else:
            self.pos_embed.copy_(sincos_positions(self.pos_embed.shape[2], self.side))

    def moe_layers(self) -> dict[int, MoELayer]:
        """Return the MoE layers by the index of their block."""
        return {i: block.mlp for i, block in enumerate(self.blocks) if isinstance(block.mlp, MoELayer)}

    def set_inference(self, choice: str) -> None:
        """Choose the routing rule of eval mode; all rules use the same weights.

        Args:
            choice: ``static``, ``dynamic`` or ``per_token``.

        Raises:
            ConfigError: the model's router does not support the rule.
        """
        valid = self.config.inference_choices
        if choice not in valid:
            raise ConfigError(unknown(f"routing of a model with router {self.config.routing.kind}", choice, valid))
        for layer in self.moe_layers().values():
            layer.inference = choice

    def bounded_dispatch(self) -> AbstractContextManager[bool]:
        """Return a context that avoids host synchronizations where supported; see `moe.layer.bounded_dispatch`."""
        return bounded_dispatch(self.moe_layers().values(), self.assumed_capacities)

    @property
    def images_compete(self) -> bool:
        """Whether an image depends on the rest of its batch in eval mode, because their tokens compete for experts."""
        layers = self.moe_layers().values()
        return any(layer.kind in ("batch_pool", "expert_race") and layer.inference != "per_token" for layer in layers)


def _projector(config: Config) -> nn.Sequential:
    """Return the projector of REPA from tokens to image features."""
    width, hidden, (_, features) = config.size.hidden_size, config.loss.repa_hidden, config.loss.repa_features
    return nn.Sequential(
        nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, features)
    )


def _cross_attention(config: Config) -> CrossAttention | None:
    """Return the cross-attention of a block of a text model."""
    if not config.is_text:
        return None
    width = config.size.hidden_size
    context = context_width(config.text_layout, width)
    return CrossAttention(width, context, config.size.num_heads, config.model.text_qk_norm)


def empty_model(config: Config) -> DiT:
    """Return the model on the meta device: names and shapes without storage."""
    with torch.device("meta"):
        return DiT(config)


def saved_buffers(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return the buffers that checkpoints hold, by name; the positions follow from the configuration."""
    return {name: buffer for name, buffer in model.named_buffers() if name != "pos_embed"}


def allocate(model: DiT, device: torch.device | str, dtype: torch.dtype = torch.float32) -> DiT:
    """Give a model on the meta device storage, with uninitialized values.

    Args:
        model: built under ``torch.device("meta")``.
        device: the device of its tensors.
        dtype: of the weights and activations; positions and thresholds stay fp32.

    Returns:
        The same model.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.to_empty(device=device)
