"""The parts of a diffusion transformer that do not route.

Legend: B images, S tokens per image, D width, H hidden width, C channels.
Source: DiT (arXiv 2212.09748); parameter names are those of the reference, so its weights load by name.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TIME_FREQUENCIES = 256
"""Width of the sinusoidal embedding of the time step."""


def modulate(x_BSD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """Scale and shift every token of an image by what its conditioning says (adaLN)."""
    return x_BSD * (1 + scale_BD.unsqueeze(1)) + shift_BD.unsqueeze(1)


def layer_norm(width: int) -> nn.LayerNorm:
    """LayerNorm without weights: adaLN supplies them."""
    return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


class Attention(nn.Module):
    """Multi-head self-attention over the tokens of an image."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """[B, S, D] to [B, S, D]."""
        qkv = self.qkv(x_BSD).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with tanh-GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x) without biases (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


FFN = {"gelu": Mlp, "swiglu": SwiGLU}


class PatchEmbed(nn.Module):
    """Cut an image into patches and embed each as a token, row by row."""

    def __init__(self, patch_size: int, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, height, width] to [B, S, D]."""
        return self.proj(x_BCHW).flatten(2).transpose(1, 2)


@lru_cache(maxsize=8)
def time_frequencies(device: torch.device) -> Tensor:
    """fp32 frequencies 10000^(-i / 128) of the time embedding, the same bits on every machine.

    The reference takes a float32 exp, whose last bit differs between CPUs (and with it, at step 999, the fifth
    digit of a gradient).  Here a float64 exp of the same float32 exponents is rounded; the factor, a 64th of
    a float32 rounding step, only settles near-ties, the way they fell where the golden numbers were made.
    """
    half = TIME_FREQUENCIES // 2
    exponent = -math.log(10_000) * torch.arange(half, dtype=torch.float32) / half
    return (exponent.double().exp() * (1 + 2**-29)).float().to(device)


class TimestepEmbedder(nn.Module):
    """Sinusoids of the time step through a small network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t_B: Tensor) -> Tensor:
        """[B] of any number type to [B, D]; flow passes t in [0, 1], DDPM the step 0..999."""
        angles = t_B.float()[:, None] * time_frequencies(t_B.device)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))


class FinalLayer(nn.Module):
    """Tokens back to patches of pixels."""

    def __init__(self, width: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = layer_norm(width)
        self.linear = nn.Linear(width, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_BSD: Tensor, c_BD: Tensor) -> Tensor:
        """[B, S, D] to [B, S, patch * patch * C]."""
        shift, scale = self.adaLN_modulation(c_BD).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x_BSD), shift, scale))


def unpatchify(x_BSP: Tensor, patch_size: int, channels: int) -> Tensor:
    """[B, S, patch * patch * C] to [B, C, height, width] of a square image."""
    side = math.isqrt(x_BSP.shape[1])
    assert side * side == x_BSP.shape[1], "the tokens of an image must form a square"
    patches = x_BSP.unflatten(1, (side, side)).unflatten(-1, (patch_size, patch_size, channels))
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def sincos_positions(width: int, side: int) -> Tensor:
    """Fixed two-dimensional sine-cosine positions, fp32 [1, side * side, width].

    The first half of the width encodes the column, the second the row (MAE, arXiv 2111.06377).
    """
    frequency = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequency
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, width / 2]
    column = axis[None, :, :].expand(side, side, -1)
    row = axis[:, None, :].expand(side, side, -1)
    return torch.cat([column, row], dim=-1).flatten(0, 1).float()[None]
