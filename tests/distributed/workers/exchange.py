"""On each rank: compare expert-parallel MoE layers with one process that has all experts, also with skewed routing."""

import os
import sys
from contextlib import nullcontext
from unittest.mock import patch

import torch
import torch.distributed as dist

sys.path.insert(0, os.getcwd())
from diffmoe_ds.config.load import load_config
from diffmoe_ds.distributed import deepspeed_seam as seam
from diffmoe_ds.distributed.quiet import quiet_deepspeed
from diffmoe_ds.distributed.shutdown import shutdown
from diffmoe_ds.model.dit import DiT
from diffmoe_ds.model.init import init_weights
from diffmoe_ds.moe import expert_ffn
from diffmoe_ds.moe.expert_parallel import ExpertParallelMoE
from diffmoe_ds.moe.layer import MoELayer, exact_dispatch
from diffmoe_ds.moe.rows import combine_rows, gather_rows
from diffmoe_ds.moe.top_k import Selection
from diffmoe_ds.topology import Topology

torch.set_num_threads(1)
quiet_deepspeed()
seam.init_process_group()
RANK, WORLD = dist.get_rank(), dist.get_world_size()
EXPERTS, TOKENS, IMAGES = 4, 16, 2  # tokens per image, images per rank
WIDTH = 32


def layers(mlp: str, pool: str, ep: int, *overrides: str, capacity: float = 1.0) -> tuple[MoELayer, ExpertParallelMoE]:
    """One layer with all experts and one with this rank's, with the same weights."""
    config = load_config("fashion", [
        "model.name=nano-E4", "model.patch_size=8", f"model.mlp={mlp}", f"routing.pool={pool}", "model.depth=2",
        f"routing.capacity={capacity}", "routing.shared_experts=1", *overrides,
    ])  # fmt: skip
    topology = Topology(RANK, WORLD, ep, EXPERTS)
    group = seam.expert_parallel_group(ep)
    found = []
    for make, first in ((MoELayer, 0), (lambda c, w: ExpertParallelMoE(c, w, topology, group), topology.first_expert)):
        model = DiT(config, make)
        init_weights(model, 0, first)
        layer = model.moe_layers()[1]
        if mlp == "gelu":
            with torch.no_grad():  # biases that are not 0, and differ between experts
                numbers = torch.arange(first, first + len(layer.experts.w3))[:, None, None]
                layer.experts.w3.copy_(torch.sin(numbers + torch.arange(layer.experts.w3.shape[-1])))
        found.append(layer.train())
    return tuple(found)


def masks() -> dict[str, torch.Tensor]:
    """Selections over all ranks' tokens, [WORLD * T, E], edge cases first."""
    total = WORLD * IMAGES * TOKENS
    rank_of = torch.arange(total) // (IMAGES * TOKENS)
    nobody = torch.zeros(total, EXPERTS, dtype=torch.bool)
    first_rank_only, one_takes_a_rank, one_takes_all = nobody.clone(), nobody.clone(), nobody.clone()
    first_rank_only[rank_of == 0, :] = torch.rand(IMAGES * TOKENS, EXPERTS) < 0.5
    one_takes_a_rank[rank_of == WORLD - 1, 0] = True
    one_takes_all[:, EXPERTS - 1] = True
    return {
        "nobody": nobody, "first rank only": first_rank_only, "one takes a rank": one_takes_a_rank,
        "one takes all": one_takes_all, "all take all": ~nobody, "random": torch.rand(total, EXPERTS) < 0.4,
    }  # fmt: skip


def gradients(layer: MoELayer) -> dict[str, torch.Tensor]:
    return {n: (torch.zeros_like(p) if p.grad is None else p.grad) for n, p in layer.named_parameters()}


