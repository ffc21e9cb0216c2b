"""A diffusion transformer with routed experts (DiffMoE, arXiv 2503.14487) for diffusers, in inference.

This file needs torch and diffusers only. It was exported by diffmoe-ds together with the weights next to it, whose
names are those of diffmoe-ds.

Legend: B images, S tokens per image, T = B * S tokens, D width, E experts, G groups of tokens that compete.
"""

import math
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

TIME_FREQUENCIES = 256
"""Width of the sinusoidal time embedding."""


def modulate(x_BSD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """Scale and shift all tokens of an image by its conditioning (adaLN)."""
    return x_BSD * (1 + scale_BD.unsqueeze(1)) + shift_BD.unsqueeze(1)


def layer_norm(width: int) -> nn.LayerNorm:
    """Return a LayerNorm without affine parameters, which adaLN provides."""
    return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


@lru_cache(maxsize=8)
def sincos_positions(width: int, side: int) -> Tensor:
    """Return the position embedding, fp32 [1, side * side, width]: half of it the column, half the row."""
    frequency = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequency
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    column, row = axis[None, :, :].expand(side, side, -1), axis[:, None, :].expand(side, side, -1)
    return torch.cat([column, row], dim=-1).flatten(0, 1).float()[None]


class PatchEmbed(nn.Module):
    """Cuts an image into patches and embeds each as a token, in row-major order."""

    def __init__(self, patch_size: int, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map [B, C, height, width] to [B, S, D]."""
        patches: Tensor = self.proj(x_BCHW)
        return patches.flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Sinusoids of the time, followed by a small network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t_B: Tensor) -> Tensor:
        """Map [B] to [B, D]."""
        half = TIME_FREQUENCIES // 2
        exponent = -math.log(10_000) * torch.arange(half, dtype=torch.float32) / half
        # float64 and a factor that decides near-ties: the same bits on every machine, as in diffmoe-ds
        frequencies = (exponent.double().exp() * (1 + 2**-29)).float().to(t_B.device)
        angles = t_B.float()[:, None] * frequencies
        embedding: Tensor = self.mlp(
            torch.cat([angles.cos(), angles.sin()], dim=-1).to(next(self.mlp.parameters()).dtype)
        )
        return embedding


class Attention(nn.Module):
    """Multi-head self-attention over the tokens of an image."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Map [B, S, D] to [B, S, D]."""
        qkv = self.qkv(x_BSD).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out: Tensor = self.proj(F.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2).flatten(2))
        return out


class CrossAttention(nn.Module):
    """Multi-head attention of the tokens of an image to those of its prompt, with RMSNorm of queries and keys."""

    def __init__(self, width: int, num_heads: int, context_width: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.kv = nn.Linear(width, width), nn.Linear(context_width, 2 * width)
        self.proj = nn.Linear(width, width)
        head = width // num_heads
        self.q_norm = nn.RMSNorm(head, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head, eps=1e-6) if qk_norm else nn.Identity()

    def forward(self, x_BSD: Tensor, tokens_BLW: Tensor, valid_BL: Tensor) -> Tensor:
        """Map [B, S, D] to [B, S, D]."""
        q = self.q_norm(self.q(x_BSD).unflatten(-1, (self.num_heads, -1)).transpose(1, 2))
        k, v = self.kv(tokens_BLW).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, self.k_norm(k), v, attn_mask=valid_BL[:, None, None, :])
        return self.proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """Two linear layers with a tanh-approximated GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) without biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


def make_ffn(kind: str, width: int, hidden: int) -> nn.Module:
    """Return a dense FFN of a kind, ``gelu`` or ``swiglu``."""
    return SwiGLU(width, hidden) if kind == "swiglu" else Mlp(width, hidden)


class Experts(nn.Module):
    """The experts' FFNs: w1 [E, H, D] and w2 [E, D, H], and w3, SwiGLU's second input matrix or GELU's two biases."""

    def __init__(self, kind: str, num_experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.kind, self.hidden = kind, hidden
        self.w1 = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.w2 = nn.Parameter(torch.empty(num_experts, width, hidden))
        third = (num_experts, hidden, width) if kind == "swiglu" else (num_experts, 1, hidden + width)
        self.w3 = nn.Parameter(torch.empty(third))

    def forward(self, rows_RD: Tensor, expert: int) -> Tensor:
        """Compute rows with one expert."""
        w1, w2, w3 = self.w1[expert], self.w2[expert], self.w3[expert]
        if self.kind == "swiglu":
            return F.linear(F.silu(F.linear(rows_RD, w1)) * F.linear(rows_RD, w3), w2)
        bias1, bias2 = w3[0].split([self.hidden, len(w2)])
        return F.linear(F.gelu(F.linear(rows_RD, w1, bias1), approximate="tanh"), w2, bias2)


class MoELayer(nn.Module):
    """Routed experts in place of a block's FFN."""

    expert_threshold: Tensor
    """fp32 [E]; only with a capacity predictor."""

    def __init__(self, size: dict[str, Any], routing: dict[str, Any]) -> None:
        super().__init__()
        width, hidden, experts = size["hidden_size"], size["ffn_hidden_size"], routing["num_experts"]
        self.kind, self.capacity, self.rule = routing["kind"], routing["capacity"], routing["rules"][0]
        self.gate_weight = nn.Parameter(torch.empty(experts, width))
        self.experts = Experts(size["ffn"], experts, width, hidden)
        shared = routing["shared_experts"]
        self.shared_experts = make_ffn(size["ffn"], width, hidden * shared) if shared else None
        self.capacity_predictor = None
        if routing["capacity_predictor"]:
            self.capacity_predictor = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, experts))
            self.register_buffer("expert_threshold", torch.empty(experts, dtype=torch.float32))

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Map [B, S, D] to [B, S, D]: the sum of the outputs of a token's experts, weighted by its scores."""
        tokens_TD = x_BSD.flatten(0, 1)
        scores_TE = F.linear(tokens_TD.float(), self.gate_weight.float()).softmax(dim=-1)
        mask_TE = self._select(scores_TE, tokens_TD, len(x_BSD))
        out_TD = torch.zeros_like(tokens_TD, dtype=torch.float32)
        for expert in range(scores_TE.shape[1]):
            token_R = mask_TE[:, expert].nonzero().flatten()
            rows_RD = self.experts(tokens_TD[token_R], expert)
            out_TD[token_R] += scores_TE[token_R, expert, None] * rows_RD.float()
        out_TD = out_TD.to(x_BSD.dtype)
        return (out_TD if self.shared_experts is None else out_TD + self.shared_experts(tokens_TD)).view_as(x_BSD)

    def _select(self, scores_TE: Tensor, tokens_TD: Tensor, images: int) -> Tensor:
        """Return bool [T, E]: the tokens of each expert."""
        if self.kind == "token_choice":  # each token takes its best experts
            best_Tk = scores_TE.sort(dim=1, descending=True, stable=True).indices[:, : int(self.capacity)]
            return torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(1, best_Tk, True)
        groups = images if self.kind == "expert_choice" else 1  # batch_pool: all tokens of the batch compete
        tokens, experts = len(scores_TE) // groups, scores_TE.shape[1]
        if self.rule == "static":  # each expert takes a fixed number of its best tokens
            taken_GE = scores_TE.new_full((groups, experts), int(self.capacity * tokens / experts + 1e-9))
            return best_tokens(scores_TE, taken_GE)
        predicted_TE = self._predict(tokens_TD) > self.expert_threshold.float()
        if self.rule == "per_token":
            return predicted_TE
        return best_tokens(scores_TE, predicted_TE.view(groups, tokens, experts).sum(1))

    def _predict(self, tokens_TD: Tensor) -> Tensor:
        """Return the probability, fp32 [T, E], that an expert takes a token."""
        assert self.capacity_predictor is not None
        last = self.capacity_predictor[-1]
        assert isinstance(last, nn.Linear)
        hidden_TD = self.capacity_predictor[:-1](tokens_TD)
        return F.linear(hidden_TD.float(), last.weight.float(), last.bias.float()).sigmoid()


