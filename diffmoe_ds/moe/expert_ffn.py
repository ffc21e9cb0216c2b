"""The FFNs of a layer's experts, forward and backward, each as one node of autograd's graph.

Written out for two reasons. Autograd computes the gradients of stacked weights transposed and then copies them. And
one node makes all gradients of a layer ready at once: DeepSpeed fills its buckets in the order in which gradients are
ready, which has to be the same on all ranks, whatever rows a rank has.

Legend: E experts held here, R rows sorted by expert, K rows of an expert, D width, H hidden width. A block is either
the rows of one expert (x [K, D] with weights [H, D]) or equally many rows of several ([n, K, D] with [n, H, D]).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffmoe_ds.moe.activation import gelu, gelu_backward, num_threads, uses_sigmoid
from diffmoe_ds.moe.grouped_ffn import grouped_ffn


def expert_ffn(
    kind: str, rows_RD: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, rows_per_expert: Sequence[int] | Tensor
) -> Tensor:
    """Compute each row with its expert.

    `GROUPED` and `Blocks` select the implementation; results agree up to rounding.

    Args:
        kind: ``gelu`` or ``swiglu``.
        rows_RD: rows sorted by expert, in the dtype of the weights.
        w1: [E, H, D].
        w2: [E, D, H].
        w3: [E, 1, H + D], both biases (gelu), or [E, H, D] (swiglu).
        rows_per_expert: rows of each expert; may be 0. If only the device knows them, int64 [E] on the device: then the
            rows may end with padding; see `grouped_ffn`.

    Returns:
        [R, D].
    """
    needs_backward = torch.is_grad_enabled()
    if isinstance(rows_per_expert, Tensor):
        return grouped_ffn(kind, rows_RD, w1, w2, w3, rows_per_expert, needs_backward)
    if len(set(rows_per_expert)) > 1 and groups_ragged_rows(rows_RD, w1.shape[2], w1.shape[1]):
        counts = torch.tensor(rows_per_expert, pin_memory=rows_RD.is_cuda).to(rows_RD.device, non_blocking=True)
        return grouped_ffn(kind, rows_RD, w1, w2, w3, counts, needs_backward)
    blocks = Blocks(list(rows_per_expert), w1.shape[1], rows_RD.device.type)
    ffn = {"gelu": _GeluFFN, "swiglu": _SwiGLUFFN}[kind]
    out_RD: Tensor = ffn.apply(rows_RD, w1, w2, w3, blocks, needs_backward)
    return out_RD


GROUPED = {("cuda", torch.bfloat16)}
"""Device types and dtypes in which experts with different numbers of rows are one `grouped_mm`; elsewhere they are one
product each. On two CPU cores, grouped products took 1.2 to 1.3 times as long as a loop, in fp32 and in bf16. On GPUs,
torch has a kernel for bf16 only: in other dtypes, `grouped_mm` is itself a loop, which waits for the device."""


def groups_ragged_rows(like: Tensor, width: int, hidden: int) -> bool:
    """Return whether experts with different numbers of rows are one grouped product.

    Args:
        like: has the device and the dtype of the rows.
        width: D.
        hidden: H.
    """
    is_aligned = all(size * like.element_size() % 16 == 0 for size in (width, hidden))  # `grouped_mm` refuses others
    return (like.device.type, like.dtype) in GROUPED and is_aligned


CPU_BLOCK = 1 << 20
"""Hidden values of a batched block on a CPU, 4 MiB in fp32. At 128 rows of width 384, blocks of 4 experts took 1.04
times as long as the bare products, single experts and all 16 at once 1.15 times."""


class Blocks:
    """How rows are divided into matrix products.

    Where all experts have the same number of rows, one batched product computes several: all of them on a GPU, where a
    loop would launch many small kernels, and on a CPU as many as keep their hidden values in the cache between
    products, but at least one for each thread: two threads that share a product in bf16 took 1.4 times as long as with
    one each. Otherwise expert by expert. Every variant makes all gradients ready at once.
    """

    def __init__(self, rows_per_expert: list[int], hidden: int, device_type: str) -> None:
        self._counts = rows_per_expert
        experts, rows = len(rows_per_expert), max(rows_per_expert)
        limit = experts
        if device_type == "cpu":
            limit = max(num_threads(), CPU_BLOCK // max(1, rows * hidden))
        divisors = (n for n in range(1, experts + 1) if experts % n == 0 and n <= limit)
        self._experts = max(divisors) if len(set(rows_per_expert)) == 1 else 1
        """Experts of a block; a single one is not batched."""

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """Return the blocks of a tensor whose first dimension is R, or E if it has three dimensions."""
        if self._experts == 1:
            return tensor.unbind() if tensor.dim() == 3 else tensor.split(self._counts)
        by_expert: Tensor = (
            tensor if tensor.dim() == 3 else tensor.view(len(self._counts), self._counts[0], tensor.shape[1])
        )
        blocks: Sequence[Tensor] = by_expert.split(self._experts)
        return blocks

    def scratch(self, x: Tensor, width: int) -> Sequence[Tensor]:
        """Return uninitialized blocks [..., K, width] for one block at a time; they share their memory."""
        if self._experts == 1:
            largest = x.new_empty(max(self._counts), width)
            return [largest[:count] for count in self._counts]
        largest = x.new_empty(self._experts, self._counts[0], width)
        starts = range(0, len(self._counts), self._experts)
        return [largest[: len(self._counts) - start] for start in starts]


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    (torch.bmm if a.dim() == 3 else torch.mm)(a, b, out=out)


def _affine(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    (torch.baddbmm if x.dim() == 3 else torch.addmm)(bias, x, weight.mT, out=out)


class _GeluFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, blocks: Blocks, needs_backward: bool
    ) -> Tensor:
        width, hidden = w2.shape[1:]
        out_RD = torch.empty_like(x_RD)
        value_blocks = input_blocks = blocks.scratch(x_RD, hidden)
        saved_blocks: Sequence[Tensor | None] = [None] * len(input_blocks)
        if needs_backward:
            value_RH, saved_RH = x_RD.new_empty(len(x_RD), hidden), x_RD.new_empty(len(x_RD), hidden)
            ctx.save_for_backward(x_RD, value_RH, saved_RH, w1, w2)
            ctx.blocks = blocks
            value_blocks, saved_blocks = blocks.split(value_RH), blocks.split(saved_RH)
            if not uses_sigmoid(saved_RH):
                input_blocks = blocks.split(saved_RH)
        else:
            value_blocks = blocks.scratch(x_RD, hidden)
        split = (blocks.split(t) for t in (x_RD, w1, w2, w3, out_RD))
        for x, first, second, biases, out, h, value, saved in zip(
            *split, input_blocks, value_blocks, saved_blocks, strict=True
        ):
            bias1, bias2 = biases.split([hidden, width], dim=-1)
            _affine(x, first, bias1, out=h)
            gelu(h, value, saved)
            _affine(value, second, bias2, out=out)
        return out_RD

    @staticmethod
    def backward(ctx: Any, gradient_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, value_RH, saved_RH, w1, w2 = ctx.saved_tensors
        blocks, (experts, width, hidden) = ctx.blocks, w2.shape
        dx_RD, dw1, dw2 = torch.empty_like(x_RD), torch.empty_like(w1), torch.empty_like(w2)
        dw3 = w1.new_empty(experts, 1, hidden + width)
        tensors = (gradient_RD.contiguous(), x_RD, value_RH, saved_RH, w1, w2, dx_RD, dw1, dw2, dw3)
        split = (blocks.split(t) for t in tensors)
        for dy, x, value, saved, first, second, dx, dfirst, dsecond, dbiases, dh in zip(
            *split, blocks.scratch(x_RD, hidden), strict=True
        ):
            dbias1, dbias2 = dbiases.split([hidden, width], dim=-1)
            dbias2.copy_(dy.sum(dim=-2, keepdim=True))
            _multiply(dy.mT, value, out=dsecond)
            _multiply(dy, second, out=dh)
            gelu_backward(dh, saved)
            dbias1.copy_(dh.sum(dim=-2, keepdim=True))
            _multiply(dh.mT, x, out=dfirst)
            _multiply(dh, first, out=dx)
        return dx_RD, dw1, dw2, dw3, None, None


class _SwiGLUFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, blocks: Blocks, needs_backward: bool
    ) -> Tensor:
        hidden = w1.shape[1]
        out_RD = torch.empty_like(x_RD)
        gate_blocks, up_blocks = blocks.scratch(x_RD, hidden), blocks.scratch(x_RD, hidden)
        if needs_backward:
            gate_RH, up_RH = x_RD.new_empty(len(x_RD), hidden), x_RD.new_empty(len(x_RD), hidden)
            ctx.save_for_backward(x_RD, gate_RH, up_RH, w1, w2, w3)
            ctx.blocks = blocks
            gate_blocks, up_blocks = blocks.split(gate_RH), blocks.split(up_RH)
        split = (blocks.split(t) for t in (x_RD, w1, w2, w3, out_RD))
        for x, first, second, third, out, gate, up in zip(*split, gate_blocks, up_blocks, strict=True):
            _multiply(x, first.mT, out=gate)
            _multiply(x, third.mT, out=up)
            _multiply(F.silu(gate).mul_(up), second.mT, out=out)
        return out_RD

    @staticmethod
    def backward(ctx: Any, gradient_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, gate_RH, up_RH, w1, w2, w3 = ctx.saved_tensors
        blocks, hidden = ctx.blocks, w1.shape[1]
        dx_RD, dw1, dw2, dw3 = (torch.empty_like(t) for t in (x_RD, w1, w2, w3))
        tensors = (gradient_RD.contiguous(), x_RD, gate_RH, up_RH, w1, w2, w3, dx_RD, dw1, dw2, dw3)
        split = (blocks.split(t) for t in tensors)
        for dy, x, gate, up, first, second, third, dx, dfirst, dsecond, dthird, dh in zip(
            *split, blocks.scratch(x_RD, hidden), strict=True
        ):
            activated = F.silu(gate)
            _multiply(dy.mT, activated * up, out=dsecond)
            _multiply(dy, second, out=dh)
            dup = activated.mul_(dh)
            dgate = torch.ops.aten.silu_backward(dh.mul_(up), gate)
            _multiply(dgate.mT, x, out=dfirst)
            _multiply(dup.mT, x, out=dthird)
            _multiply(dgate, first, out=dx)
            (torch.baddbmm if dx.dim() == 3 else torch.addmm)(dx, dup, third, out=dx)
        return dx_RD, dw1, dw2, dw3, None, None
