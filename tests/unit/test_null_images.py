"""Images whose label is dropped: they are found, left out and put back, and an expert of their own takes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffmoe_ds.config.load import load_config
from diffmoe_ds.moe.layer import MoELayer
from diffmoe_ds.moe.null_images import find_null_images

S, D = 4, 8
PATTERNS = {
    "none": [False] * 5, "all": [True] * 5, "first": [True, False, False, False, False], "some": [False, True] * 3,
    "last two": [False, False, False, True, True], "only one": [True], "only one other": [False],
}  # fmt: skip


@pytest.fixture(params=PATTERNS)
def is_null_B(request) -> Tensor:
    return torch.tensor(PATTERNS[request.param])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def of_tokens(is_image_B: Tensor) -> Tensor:
    """Whether a token belongs to such an image, bool [T]."""
    return is_image_B.repeat_interleave(S)


def test_null_images_are_found_in_order(is_null_B):
    null = find_null_images(is_null_B)
    assert torch.equal(null.null_N, is_null_B.nonzero()[:, 0])
    assert torch.equal(null.others, (~is_null_B).nonzero()[:, 0])
    assert null.null_N.dtype == null.others.dtype == torch.int64 and torch.equal(null.is_null_B, is_null_B)


@pytest.mark.parametrize("which", ("without", "only"))
def test_tokens_of_either_kind_equal_plain_indexing(is_null_B, which):
    """Values and gradients, for any number of dimensions."""
    null, is_chosen_T = find_null_images(is_null_B), of_tokens(is_null_B if which == "only" else ~is_null_B)
    for shape in ((), (D,), (2, 3)):
        tokens = random(len(is_null_B) * S, *shape).requires_grad_()
        found, expected = getattr(null, which)(tokens), tokens[is_chosen_T]
        assert torch.equal(found, expected)
        cotangent = random(*expected.shape, seed=1)
        gradients = [torch.autograd.grad(value, tokens, cotangent)[0] for value in (found, expected)]
        assert torch.equal(*gradients) and not gradients[0][~is_chosen_T].any()


def test_masks_lose_the_tokens_of_null_images(is_null_B):
    mask_TE = random(len(is_null_B) * S, 3) > 0
    before_TE = mask_TE.clone()
    found_TE = find_null_images(is_null_B).exclude(mask_TE)
    assert found_TE.dtype == torch.bool and torch.equal(mask_TE, before_TE)
    assert not found_TE[of_tokens(is_null_B)].any()
    assert torch.equal(found_TE[of_tokens(~is_null_B)], mask_TE[of_tokens(~is_null_B)])


def test_adding_to_null_images_equals_plain_indexing(is_null_B):
    is_null_T = of_tokens(is_null_B)
    inputs = [random(len(is_null_T), D).requires_grad_(), random(int(is_null_T.sum()), D, seed=1).requires_grad_()]
    before_TD = inputs[0].detach().clone()
    found_TD = find_null_images(is_null_B).add(*inputs)
    assert torch.equal(inputs[0], before_TD)
    assert torch.equal(found_TD[~is_null_T], inputs[0][~is_null_T])
    assert torch.equal(found_TD[is_null_T], inputs[0][is_null_T] + inputs[1])
    cotangent_TD = random(*found_TD.shape, seed=2)
    of_tokens_TD, of_added = torch.autograd.grad(found_TD, inputs, cotangent_TD)
    assert torch.equal(of_tokens_TD, cotangent_TD) and torch.equal(of_added, cotangent_TD[is_null_T])


def make_layer(*overrides: str) -> MoELayer:
    """A layer of four experts with an unconditional one and random weights."""
    small = ("model.input_size=8", "model.mlp_ratio=0.125", "routing.num_experts=4", "routing.capacity_predictor=false")
    config = load_config("fashion", [*small, "routing.unconditional_expert=true", *overrides])
    assert config.tokens_per_image == S
    layer = MoELayer(config, D)
    generator = torch.Generator().manual_seed(7)
    for tensor in (*layer.parameters(), *layer.buffers()):
        torch.nn.init.normal_(tensor, std=0.5, generator=generator)
    return layer


ROUTERS = {
    "token_choice": ("routing.kind=token_choice", "routing.capacity=2"),
    "shared": ("routing.kind=token_choice", "routing.shared_experts=2", "routing.score=sigmoid"),
    "prototypes": ("routing.kind=token_choice", "routing.affinity=cosine", "routing.score=identity"),
    "renormalized": ("routing.kind=token_choice", "routing.capacity=2", "routing.renormalize=true"),
    "swiglu": ("routing.kind=token_choice", "routing.expert_mlp=swiglu", "routing.shared_experts=1"),
    "expert_choice": ("routing.kind=expert_choice", "routing.shared_experts=1"),
}


@pytest.mark.parametrize("is_training", (True, False))
@pytest.mark.parametrize("router", ROUTERS)
def test_null_images_go_to_the_unconditional_expert_alone(is_null_B, router, is_training):
    layer = make_layer(*ROUTERS[router]).train(is_training)
    x_BSD = random(len(is_null_B), S, D)
    out_BSD, routing = layer(x_BSD, None, find_null_images(is_null_B))
    expected_NSD = layer.unconditional_expert(x_BSD[is_null_B])
    if layer.shared_experts is not None:
        expected_NSD = expected_NSD + layer.shared_experts(x_BSD[is_null_B])
    torch.testing.assert_close(out_BSD[is_null_B], expected_NSD)
    assert not routing.mask_TE[of_tokens(is_null_B)].any()
    taken_BE = routing.mask_TE.view(len(is_null_B), S, -1)[~is_null_B].sum(1)
    if router == "expert_choice":
        assert (taken_BE == S * layer.capacity / layer.num_experts).all()
    else:
        assert (taken_BE.sum(1) == S * layer.capacity).all()


@pytest.mark.parametrize("router", ROUTERS)
def test_other_images_are_unaffected_by_which_are_null(is_null_B, router):
    """They get what they get in a batch without null images; so the unconditional expert does not touch them."""
    layer = make_layer(*ROUTERS[router])
    x_BSD = random(len(is_null_B), S, D)
    out_BSD, routing = layer(x_BSD, None, find_null_images(is_null_B))
    alone_BSD, routing_alone = layer(x_BSD, None, find_null_images(torch.zeros_like(is_null_B)))
    without_BSD, _ = layer(x_BSD)
    others_T = of_tokens(~is_null_B)
    assert torch.equal(routing.mask_TE[others_T], routing_alone.mask_TE[others_T])
    torch.testing.assert_close(out_BSD[~is_null_B], alone_BSD[~is_null_B])
    torch.testing.assert_close(alone_BSD, without_BSD)


@pytest.mark.parametrize("router", ROUTERS)
def test_gradients_of_null_images_reach_the_unconditional_expert_only(is_null_B, router):
    """Neither the router nor the routed experts learn from them, and it learns from no others."""
    layer = make_layer(*ROUTERS[router], "routing.balance_weight=0")
    out_BSD, _ = layer(random(len(is_null_B), S, D), None, find_null_images(is_null_B))
    for of_null in (True, False):
        layer.zero_grad()
        out_BSD[is_null_B if of_null else ~is_null_B].square().sum().backward(retain_graph=True)
        routed = [layer.gate_weight, *layer.experts.parameters()]
        unconditional = list(layer.unconditional_expert.parameters())
        silent, learning = (routed, unconditional) if of_null else (unconditional, routed)
        assert not any(weight.grad is not None and weight.grad.any() for weight in silent)
        has_images = bool((is_null_B == of_null).any())
        assert all((weight.grad is not None and bool(weight.grad.any())) == has_images for weight in learning)
