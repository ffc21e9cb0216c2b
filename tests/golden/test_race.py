"""Expert Race gives its references' numbers: selections, thresholds, losses and gradients.

`race_routing` holds the routing alone, computed in float64 from the paper's formulas, and three layers h <- h + MoE(h)
of a re-implementation by others: the authors' code is not public.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffmoe_ds.config.load import load_config
from diffmoe_ds.moe.auxiliary import Share, similarity_loss
from diffmoe_ds.moe.layer import MoELayer, Routing
from diffmoe_ds.moe.race_thresholds import RaceThresholds
from diffmoe_ds.moe.top_k import LocalPool, select_top_k
from diffmoe_ds.training.loss import per_layer_loss
from tests.golden.test_golden import assert_close, golden

CASES = ("k1", "k2")
LAYERS, EXPERTS, HIDDEN = 3, 6, 16
CONFIG = load_config(
    "fashion",
    [
        "model.name=nano-E2", "model.hidden_size=24", "model.input_size=8", "model.patch_size=2", "model.in_channels=4",
        "model.num_classes=10", f"model.depth={LAYERS}", "routing.kind=race", f"routing.num_experts={EXPERTS}",
        "routing.capacity=2", f"routing.expert_width={HIDDEN}", "routing.affinity=mlp", "routing.score=identity",
        "routing.similarity_weight=1e-4", "routing.per_layer_weight=1e-2",
    ],
)  # fmt: skip
NAMES = {
    "gate_hidden.weight": "router.0.weight", "gate_hidden.bias": "router.0.bias", "gate_weight": "gating_head.weight",
    "gate_bias": "gating_head.bias", "target_head.weight": "target_head.weight", "target_head.bias": "target_head.bias",
}  # fmt: skip


def views(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Views of one of a layer's tensors under the reference's names."""
    if name in NAMES:
        return {NAMES[name]: tensor}
    weight = name.removeprefix("experts.")
    if weight == "w3":
        biases = [(e, *matrix[0].split([HIDDEN, 24])) for e, matrix in enumerate(tensor)]
        return {f"experts.{e}.fc{n + 1}.bias": pair[n] for e, *pair in biases for n in range(2)}
    return {f"experts.{e}.fc{weight[1]}.weight": matrix for e, matrix in enumerate(tensor)}


def stack(file: dict[str, np.ndarray]) -> list[MoELayer]:
    layers = [MoELayer(CONFIG, 24) for _ in range(LAYERS)]
    with torch.no_grad():
        for number, layer in enumerate(layers):
            for name, parameter in layer.named_parameters():
                for theirs, view in views(name, parameter.data).items():
                    view.copy_(torch.from_numpy(file[f"stack/state/{number}.{theirs}"]))
            layer.race_threshold.copy_(torch.from_numpy(file[f"stack/state/{number}.expert_tau"]))
    return layers


def run(layers: list[MoELayer], x: torch.Tensor) -> tuple[torch.Tensor, list[Routing], list[torch.Tensor]]:
    """The output, and the routing and output of each layer."""
    routings, outputs = [], []
    for layer in layers:
        out, routing = layer(x)
        x = x + out
        routings.append(routing)
        outputs.append(out)
    return x, routings, outputs


@pytest.mark.parametrize("case", CASES)
def test_selection_and_threshold(case):
    file = golden("race_routing")
    logits = torch.from_numpy(file[f"{case}/logits"])
    pairs = select_top_k(logits.reshape(-1, 1), int(file[f"{case}/rows"]), LocalPool())
    mask = pairs.mask_TE.view_as(logits)
    np.testing.assert_array_equal(mask.numpy(), file[f"{case}/mask"].astype(bool))
    assert_close(logits * mask, file[f"{case}/gates"], "weights")
    assert_close(pairs.kth_E[0], file[f"{case}/kth"], "K-th score")
    layer = SimpleNamespace(kind="expert_race", race_threshold=torch.tensor([float(file[f"{case}/tau_before"])]))
    thresholds = RaceThresholds([layer], decay=0.95)
    thresholds.observe([SimpleNamespace(race_score=pairs.kth_E[0])])
    thresholds.update()
    assert_close(layer.race_threshold, file[f"{case}/tau_after"], "threshold")
    taken = logits >= layer.race_threshold
    np.testing.assert_array_equal(taken.numpy(), file[f"{case}/eval_mask"].astype(bool))


