"""tanh-GELU for experts: the value in the forward pass, and the product with its derivative in the backward pass.

aten's tanh-GELU spends three quarters of its time on a CPU in tanh. With u = sqrt(2 / pi) (h + 0.044715 h^3),

    gelu(h) = h / 2 (1 + tanh(u)) = h sigmoid(2u)
    gelu'(h) = sigmoid(2u) + gelu(h) (1 - sigmoid(2u)) 2u'

which needs one vectorized sigmoid for both, computed here tile by tile, so that the intermediates stay in the cache. In
fp32 it equals aten's to rounding, and takes half the time (`benchmarks/moe_layer.py`). It is used for fp32 on a
CPU only: in a lower precision each step would round, and a GPU's kernel is limited by memory anyway.

Legend: H hidden width; the other dimensions are free.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LINEAR = 2 * math.sqrt(2 / math.pi)
CUBIC = LINEAR * 0.044715
"""2u = LINEAR h + CUBIC h^3."""
TILE = 1 << 16
"""Elements of a tile for each thread: its buffers stay in the level-2 cache. On one thread, tiles of twice this size
took 1.3 times as long, and on two threads, tiles of half this size 1.15 times."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def num_threads() -> int:
    """Return torch's number of threads; `torch.compile` calls it once."""
    return torch.get_num_threads()


def uses_sigmoid(h: Tensor) -> bool:
    """Return whether `gelu` computes a tensor through the sigmoid and saves the derivative instead of the input."""
    return h.dtype == torch.float32 and h.device.type == "cpu"


def gelu(h: Tensor, out: Tensor, saved: Tensor | None) -> None:
    """Compute ``out = gelu(h)`` and what `gelu_backward` needs; overwrites ``h``.

    Args:
        h: contiguous [..., H].
        out: where the value is written, of the same shape, contiguous.
        saved: where the derivative (`uses_sigmoid`) or the input is written, contiguous; None without backward pass. It
            may be ``h`` itself.
    """
    if not uses_sigmoid(h):
        torch.ops.aten.gelu.out(h, approximate="tanh", out=out)
        if saved is not None and saved is not h:
            saved.copy_(h)
        return
    constants = h.new_tensor([LINEAR, 1.0]).unbind()
    tensors = (h, out) if saved is None else (h, out, saved)
    size = TILE * num_threads()
    for tile in zip(*(t.view(-1).split(size) for t in tensors), strict=True):
        _gelu_tile(*constants, *tile)


def _gelu_tile(linear: Tensor, one: Tensor, h: Tensor, out: Tensor, saved: Tensor | None = None) -> None:
    sigmoid = out if saved is None else saved
    torch.addcmul(linear, h, h, value=CUBIC, out=sigmoid).mul_(h).sigmoid_()
    torch.mul(h, sigmoid, out=out)
    if saved is None:
        return
    slope = torch.addcmul(linear, h, h, value=3 * CUBIC, out=h).mul_(out)  # gelu(h) 2u'
    torch.lerp(slope, one, sigmoid, out=saved)  # slope (1 - sigmoid) + sigmoid


def gelu_backward(gradient: Tensor, saved: Tensor) -> None:
    """Overwrite the gradient of the value with the gradient of the input.

    Args:
        gradient: [..., H].
        saved: from `gelu`.
    """
    if uses_sigmoid(saved):
        gradient.mul_(saved)
    else:
        torch.ops.aten.gelu_backward.grad_input(gradient, saved, approximate="tanh", grad_input=gradient)
