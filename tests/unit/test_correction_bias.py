"""Correction biases: they move by the sign of what an expert lacks, over all ranks and micro-batches of a step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffmoe_ds.config.load import load_config
from diffmoe_ds.moe.correction_bias import CorrectionBiases
from diffmoe_ds.moe.layer import MoELayer
from diffmoe_ds.moe.routers import token_choice
from diffmoe_ds.moe.search import Pool
from diffmoe_ds.moe.top_k import LocalPool
from tests.unit.test_routing import on_ranks

RATE = 0.25
E = 4


def make_layers(number: int, rate: float | None = RATE) -> list[MoELayer]:
    """Layers whose biases are 0, if they have any."""
    key = [] if rate is None else [f"routing.bias_rate={rate}"]
    config = load_config("fashion", ["routing.kind=token_choice", f"routing.num_experts={E}", *key])
    layers = [MoELayer(config, 8) for _ in range(number)]
    for layer in layers:
        for buffer in layer.buffers():
            buffer.zero_()
    return layers


def routing(mask_TE: Tensor) -> SimpleNamespace:
    """What of a `Routing` is counted."""
    return SimpleNamespace(mask_TE=mask_TE)


def routing_of(*load: int) -> SimpleNamespace:
    """A routing in which the experts take this many tokens."""
    mask_TE = torch.zeros(sum(load), len(load), dtype=torch.bool)
    start = 0
    for expert, number in enumerate(load):
        mask_TE[start : start + number, expert] = True
        start += number
    return routing(mask_TE)


class Silent(LocalPool):
    """A pool that must not be used."""

    def sum(self, values: Tensor) -> Tensor:
        raise AssertionError("a message was sent")


def test_biases_move_by_the_sign_of_what_an_expert_lacks():
    """Not by how much; one with the mean load keeps its bias."""
    (layer,) = layers = make_layers(1)
    biases = CorrectionBiases(layers, RATE, LocalPool())
    biases.observe([routing_of(100, 5, 4, 91)])
    biases.update()
    assert layer.correction_bias.tolist() == [-RATE, RATE, RATE, -RATE]
    biases.observe([routing_of(2, 3, 3, 4)])
    biases.update()
    assert layer.correction_bias.tolist() == [0, RATE, RATE, -2 * RATE]
    assert layer.correction_bias.dtype == torch.float32


def test_every_layer_moves_by_its_own_load():
    layers = make_layers(3)
    biases = CorrectionBiases(iter(layers), RATE, LocalPool())
    biases.observe([routing_of(8, 0, 0, 0), routing_of(2, 2, 2, 2), routing_of(1, 1, 1, 5)])
    biases.update()
    expected = [[-RATE, RATE, RATE, RATE], [0.0] * E, [RATE, RATE, RATE, -RATE]]
    assert [layer.correction_bias.tolist() for layer in layers] == expected


def test_an_exactly_balanced_load_changes_nothing():
    (layer,) = layers = make_layers(1)
    start_E = torch.tensor([0.1, -0.7, 0.3, 1.9])
    layer.correction_bias.copy_(start_E)
    biases = CorrectionBiases(layers, RATE, LocalPool())
    biases.observe([routing_of(7, 1, 4, 0)])
    biases.observe([routing_of(1, 7, 4, 8)])
    biases.update()
    assert torch.equal(layer.correction_bias, start_E)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_the_load_is_that_of_all_ranks_and_micro_batches(ranks, micro_batches, seed):
    """Biases are the same on every rank, and one message is sent for each update, whatever the layers."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(ranks, 2, micro_batches, 2, 6, E, generator=generator)  # of 2 steps and 2 layers
    masks = token_choice(scores.view(-1, E), 1).view(scores.shape)

    def train(part: Tensor, pool: Pool) -> tuple[Tensor, int]:
        layers = make_layers(2)
        biases = CorrectionBiases(layers, RATE, pool)
        for step in part:
            for micro_batch in step:
                biases.observe([routing(mask_TE) for mask_TE in micro_batch])
            biases.update()
        return torch.stack([layer.correction_bias for layer in layers]), pool.messages

    found, messages = zip(*on_ranks(train, list(masks)), strict=True)
    assert messages == (2,) * ranks
    load_PLE = masks.sum(dim=(0, 2, 4))  # of each step
    assert (load_PLE.sum(2) == ranks * micro_batches * 6).all()
    expected_LE = sum(RATE * (load_LE.double().mean(1, keepdim=True) - load_LE).sign().float() for load_LE in load_PLE)
    assert all(torch.equal(bias_LE, expected_LE) for bias_LE in found)