def best_tokens(scores_TE: Tensor, taken_GE: Tensor) -> Tensor:
    """Return bool [T, E]: for each expert, its best tokens of each group; of equal ones, the earlier."""
    scores_GSE = scores_TE.view(len(taken_GE), -1, scores_TE.shape[1])
    order_GSE = scores_GSE.sort(dim=1, descending=True, stable=True).indices
    rank_S = torch.arange(scores_GSE.shape[1], device=scores_TE.device)[None, :, None].expand_as(order_GSE)
    rank_GSE = torch.empty_like(order_GSE).scatter_(1, order_GSE, rank_S)
    return (rank_GSE < taken_GE[:, None, :]).flatten(0, 1)


class DiTBlock(nn.Module):
    """Attention, cross-attention if the model reads prompts, then an FFN or experts."""

    def __init__(self, size: dict[str, Any], mlp: nn.Module) -> None:
        super().__init__()
        width, num_heads, cross = size["hidden_size"], size["num_heads"], size["cross_attention"]
        self.norm1, self.norm_cross, self.norm2 = (layer_norm(width) for _ in range(3))
        self.attn = Attention(width, num_heads)
        self.cross_attn = None if cross is None else CrossAttention(width, num_heads, **cross)
        self.mlp = mlp
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x_BSD: Tensor, c_BD: Tensor, *context: Any) -> Tensor:
        """Transform the tokens of a batch, given the conditioning of each image and the tokens of its prompt."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c_BD).chunk(6, dim=1)
        x_BSD = x_BSD + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x_BSD), shift1, scale1))
        if self.cross_attn is not None:
            x_BSD = x_BSD + self.cross_attn(self.norm_cross(x_BSD), *context)
        out_BSD: Tensor = x_BSD + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x_BSD), shift2, scale2))
        return out_BSD


class FinalLayer(nn.Module):
    """Maps tokens back to patches of pixels."""

    def __init__(self, width: int, values: int) -> None:
        super().__init__()
        self.norm_final = layer_norm(width)
        self.linear = nn.Linear(width, values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_BSD: Tensor, c_BD: Tensor) -> Tensor:
        """Map [B, S, D] to [B, S, values of a patch]."""
        shift, scale = self.adaLN_modulation(c_BD).chunk(2, dim=1)
        patches: Tensor = self.linear(modulate(self.norm_final(x_BSD), shift, scale))
        return patches


class DiffMoETransformer2DModel(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers is untyped
    """A diffusion transformer for square images or latents; see the arguments of `forward`."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        sample_size: int,
        in_channels: int,
        patch_size: int,
        num_classes: int,
        has_null_class: bool,
        objective: dict[str, Any],
        size: dict[str, Any],
        routing: dict[str, Any],
    ) -> None:
        """Allocate the weights; the arguments are the keys of ``config.json``."""
        super().__init__()
        width, hidden = size["hidden_size"], size["ffn_hidden_size"]
        self.patch_size = patch_size
        self.time_scale = objective["time_scale"]
        self.out_channels = in_channels * (1 if objective["kind"] == "flow" else 2)  # DDPM also predicts the variance
        self.x_embedder = PatchEmbed(patch_size, in_channels, width)
        self.t_embedder = TimestepEmbedder(width)
        if size["cross_attention"] is None:
            self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + has_null_class, width)})
        self.blocks = nn.ModuleList()
        for index in range(size["depth"]):
            is_moe = routing["num_experts"] > 1 and (index % 2 == 1 or not routing["interleave"])
            mlp = MoELayer(size, routing) if is_moe else make_ffn(size["ffn"], width, hidden)
            self.blocks.append(DiTBlock(size, mlp))
        self.final_layer = FinalLayer(width, patch_size * patch_size * self.out_channels)

    def set_routing(self, rule: str) -> None:
        """Choose which tokens experts take; all rules use the same weights.

        Args:
            rule: one of ``config.routing["rules"]``. ``per_token``: those above the expert's threshold; ``dynamic``: as
                many, but the best ones of the batch (expert_choice: of the image); ``static``: the number of training.

        Raises:
            ValueError: the model does not support the rule.
        """
        valid = self.config.routing["rules"]
        if rule not in valid:
            raise ValueError(f"routing must be {' or '.join(valid)} for this model, got {rule!r}.")
        for module in self.modules():
            if isinstance(module, MoELayer):
                module.rule = rule

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None, encoder_attention_mask: Tensor | None = None,
        pooled_projections: Tensor | None = None, return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:  # fmt: skip
        """Predict the velocity (flow), or noise and variance (DDPM), of noisy images.

        Args:
            hidden_states: noisy images or latents [B, C, sample_size, sample_size].
            timestep: [B]. Flow: from 0 (noise) to 1 (data); DDPM: the step, from 0 (data) to 999 (noise).
            class_labels: int64 [B]; ``num_classes`` is "no label". Omit it if the model reads prompts.
            encoder_hidden_states: tokens of the prompts [B, L, W], of `DiffMoETextConditioner`.
            encoder_attention_mask: bool [B, L], False for padding.
            pooled_projections: the prompts' part of the conditioning, [B, D].
            return_dict: return a `Transformer2DModelOutput` instead of a tuple.

        Returns:
            fp32 [B, C, sample_size, sample_size], or with 2C channels for DDPM.
        """
        weight = self.x_embedder.proj.weight
        x_BSD = self.x_embedder(hidden_states.to(weight.dtype))
        side = math.isqrt(x_BSD.shape[1])
        x_BSD = x_BSD + sincos_positions(x_BSD.shape[2], side).to(weight)
        if pooled_projections is None:
            pooled_projections = self.y_embedder["embedding_table"](class_labels)
        c_BD = self.t_embedder(timestep * self.time_scale) + pooled_projections
        for block in self.blocks:
            x_BSD = block(x_BSD, c_BD, encoder_hidden_states, encoder_attention_mask)
        patches = self.final_layer(x_BSD, c_BD).unflatten(1, (side, side))
        patches = patches.unflatten(-1, (self.patch_size, self.patch_size, self.out_channels))
        sample = patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3).float()
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
