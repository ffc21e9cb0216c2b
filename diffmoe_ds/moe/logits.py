"""Products that stay in fp32 at every training precision: the router's scores and the capacity predictor's logits.

Selections and thresholds compare these numbers, so they must not be rounded to bf16, nor computed in TF32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffmoe_ds.precision import linear_fp32, product_fp32


def fp32_linear(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """Return ``x W^T + b`` in fp32; its backward pass keeps the input in its own dtype, not a copy in fp32.

    Args:
        x_TD: tokens, any float dtype.
        weight_ED: in the dtype of the model.
        bias_E: likewise.

    Returns:
        fp32 [T, E].
    """
    if x_TD.dtype == torch.float32:
        return linear_fp32(x_TD, weight_ED, bias_E)
    out_TE: Tensor = _FP32Linear.apply(x_TD, weight_ED, bias_E)  # type: ignore[no-untyped-call]
    return out_TE


class _FP32Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return linear_fp32(x.float(), weight.float(), None if bias is None else bias.float())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = product_fp32(gradient, weight.float()).to(x.dtype)
        dweight = product_fp32(gradient.mT, x.float()).to(weight.dtype)
        dbias = None if ctx.bias_dtype is None else gradient.sum(0).to(ctx.bias_dtype)
        return dx, dweight, dbias