def test_ties_go_to_the_earlier_token_and_expert():
    file = golden("race_routing")
    logits, k = torch.from_numpy(file["tie/logits"]), int(file["tie/rows"])
    mask = select_top_k(logits.reshape(-1, 1), k, LocalPool()).mask_TE.view_as(logits)
    above, at_least = (torch.from_numpy(file[f"tie/{key}"].astype(bool)) for key in ("above_kth", "mask_at_least_kth"))
    assert mask.sum() == k < at_least.sum()
    assert (mask | at_least).equal(at_least) and (mask & above).equal(above)
    order = logits.flatten().sort(descending=True, stable=True).indices[:k]
    assert mask.flatten().nonzero().flatten().tolist() == sorted(order.tolist())


@pytest.mark.parametrize("case", CASES)
def test_similarity_loss(case):
    file = golden("race_routing")
    logits = torch.from_numpy(file[f"{case}/logits"]).double().flatten(0, 1).requires_grad_()
    mask = torch.from_numpy(file[f"{case}/mask"].astype(bool)).flatten(0, 1)
    loss = similarity_loss(logits.softmax(-1), mask, Share(LocalPool(), 1, len(logits)))
    assert_close(loss, file[f"{case}/sim/loss"], "loss")
    loss.backward()
    assert_close(logits.grad, file[f"{case}/sim/grad_logits"].reshape(logits.shape), "gradient")


def test_stack_in_inference():
    file = golden("race_routing")
    layers = stack(file)
    for layer in layers:
        layer.eval().inference = "per_token"
    with torch.no_grad():
        out, routings, _ = run(layers, torch.from_numpy(file["stack/in/x"]))
    assert_close(out, file["stack/eval/out"], "eval/out")
    for number, routing in enumerate(routings):
        mask = file[f"stack/eval/mask/{number}"].astype(bool)
        np.testing.assert_array_equal(routing.mask_TE.view(mask.shape).numpy(), mask)


def test_stack_in_training():
    file = golden("race_routing")
    layers = stack(file)
    x = torch.from_numpy(file["stack/in/x"]).requires_grad_()
    target = torch.from_numpy(file["stack/in/target"])
    out, routings, outputs = run(layers, x)
    assert_close(out, file["stack/train/out"], "train/out")
    for number, (layer, routing) in enumerate(zip(layers, routings, strict=True)):
        mask = file[f"stack/train/mask/{number}"].astype(bool)
        np.testing.assert_array_equal(routing.mask_TE.view(mask.shape).numpy(), mask)
        assert_close(routing.weights_TE.view(mask.shape), file[f"stack/train/logits/{number}"], "weights")
        assert_close(outputs[number], file[f"stack/train/moe_out/{number}"], "layer")
        assert_close(routing.auxiliary["similarity"], file[f"stack/train/sim_loss/{number}"], "similarity loss")
        assert_close(routing.race_score, file[f"stack/train/kth/{number}"], "K-th score")
        thresholds = RaceThresholds([layer], decay=0.95)
        thresholds.observe([routing])
        thresholds.update()
        assert_close(layer.race_threshold, file[f"stack/train/tau_after/{number}"], "threshold")

    similarity = sum(routing.auxiliary["similarity"] for routing in routings)
    per_layer = [per_layer_loss(routing.target_TP, target, CONFIG) for routing in routings]
    for number, loss in enumerate(per_layer):
        assert_close(loss, file[f"stack/train/plr_loss/{number}"], "per-layer loss")
    main = (out * torch.from_numpy(file["stack/in/cotangent"])).sum()
    total = main + CONFIG.routing.similarity_weight * similarity + CONFIG.routing.per_layer_weight * sum(per_layer)
    assert_close(total, file["stack/train/total"], "total")
    losses = {"grad_main": main, "grad_sim": similarity, "grad_plr": sum(per_layer), "grad_total": total}
    for key, loss in losses.items():
        for layer in layers:
            layer.zero_grad()
        x.grad = None
        loss.backward(retain_graph=True)
        found = {"x": x.grad}
        for number, layer in enumerate(layers):
            for name, parameter in layer.named_parameters():
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                found |= {f"{number}.{theirs}": view for theirs, view in views(name, gradient).items()}
        wanted = {name.removeprefix(f"stack/{key}/") for name in file if name.startswith(f"stack/{key}/")}
        assert wanted <= found.keys()
        for name in wanted:
            assert_close(found[name], file[f"stack/{key}/{name}"], f"{key}/{name}")
