"""Every way to compute the experts' FFNs, in both passes, against autograd's gradients of one FFN after the other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffmoe_ds.moe.expert_ffn import expert_ffn, groups_ragged_rows

WIDTH, HIDDEN = 8, 16


def plain_ffn(kind: str, x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    if kind == "swiglu":
        return (F.silu(x @ w1.mT) * (x @ w3.mT)) @ w2.mT
    bias1, bias2 = w3[0].split([HIDDEN, WIDTH])
    return F.gelu(x @ w1.mT + bias1, approximate="tanh") @ w2.mT + bias2


def make(kind: str, counts: list[int], padding: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Return rows and weights, which need gradients, and the gradient of the output."""
    experts, rows = len(counts), sum(counts) + padding
    third = (experts, 1, HIDDEN + WIDTH) if kind == "gelu" else (experts, HIDDEN, WIDTH)
    shapes = ((rows, WIDTH), (experts, HIDDEN, WIDTH), (experts, WIDTH, HIDDEN), third)
    generator = torch.Generator().manual_seed(rows)
    tensors = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    return tensors, torch.randn(rows, WIDTH, generator=generator).to(dtype)


def both_passes(compute, tensors: list[Tensor], gradient: Tensor) -> list[Tensor]:
    out = compute(*tensors)
    return [out, *torch.autograd.grad(out, tensors, gradient)]


def check(kind: str, counts: list[int], padding: int, on_device: bool, dtype: torch.dtype) -> None:
    tensors, gradient = make(kind, counts, padding, dtype)
    rows = sum(counts)

    def plain(x: Tensor, *weights: Tensor) -> Tensor:
        parts = x[:rows].split(counts)
        outs = [
            plain_ffn(kind, part, *weight) for part, *weight in zip(parts, *(w.unbind() for w in weights), strict=True)
        ]
        return torch.cat([*outs, torch.zeros(padding, WIDTH, dtype=dtype)])

    given_counts = torch.tensor(counts) if on_device else counts
    ours = both_passes(lambda *t: expert_ffn(kind, *t, given_counts), tensors, gradient)
    theirs = both_passes(plain, tensors, gradient)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    for name, a, b in zip(("out", "x", "w1", "w2", "w3"), ours, theirs, strict=True):
        assert a.shape == b.shape
        if a.numel():
            error = (a.double() - b.double()).abs().max()
            assert error <= tolerance * b.double().abs().max().clamp(min=1), (name, float(error))
    assert not ours[0][rows:].any() and not ours[1][rows:].any(), "padding"


@pytest.mark.parametrize("kind", ("gelu", "swiglu"))
@settings(max_examples=25, deadline=None)
@given(counts=st.lists(st.integers(0, 6), min_size=1, max_size=6), padding=st.integers(0, 5))
def test_any_counts(kind, counts, padding):
    check(kind, counts, 0, False, torch.float32)
    check(kind, counts, padding, True, torch.float32)


@pytest.mark.parametrize("kind", ("gelu", "swiglu"))
@pytest.mark.parametrize("threads", (1, 3))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_equal_counts(kind, threads, dtype):
    """Threads decide how many experts share a batched product."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for experts in (1, 6, 7):
            check(kind, [5] * experts, 0, False, dtype)
            check(kind, [5] * experts, 2, True, dtype)
    finally:
        torch.set_num_threads(before)


def test_a_non_finite_row_does_not_reach_padding_or_the_matrices_of_other_experts():
    (x, *weights), gradient = make("gelu", [2, 2], 3, torch.float32)
    with torch.no_grad():
        x[0] = float("nan")
    out, dx, dw1, *_ = both_passes(lambda *t: expert_ffn("gelu", *t, torch.tensor([2, 2])), [x, *weights], gradient)
    assert out[0].isnan().all() and out[1:].isfinite().all()
    assert dx[1:].isfinite().all() and dw1[0].isnan().any() and dw1[1].isfinite().all()


def test_rows_are_grouped_only_where_their_sizes_are_multiples_of_16_bytes(monkeypatch):
    monkeypatch.setattr("diffmoe_ds.moe.expert_ffn.GROUPED", {("cpu", torch.bfloat16)})
    rows = torch.zeros(1, dtype=torch.bfloat16)
    assert groups_ragged_rows(rows, 16, 64) and not groups_ragged_rows(rows, 16, 60)
    assert not groups_ragged_rows(rows.float(), 16, 64)