def test_a_retracted_micro_batch_does_not_count():
    """Only the last one; the repeated pass counts in its place."""
    (layer,) = layers = make_layers(1)
    biases = CorrectionBiases(layers, RATE, LocalPool())
    biases.observe([routing_of(0, 1, 1, 0)])
    biases.observe([routing_of(0, 90, 0, 0)])
    biases.retract()
    biases.observe([routing_of(1, 0, 0, 2)])
    biases.update()
    assert layer.correction_bias.tolist() == [RATE, RATE, RATE, -RATE]  # the load is 1, 1, 1, 2


def test_a_step_whose_only_micro_batch_is_retracted_changes_nothing():
    (layer,) = layers = make_layers(1)
    biases = CorrectionBiases(layers, RATE, Silent())
    biases.observe([routing_of(0, 90, 0, 0)])
    biases.retract()
    biases.retract()  # does nothing
    biases.update()
    assert not layer.correction_bias.any()


def test_a_discarded_step_does_not_count():
    (layer,) = layers = make_layers(1)
    biases = CorrectionBiases(layers, RATE, LocalPool())
    biases.observe([routing_of(0, 90, 0, 0)])
    biases.observe([routing_of(0, 90, 0, 0)])
    biases.discard()
    biases.observe([routing_of(5, 1, 1, 1)])
    biases.update()
    assert layer.correction_bias.tolist() == [-RATE, RATE, RATE, RATE]


def test_an_update_forgets_the_load():
    (layer,) = layers = make_layers(1)
    biases = CorrectionBiases(layers, RATE, LocalPool())
    biases.observe([routing_of(5, 1, 1, 1)])
    biases.update()
    once_E = layer.correction_bias.clone()
    biases.update()
    assert torch.equal(layer.correction_bias, once_E)


@pytest.mark.parametrize("rate", (None, 0.0))
def test_without_a_rate_nothing_is_sent_and_nothing_changes(rate):
    """None: there are no biases; 0: they keep their values."""
    layers = make_layers(2, rate)
    assert all(hasattr(layer, "correction_bias") == (rate is not None) for layer in layers)
    start_E = torch.tensor([0.1, -0.7, 0.3, 1.9])
    for layer in layers:
        for buffer in layer.buffers():
            buffer.copy_(start_E)
    biases = CorrectionBiases(layers, rate, Silent())
    for action in (biases.retract, biases.discard, biases.update):
        biases.observe([routing_of(9, 0, 0, 0)] * 2)
        action()
    biases.update()
    assert all(torch.equal(buffer, start_E) for layer in layers for buffer in layer.buffers())


def test_biases_have_no_gradient_and_are_saved():
    (layer,) = make_layers(1)
    assert "correction_bias" in layer.state_dict() and "correction_bias" not in dict(layer.named_parameters())
    assert not layer.correction_bias.requires_grad


def test_the_bias_of_a_dead_expert_rises_until_it_is_taken():
    """And then the load stays near balance."""
    (layer,) = layers = make_layers(1)
    rate = 0.02
    biases = CorrectionBiases(layers, rate, LocalPool())
    scores_TE = torch.rand(64, E, generator=torch.Generator().manual_seed(0))
    scores_TE[:, 2] = 0.01 * scores_TE[:, 2] - 0.5
    loads, dead = [], []
    for _ in range(100):
        mask_TE = token_choice(scores_TE + layer.correction_bias, 1)
        loads.append(mask_TE.sum(0))
        dead.append(layer.correction_bias[2].item())
        biases.observe([routing(mask_TE)])
        biases.update()
    first = next(step for step, load_E in enumerate(loads) if load_E[2])
    assert not loads[0][2] and first > 10
    assert dead[: first + 1] == pytest.approx([rate * step for step in range(first + 1)])
    late_E = torch.stack(loads[-20:]).float().mean(0)
    assert (late_E - 16).abs().max() < 4, late_E
