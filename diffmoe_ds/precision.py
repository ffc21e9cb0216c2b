"""fp32 matrix products on GPUs: TF32 where its 10 bits of mantissa are enough, full precision where they are not.

torch has two interfaces for this. Here only the older one sets TF32 for good, because reading it raises an error after
the newer one was used, and torch's own compiler reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def set_tf32(enabled: bool) -> None:
    """Let fp32 products and convolutions on GPUs use TF32, or not. CPUs are not affected.

    Args:
        enabled: commands enable it; torch's default is on for convolutions only.
    """
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high" if enabled else "highest")
        torch.backends.cudnn.allow_tf32 = enabled


def product_fp32(a: Tensor, b: Tensor) -> Tensor:
    """Return the product of two fp32 matrices in full precision, even where TF32 is enabled; its gradients are, too.

    `torch.compile` keeps it as one node of the graph, which a context manager around the product would break.
    """
    if not a.is_cuda:
        return a @ b
    out: Tensor = _product(a, b)
    return out


def linear_fp32(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``F.linear`` of fp32 tensors in full precision; see `product_fp32`.

    For logits that are compared with each other or with a threshold: TF32 would decide many near-ties at random.

    Args:
        x: [T, D].
        weight: [E, D].
        bias: [E], or None.

    Returns:
        [T, E].
    """
    if not x.is_cuda:
        return F.linear(x, weight, bias)
    out = product_fp32(x, weight.mT)
    return out if bias is None else out + bias


@contextmanager
def full_fp32() -> Iterator[None]:
    """Within the context, compute fp32 products on GPUs in full precision."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@torch.library.custom_op("diffmoe::product_fp32", mutates_args=())
def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return the product of two fp32 matrices in full precision."""
    with full_fp32():
        return a @ b


@_product.register_fake
def _product_shape(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
    a, b = ctx.saved_tensors
    needs_a, needs_b = ctx.needs_input_grad
    return _product(gradient, b.mT) if needs_a else None, _product(a.mT, gradient) if needs_b else None


_product.register_autograd(_gradients, setup_context=_keep)
