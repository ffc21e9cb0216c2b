"""Auxiliary losses of many ranks are those of one rank with all tokens, which are those of plain loops in fp64.

Data parallelism averages losses and gradients over the ranks, so their means are compared.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffmoe_ds.config.load import load_config
from diffmoe_ds.config.schema import Config
from diffmoe_ds.moe.auxiliary import auxiliary_losses
from diffmoe_ds.moe.null_images import find_null_images
from diffmoe_ds.moe.routers import expert_choice, token_choice
from diffmoe_ds.moe.scores import score_tokens
from diffmoe_ds.moe.search import Pool
from diffmoe_ds.moe.top_k import LocalPool
from tests.unit.test_routing import on_ranks

S, R = 4, 6
LOSSES = ("balance", "z", "orthogonality", "contrastive", "similarity")
TEMPERATURE = 0.2
KINDS = {
    "balance": ("token_choice",), "z": ("token_choice", "expert_choice", "batch_pool"),
    "contrastive": ("token_choice", "batch_pool"), "image_contrastive": ("expert_choice",),
    "similarity": ("token_choice", "expert_choice", "batch_pool"),
}  # fmt: skip
"""The routers that have a loss."""

# ------------------------------------------------------------------------------------------------ the losses, by loops


def balance(logits_TE: Tensor, score: str, mask_TE: Tensor) -> Tensor:
    tokens, experts = mask_TE.shape
    total = logits_TE.new_zeros(())
    for e in range(experts):
        mean = logits_TE.new_zeros(())
        for logits_E in logits_TE:
            values_E = [1 / (1 + (-logit).exp()) if score == "sigmoid" else logit.exp() for logit in logits_E]
            mean = mean + values_E[e] / sum(values_E) / tokens
        total = total + int(mask_TE[:, e].sum()) / max(1, int(mask_TE.sum())) * mean
    return experts * total


def z(logits_TE: Tensor) -> Tensor:
    return sum((logits_E.exp().sum().log() ** 2 for logits_E in logits_TE), logits_TE.new_zeros(())) / len(logits_TE)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b) / (a @ a).sqrt() / (b @ b).sqrt()


def contrastive(tokens_TR: Tensor, vectors_ER: Tensor, mask_TE: Tensor) -> Tensor:
    means = {e: tokens_TR[mask_TE[:, e]].mean(0) for e in range(len(vectors_ER)) if mask_TE[:, e].any()}
    if len(means) < 2:
        return 0 * (tokens_TR.sum() + vectors_ER.sum())
    losses = []
    for e in means:
        similar = {f: (cosine(vectors_ER[e], mean) / TEMPERATURE).exp() for f, mean in means.items()}
        losses.append(-(similar[e] / sum(similar.values())).log())
    return sum(losses) / len(losses)


def image_contrastive(tokens_TR: Tensor, vectors_ER: Tensor, mask_TE: Tensor) -> Tensor:
    images = zip(tokens_TR.split(S), mask_TE.split(S), strict=True)
    return sum(contrastive(tokens, vectors_ER, mask) for tokens, mask in images) / (len(tokens_TR) // S)


def similarity(logits_TE: Tensor, mask_TE: Tensor) -> Tensor:
    (tokens, experts), p = mask_TE.shape, logits_TE.exp() / logits_TE.exp().sum(1, keepdim=True)
    taken = {(i, j): int((mask_TE[:, i] & mask_TE[:, j]).sum()) for i in range(experts) for j in range(experts)}
    total = logits_TE.new_zeros(())
    for (i, j), number in taken.items():
        alike = sum(other for pair, other in taken.items() if (pair[0] == pair[1]) == (i == j))
        factor = experts if i == j else experts * (experts - 1)
        total = total + factor * number / max(1, alike) * (p[:, i] * p[:, j]).sum() / tokens
    return total


class Case(NamedTuple):
    """The tokens of a pool, with everything that routes them."""

    affinity: str
    score: str
    ranks: int
    is_null_B: Tensor | None
    """bool, of all images; None without null images, as for other routers."""
    tokens_TR: Tensor
    """fp32, of all ranks; likewise the mask."""
    vectors_ER: Tensor
    mask_TE: Tensor


def expected(loss: str, case: Case) -> list[Tensor]:
    """The loss with the gradients of tokens and vectors, of the tokens that are routed."""
    tokens_TR, vectors_ER = inputs = [
        case.tokens_TR.double().requires_grad_(),
        case.vectors_ER.double().requires_grad_(),
    ]
    is_routed_T = torch.ones(len(tokens_TR), dtype=torch.bool)
    if case.is_null_B is not None:
        is_routed_T = ~case.is_null_B.repeat_interleave(S)
    if not is_routed_T.any():
        return [torch.zeros(()), torch.zeros_like(tokens_TR), torch.zeros_like(vectors_ER)]
    read_TR, mask_TE = tokens_TR[is_routed_T], case.mask_TE[is_routed_T]
    logits_TE = read_TR @ vectors_ER.T
    if case.affinity == "cosine":
        logits_TE = torch.stack([torch.stack([cosine(token, vector) for vector in vectors_ER]) for token in read_TR])
    value = {
        "balance": lambda: balance(logits_TE, case.score, mask_TE),
        "z": lambda: z(logits_TE),
        "contrastive": lambda: contrastive(read_TR, vectors_ER, mask_TE),
        "image_contrastive": lambda: image_contrastive(read_TR, vectors_ER, mask_TE),
        "similarity": lambda: similarity(logits_TE, mask_TE),
    }[loss]()
    return [value.detach(), *torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)]


# ----------------------------------------------------------------------------------------------------- ours, by ranks


@cache
def config_of(kind: str, score: str = "softmax", *losses: str) -> Config:
    """A recipe with these losses; all that the router has by default."""
    weights = [f"routing.{loss}_weight={float(not losses or loss in losses)}" for loss in LOSSES]
    router = [f"routing.kind={kind}", f"routing.score={score}", f"routing.contrastive_temperature={TEMPERATURE}"]
    config = load_config("fashion", ["model.input_size=8", "routing.num_experts=4", *router, *weights])
    assert config.tokens_per_image == S
    return config


def on_a_rank(config: Config, case: Case, part: Tensor, pool: Pool) -> dict[str, list[Tensor]]:
    """Each loss of the images in ``part``, with its gradients."""
    token_T = (part[:, None] * S + torch.arange(S)).flatten()
    inputs = [case.tokens_TR[token_T].requires_grad_(), case.vectors_ER.clone().requires_grad_()]
    scored = score_tokens(case.affinity, case.score, *inputs)
    null = None if case.is_null_B is None else find_null_images(case.is_null_B[part])
    mask_TE = case.mask_TE[token_T] if null is None else null.exclude(case.mask_TE[token_T])
    losses = auxiliary_losses(config, scored, mask_TE, pool, null)
    assert tuple(losses) == config.auxiliary_losses
    found = {}
    for name, loss in losses.items():
        assert loss.dtype == torch.float32 and loss.shape == ()
        gradients = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
        found[name] = [loss.detach(), *gradients]
    return found


def data_parallel(config: Config, case: Case) -> dict[str, list[Tensor]]:
    """The means over the ranks. Every rank has as many images as the others."""
    parts = list(torch.arange(len(case.tokens_TR) // S).chunk(case.ranks))
    ranks = on_ranks(lambda part, pool: on_a_rank(config, case, part, pool), parts)
    found = {}
    for name in config.auxiliary_losses:
        loss, tokens_TR, vectors_ER = zip(*(rank[name] for rank in ranks), strict=True)
        mean_TR = torch.cat(tokens_TR) / case.ranks
        found[name] = [torch.stack(loss).mean(), mean_TR, torch.stack(vectors_ER).mean(0)]
    return found


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for ours, theirs, what in zip(found, wanted, ("loss", "gradient of tokens", "gradient of vectors"), strict=True):
        largest = max(1e-2, float(theirs.abs().max()))
        torch.testing.assert_close(
            ours.double(), theirs.double(), rtol=0, atol=1e-4 * largest, msg=lambda text, what=what: f"{what}: {text}"
        )


def random_case(kind: str, ranks: int, is_null_B: Tensor | None, images: int, seed: int, **changes: object) -> Case:
    """Tokens whose means are far from 0, and masks as the router makes them or, half of the time, uneven ones."""
    generator = torch.Generator().manual_seed(seed)
    experts = int(torch.randint(2, 5, (), generator=generator))
    tokens_TR = torch.randn(ranks * images * S, R, generator=generator)
    tokens_TR[:, 0] = tokens_TR[:, 0].abs() + 0.5
    scores_TE = torch.rand(len(tokens_TR), experts, generator=generator)
    if kind == "expert_choice":
        mask_TE = expert_choice(scores_TE, torch.full((ranks * images, experts), 1 + seed % 2))
    else:
        uneven_E = torch.tensor([0.6, 0.3, 0.05, 0.0])[:experts]
        mask_TE = token_choice(scores_TE, 1 + seed % 2) if seed % 4 < 2 else scores_TE < uneven_E
    case = Case("linear", "softmax", ranks, is_null_B, tokens_TR, torch.randn(experts, R, generator=generator), mask_TE)
    return case._replace(**changes)


@st.composite
def cases(draw, kind: str):
    """One to three ranks with as many images each, of which any are null."""
    ranks, images = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    is_null_B = None
    if kind != "batch_pool" and draw(st.booleans()):
        is_null_B = torch.tensor(draw(st.lists(st.booleans(), min_size=ranks * images, max_size=ranks * images)))
    affinity, score = draw(st.sampled_from(["linear", "cosine"])), draw(st.sampled_from(["softmax", "sigmoid"]))
    seed = draw(st.integers(0, 2**32 - 1))
    return random_case(kind, ranks, is_null_B, images, seed, affinity=affinity, score=score)


PAIRS = [(loss, kind) for loss, kinds in KINDS.items() for kind in kinds]


@pytest.mark.parametrize(("loss", "kind"), PAIRS)
@settings(max_examples=50, deadline=None, derandomize=True)
@given(data=st.data())
def test_ranks_and_loops_agree(loss, kind, data):
    """On its own and among the other losses; on the ranks and on a single one."""
    case = data.draw(cases(kind))
    name, wanted = loss.removeprefix("image_"), expected(loss, case)
    assert_same(data_parallel(config_of(kind, case.score, name), case)[name], wanted)
    assert_same(data_parallel(config_of(kind, case.score), case)[name], wanted)
    everything = torch.arange(len(case.tokens_TR) // S)
    assert_same(on_a_rank(config_of(kind, case.score, name), case, everything, LocalPool())[name], wanted)


UNEVEN = {
    "a rank without others": [True] * 3 + [False, True, False] + [False] * 3,
    "two ranks without others": [True] * 6 + [True, False, True],
    "all are null": [True] * 9,
    "none is null": [False] * 9,
}


@pytest.mark.parametrize("pattern", UNEVEN)
@pytest.mark.parametrize(("loss", "kind"), [(loss, kind) for loss, kind in PAIRS if kind != "batch_pool"])
def test_ranks_may_have_any_number_of_null_images(loss, kind, pattern):
    name = loss.removeprefix("image_")
    for seed in range(4):
        case = random_case(kind, 3, torch.tensor(UNEVEN[pattern]), 3, seed, affinity=("linear", "cosine")[seed % 2])
        found = data_parallel(config_of(kind, "softmax", name), case)[name]
        assert_same(found, expected(loss, case))
        assert not found[1][case.is_null_B.repeat_interleave(S)].any(), "null images have no gradient"
        if pattern == "all are null":
            assert not any(value.any() for value in found)


@pytest.mark.parametrize(("loss", "kind"), [(loss, kind) for loss, kind in PAIRS if kind != "batch_pool"])
def test_null_images_do_not_matter(loss, kind):
    """Whatever their tokens are, and their masks."""
    is_null_B, name = torch.tensor([True, False, False, True]), loss.removeprefix("image_")
    case = random_case(kind, 2, is_null_B, 2, seed=5)
    is_null_T1 = is_null_B.repeat_interleave(S)[:, None]
    other = case._replace(
        tokens_TR=torch.where(is_null_T1, 1e3 * case.tokens_TR.flip(0), case.tokens_TR),
        mask_TE=torch.where(is_null_T1, ~case.mask_TE, case.mask_TE),
    )
    for one, two in zip(*(data_parallel(config_of(kind), which)[name] for which in (case, other)), strict=True):
        torch.testing.assert_close(one, two)