def compare(mlp: str, ep: int, name: str, mask: torch.Tensor) -> None:
    whole, sharded = layers(mlp, "world", ep)
    x_all = torch.randn(WORLD * IMAGES * TOKENS, WIDTH)
    weight = torch.randn_like(x_all)
    mine = slice(RANK * IMAGES * TOKENS, (RANK + 1) * IMAGES * TOKENS)
    outputs = []
    for layer, part in ((whole, slice(None)), (sharded, mine)):
        x = x_all[part].clone().requires_grad_()
        scores = torch.nn.functional.linear(x, layer.gate_weight).softmax(-1)
        selection = Selection(mask[part])
        counts = layer.dispatcher.count(selection, False)
        plan = counts.plan(selection.mask_TE, scores)
        rows = layer.dispatcher.start_dispatch(gather_rows(x, plan), counts)()
        rows = layer.dispatcher.combine(layer.experts(rows, counts.of_local_experts), counts)
        out = combine_rows(rows, plan)
        (out * weight[part]).sum().backward()
        outputs.append((out.detach(), x.grad))
    for got, expected in zip(outputs[1], outputs[0], strict=True):
        torch.testing.assert_close(got, expected[mine], msg=lambda m: f"{name}, ep {ep}: {m}")
    # each expert saw the rows of its own EP group; over the groups they add up to all rows
    for weight_name in ("w1", "w2", "w3"):
        gradient = getattr(sharded.experts, weight_name).grad
        gradient = torch.zeros_like(getattr(sharded.experts, weight_name)) if gradient is None else gradient
        total = torch.zeros_like(getattr(whole.experts, weight_name))
        first = sharded.ep_rank * len(gradient)
        total[first : first + len(gradient)] = gradient
        dist.all_reduce(total)
        torch.testing.assert_close(total, getattr(whole.experts, weight_name).grad, atol=1e-4, rtol=1e-4)


def skewed_forward(pool: str, ep: int) -> None:
    """A full layer, scores included: every expert selects only tokens of rank 0."""
    _, layer = layers("gelu", pool, ep, capacity=0.25)
    with torch.no_grad():
        layer.gate_weight.zero_()
        layer.gate_weight[:, :EXPERTS] = 50 * torch.eye(EXPERTS)
    x = torch.zeros(IMAGES, TOKENS, WIDTH)
    if RANK == 0:
        x[..., :EXPERTS] = torch.eye(EXPERTS).repeat(IMAGES * TOKENS // EXPERTS, 1).view(IMAGES, TOKENS, EXPERTS)
    x.requires_grad_()
    for mode in (True, False):
        layer.train(mode)
        for choice in ("static", "dynamic", "per_token"):
            layer.inference = choice
            out, routing = layer(x)
            logits = routing.capacity_logits_TE
            (out.sum() if logits is None else out.sum() + logits.sum()).backward()
            taken = routing.mask_TE.sum()
            if mode and pool == "world" and WORLD > 1:
                assert taken == (int(0.25 * WORLD * IMAGES * TOKENS / EXPERTS) * EXPERTS if RANK == 0 else 0)


def padded_forward(kind: str, pool: str, ep: int) -> None:
    """Three passes with padded dispatch, the search cold and warm, against one with exact counts.

    In the last one, the number of rows of an expert is known to the device only, unless it is fixed.
    """
    slots_for_all_tokens = f"routing.padded_dispatch={EXPERTS}"
    _, layer = layers("gelu", pool, ep, f"routing.kind={kind}", slots_for_all_tokens)
    tokens = torch.randn(IMAGES, TOKENS, WIDTH, generator=torch.Generator().manual_seed(RANK))
    outputs = []
    grouped = patch.object(expert_ffn, "GROUPED", {("cpu", torch.float32)})
    for context in (exact_dispatch([layer]), nullcontext(), nullcontext(), grouped):
        layer.zero_grad()
        x = tokens.clone().requires_grad_()
        with context:
            out, routing = layer(x)
        loss = out.square().sum() + (routing.auxiliary.get("balance", out.sum()))
        loss.backward()
        assert routing.must_redo is None or not routing.must_redo
        outputs.append((out.detach(), x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)))
    assert (routing.must_redo is not None) == (kind == "token_choice" or layer.pool.size > 1)
    for padded in outputs[1:]:
        for got, expected in zip(padded, outputs[0], strict=True):
            if kind == "batch_pool" and layer.pool.size == layer.ep_size:
                assert torch.equal(got, expected), "where experts know their rows, they compute the same products"
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


torch.manual_seed(0)
for mlp in ("gelu", "swiglu"):
    for ep in sorted({1, 2, WORLD}):
        for name, mask in masks().items():
            compare(mlp, ep, name, mask)
for pool in ("world", "ep", "rank"):
    for ep in sorted({1, 2, WORLD}):
        skewed_forward(pool, ep)
        padded_forward("batch_pool", pool, ep)
for ep in sorted({1, 2, WORLD}):
    padded_forward("token_choice", "world", ep)
if RANK == 0:
    print("all equal")
shutdown(0)
