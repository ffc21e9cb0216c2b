"""The layers of a diffusion transformer other than its experts.

Legend: B images, S tokens per image, D width, H hidden width, C channels, P = patch * patch * C values of a patch,
L tokens and W width of a context.
Source: DiT (arXiv 2212.09748); parameters have the reference's names, so its weights load by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TIME_FREQUENCIES = 256
"""Width of the sinusoidal time embedding."""


def modulate(x_BSD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """Scale and shift all tokens of an image by its conditioning (adaLN)."""
    return x_BSD * (1 + scale_BD.unsqueeze(1)) + shift_BD.unsqueeze(1)


def layer_norm(width: int) -> nn.LayerNorm:
    """Return a LayerNorm without affine parameters, which adaLN provides."""
    return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


def block_norm(kind: str, width: int) -> nn.Module:
    """Return the norm before attention or FFN, by ``model.norm``."""
    return nn.RMSNorm(width, eps=1e-6) if kind == "rms" else layer_norm(width)


HEAD_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda head: nn.Identity(),
    "layer": lambda head: nn.LayerNorm(head),
    "rms": lambda head: nn.RMSNorm(head, eps=1e-6),
}
"""The norm of the queries and keys of a head of each ``model.qk_norm``, built from the head's width."""


class Attention(nn.Module):
    """Multi-head self-attention over the tokens of an image."""

    def __init__(self, width: int, num_heads: int, qk_norm: str = "none") -> None:
        """Allocate the weights.

        Args:
            width: D.
            num_heads: attention heads.
            qk_norm: a key of `HEAD_NORMS`.
        """
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = (HEAD_NORMS[qk_norm](width // num_heads) for _ in range(2))
        self.proj = nn.Linear(width, width)

    def forward(self, x_BSD: Tensor, rotation: Tensor | None = None) -> Tensor:
        """Map [B, S, D] to [B, S, D].

        Args:
            x_BSD: tokens.
            rotation: from `rotations`, by which queries and keys are rotated; None does not rotate.
        """
        q, k, v = self.qkv(x_BSD).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotated(q, rotation), rotated(k, rotation)
        out = F.scaled_dot_product_attention(q, k, v)
        projected_BSD: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return projected_BSD


class Context(NamedTuple):
    """What the tokens of an image read by cross-attention."""

    tokens_BLW: Tensor
    valid_BL: Tensor
    """bool: False for padding; every image has at least one valid token."""


class CrossAttention(nn.Module):
    """Multi-head attention of the tokens of an image to a context, with QK-norm (RMSNorm per head)."""

    def __init__(self, width: int, context_width: int, num_heads: int, qk_norm: bool) -> None:
        """Allocate the weights.

        Args:
            width: D.
            context_width: W.
            num_heads: attention heads.
            qk_norm: normalize queries and keys.
        """
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(context_width, 2 * width)
        self.proj = nn.Linear(width, width)
        head = width // num_heads
        self.q_norm = nn.RMSNorm(head, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head, eps=1e-6) if qk_norm else nn.Identity()

    def forward(self, x_BSD: Tensor, context: Context) -> Tensor:
        """Map [B, S, D] to [B, S, D]."""
        q = self.q(x_BSD).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(context.tokens_BLW).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mask = context.valid_BL[:, None, None, :]
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask=mask)
        projected_BSD: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return projected_BSD


class Mlp(nn.Module):
    """Two linear layers with a tanh-approximated GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        out: Tensor = self.fc2(self.activate(self.fc1(x)))
        return out

    def activate(self, hidden: Tensor) -> Tensor:
        """Return the hidden values that the second layer reads."""
        return F.gelu(hidden, approximate="tanh")


class SiluMlp(Mlp):
    """Two linear layers with a SiLU between them."""

    def activate(self, hidden: Tensor) -> Tensor:
        """Return the hidden values that the second layer reads."""
        return F.silu(hidden)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) without biases (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


FFN: dict[str, Callable[[int, int], nn.Module]] = {"gelu": Mlp, "silu": SiluMlp, "swiglu": SwiGLU}
"""The FFN of each ``model.mlp``, built from width and hidden width."""


class PatchEmbed(nn.Module):
    """Cuts an image into patches and embeds each as a token, in row-major order."""

    def __init__(self, patch_size: int, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map [B, C, height, width] to [B, S, D]."""
        patches: Tensor = self.proj(x_BCHW)
        return patches.flatten(2).transpose(1, 2)


@lru_cache(maxsize=8)
def time_frequencies(device: torch.device) -> Tensor:
    """Return the fp32 frequencies 10000^(-i / 128) of the time embedding, bit-identical on every machine.

    The reference uses a float32 exp, whose last bit differs between CPUs (and with it, at step 999, the fifth digit of
    a gradient). Here a float64 exp of the same float32 exponents is rounded to float32. The factor, 1/64 of a float32
    rounding step, only decides near-ties, so that they agree with the golden numbers.
    """
    half = TIME_FREQUENCIES // 2
    exponent = -math.log(10_000) * torch.arange(half, dtype=torch.float32) / half
    return (exponent.double().exp() * (1 + 2**-29)).float().to(device)


class TimestepEmbedder(nn.Module):
    """Sinusoids of the time, followed by a small network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t_B: Tensor) -> Tensor:
        """Map [B] of any numeric dtype to [B, D]; flow passes t in [0, 1], DDPM the step 0..999."""
        angles = t_B.float()[:, None] * time_frequencies(t_B.device)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        embedding_BD: Tensor = self.mlp(waves.to(next(self.mlp.parameters()).dtype))
        return embedding_BD


class FinalLayer(nn.Module):
    """Maps tokens back to patches of pixels."""

    def __init__(self, width: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = layer_norm(width)
        self.linear = nn.Linear(width, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_BSD: Tensor, c_BD: Tensor) -> Tensor:
        """Map [B, S, D] to [B, S, P]."""
        shift, scale = self.adaLN_modulation(c_BD).chunk(2, dim=1)
        patches_BSP: Tensor = self.linear(modulate(self.norm_final(x_BSD), shift, scale))
        return patches_BSP


def unpatchify(x_BSP: Tensor, patch_size: int, channels: int) -> Tensor:
    """Rearrange [B, S, P] to [B, C, height, width] of a square image."""
    side = math.isqrt(x_BSP.shape[1])
    assert side * side == x_BSP.shape[1], "the tokens of an image must form a square"
    patches: Tensor = x_BSP.unflatten(1, (side, side)).unflatten(-1, (patch_size, patch_size, channels))
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def sincos_positions(width: int, side: int) -> Tensor:
    """Return fixed two-dimensional sine-cosine positions, fp32 [1, side * side, width].

    The first half of the width encodes the column, the second the row (MAE, arXiv 2111.06377).
    """
    frequency = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequency
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, width / 2]
    column = axis[None, :, :].expand(side, side, -1)
    row = axis[:, None, :].expand(side, side, -1)
    return torch.cat([column, row], dim=-1).flatten(0, 1).float()[None]


@lru_cache(maxsize=8)
def rotations(head: int, side: int, device: torch.device) -> Tensor:
    """Return the cosines and sines of 2-D rotary positions, fp32 [2, side * side, head].

    The first half of a head is rotated by the row, the second by the column. Within a half of width H, values j and
    j + H / 2 form a pair, whose angle is position * 10000^(-j / (H / 2)) (RoPE, arXiv 2104.09864; two axes as in
    2403.13298).

    Args:
        head: width of a head, divisible by 4.
        side: tokens in a row of the image.
        device: of the result.
    """
    quarter = head // 4
    frequency = 10_000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequency
    axis = torch.cat([angles, angles], dim=1)  # [side, head / 2]
    row = axis[:, None, :].expand(side, side, -1)
    column = axis[None, :, :].expand(side, side, -1)
    both = torch.cat([row, column], dim=-1).flatten(0, 1)
    return torch.stack([both.cos(), both.sin()]).float().to(device)


def rotated(x_BNSH: Tensor, rotation: Tensor) -> Tensor:
    """Return queries or keys [B, heads, S, head] rotated by `rotations`, in their own dtype."""
    cos_SH, sin_SH = rotation.unbind(0)
    first, second = x_BNSH.float().unflatten(-1, (2, 2, -1)).unbind(-2)
    turned = torch.stack([-second, first], dim=-2).flatten(-3)
    return (x_BNSH.float() * cos_SH + turned * sin_SH).to(x_BNSH.dtype)
