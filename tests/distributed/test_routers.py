"""ProMoE, DSMoE and Expert Race with all their losses train the same in any layout, and resume in any other."""

from __future__ import annotations

import pytest
import torch

from diffmoe_ds import load
from diffmoe_ds.cli import main
from tests.distributed.test_layout import TOLERANCE, assert_same, tensors
from tests.helpers.training import Trained

PROMOE = (
    "routing.affinity=cosine", "routing.score=identity", "routing.unconditional_expert=true",
    "routing.capacity_predictor=false", "routing.contrastive_weight=1", "routing.z_weight=0.01",
    "model.label_dropout=0.3", "routing.shared_experts=1", "objective.flow_time_scale=1000",
    "objective.flow_direction=data_to_noise",
)  # fmt: skip
ROUTERS = {
    "promoe": ("routing.kind=token_choice", *PROMOE, "routing.balance_weight=0.1", "routing.similarity_weight=0.1"),
    "promoe_ec": ("routing.kind=expert_choice", *PROMOE),
    "dsmoe": (
        "routing.kind=token_choice", "routing.score=sigmoid", "routing.groups=2", "routing.groups_kept=1",
        "routing.capacity=2", "routing.renormalize=true", "routing.weight_scale=2", "routing.bias_rate=0.01",
        "routing.balance_weight=0.05", "routing.orthogonality_weight=0.01", "model.mlp=silu",
        "routing.expert_mlp=swiglu", "model.positions=rope", "model.norm=rms", "model.qk_norm=rms",
    ),
    "nucleus": (
        "routing.kind=expert_choice", "routing.router_input=time", "routing.renormalize=true", "routing.z_weight=0.01",
        "routing.orthogonality_weight=0.01", "routing.capacity=2", "routing.capacity_predictor=false",
        "routing.dense_blocks=2",
    ),
    "race": (
        "routing.kind=expert_race", "routing.affinity=mlp", "routing.score=identity", "routing.capacity=1.5",
        "routing.similarity_weight=0.1", "routing.per_layer_weight=0.1", "routing.interleave=false",
    ),
    "pool": ("routing.similarity_weight=0.1", "routing.contrastive_weight=0.1", "model.qk_norm=layer"),
}  # fmt: skip
"""Each with its losses; null images in uneven numbers per rank, which changes the means over a pool."""
PUBLISHED = ("promoe", "promoe_ec", "dsmoe", "race")
"""Those that are trained in all layouts."""
LAYOUTS = ((2, 1, 1), (2, 2, 2), (4, 2, 3), (4, 4, 1))
LOSSES = ("balance_loss", "z_loss", "orthogonality_loss", "contrastive_loss", "similarity_loss", "per_layer_loss")


def compare(run: Trained, reference: Trained) -> None:
    """Compare logs, with the losses of the router, and tensors."""
    for key in LOSSES:
        assert (key in run.metrics[0]) == (key in reference.metrics[0])
        if key in run.metrics[0]:
            assert run.column(key) == pytest.approx(reference.column(key), abs=TOLERANCE), key
            assert any(reference.column(key))
    assert_same(run, reference)


@pytest.mark.slow
@pytest.mark.parametrize("router", ROUTERS)
def test_every_layout_trains_the_same_and_resumes_in_another(train_tiny, tmp_path, router):
    overrides = (*ROUTERS[router], "run.save_every_images=48")
    reference = train_tiny(1, 1, 0, *overrides)
    biases = [name for name in tensors(reference) if name.endswith("correction_bias")]
    assert bool(biases) == ("routing.bias_rate=0.01" in overrides)
    for world, ep, zero in LAYOUTS if router in PUBLISHED else LAYOUTS[2:]:
        compare(train_tiny(world, ep, zero, *overrides), reference)
    number = list(ROUTERS).index(router)
    first, second = LAYOUTS[number % len(LAYOUTS)], LAYOUTS[(number + 1) % len(LAYOUTS)]
    half = train_tiny(*first, *ROUTERS[router], "run.total_images=48").directory
    compare(train_tiny(*second, *overrides, directory=half, options=("--resume", "auto")), reference)


def test_two_ranks_train_like_one(train_tiny, tmp_path):
    """The fast one: activation checkpointing, accumulation and padded dispatch; the models can be exported."""
    changes = {"gradient_accumulation_steps": 2}
    for router in ("promoe", "dsmoe", "race"):
        overrides = (*ROUTERS[router], "run.total_images=32")
        reference = train_tiny(1, 1, 0, *overrides, **changes)
        recomputed = "model.activation_checkpointing=true"
        two = train_tiny(2, 2, 2, *overrides, recomputed, "routing.padded_dispatch=2", **changes)
        compare(two, reference)
        exported = tmp_path / router
        assert main(["checkpoint", "export", str(two.directory), "--out", str(exported)]) == 0
        here, there = load(two.directory).network.state_dict(), load(exported).network.state_dict()
        assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)


def test_a_race_needs_a_pair(train_tiny):
    """K = 0 would leave a threshold of NaN."""
    run = train_tiny(1, 1, 0, "routing.kind=race", "routing.capacity=0.002", code=2)
    assert "a pool of 256 tokens gives all experts together less than one token" in run.output
