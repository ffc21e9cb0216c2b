"""Text models: cross-attention, padding, the null condition, gradients and initial weights."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from diffmoe_ds.config.load import load_config
from diffmoe_ds.config.schema import Config
from diffmoe_ds.model.conditioning import TextConditioner
from diffmoe_ds.model.dit import BlockInputs, DiT, DiTOutput, allocate, empty_model, saved_buffers
from diffmoe_ds.model.init import init_weights
from diffmoe_ds.model.layers import Context, CrossAttention
from diffmoe_ds.moe.layer import MoELayer
from diffmoe_ds.text_features import EncoderFeatures, padded_row
from diffmoe_ds.text_layout import TextLayout

TEXT = ("model.name=nano-E4", "model.patch_size=8", "model.conditioning=text")
LENGTHS = ((6, 1), (2, 5), (3, 3))
"""Tokens of three prompts for each of two encoders."""


def text_config(*overrides: str, most: tuple[int, int] = (6, 5)) -> Config:
    shapes = f"model.text_encoders=[[{most[0]},12,10],[{most[1]},20,8]]"
    return load_config("fashion", [*TEXT, shapes, *overrides])


def features_of(layout: TextLayout, lengths: tuple[int, ...], seed: int = 0) -> tuple[EncoderFeatures, ...]:
    stream = np.random.default_rng(seed)
    shapes = [(e.pooled, (length, e.width)) for e, length in zip(layout.encoders, lengths, strict=True)]
    return tuple(
        EncoderFeatures(*(stream.standard_normal(shape).astype(np.float16) for shape in pair)) for pair in shapes
    )


def prompt_rows(layout: TextLayout) -> torch.Tensor:
    """Rows of three prompts, the same ones for every layout that holds them."""
    rows = [padded_row(layout, features_of(layout, lengths, seed)) for seed, lengths in enumerate(LENGTHS)]
    return torch.from_numpy(np.stack(rows))


def text_model(config: Config) -> DiT:
    """A model in which all weights matter; those of adaLN-zero and of new cross-attention start at 0."""
    model = DiT(config)
    init_weights(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        null = padded_row(config.text_layout, features_of(config.text_layout, (1, 2), seed=9))
        model.y_embedder.null_row.copy_(torch.from_numpy(null))
    return model


def run(model: DiT, rows: torch.Tensor, drop_B: torch.Tensor | None = None) -> DiTOutput:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(len(rows), 1, 32, 32, generator=generator)
    return model(x, torch.linspace(0.1, 0.9, len(rows)), rows, drop_B)


@torch.no_grad()
def test_cross_attention_is_that_of_torch():
    torch.manual_seed(0)
    ours = CrossAttention(width=16, context_width=12, num_heads=4, qk_norm=False)
    theirs = torch.nn.MultiheadAttention(16, 4, kdim=12, vdim=12, batch_first=True)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    key, value = ours.kv.weight.chunk(2)
    for target, source in (
        (theirs.q_proj_weight, ours.q.weight),
        (theirs.k_proj_weight, key),
        (theirs.v_proj_weight, value),
        (theirs.in_proj_bias, torch.cat([ours.q.bias, ours.kv.bias])),
        (theirs.out_proj.weight, ours.proj.weight),
        (theirs.out_proj.bias, ours.proj.bias),
    ):
        target.copy_(source)
    x, tokens = torch.randn(3, 9, 16), torch.randn(3, 7, 12)
    valid_BL = torch.arange(7) < torch.tensor([7, 1, 4])[:, None]
    expected, _ = theirs(x, tokens, tokens, key_padding_mask=~valid_BL)
    assert (ours(x, Context(tokens, valid_BL)) - expected).abs().max() < 1e-6
    everything, _ = theirs(x, tokens, tokens)
    assert (everything - expected).abs().max() > 0.01, "the mask matters"


@torch.no_grad()
def test_qk_norm_makes_the_scale_of_queries_and_keys_irrelevant():
    torch.manual_seed(0)
    attention = CrossAttention(width=16, context_width=12, num_heads=4, qk_norm=True)
    context = Context(torch.randn(2, 5, 12), torch.ones(2, 5, dtype=torch.bool))
    x = torch.randn(2, 9, 16)
    before = attention(x, context)
    attention.q.weight.mul_(10)
    attention.q.bias.mul_(10)
    assert (attention(x, context) - before).abs().max() < 1e-5


@torch.no_grad()
def test_padding_changes_nothing():
    config = text_config()
    model, rows = text_model(config).eval(), prompt_rows(config.text_layout)
    expected = run(model, rows).prediction
    garbage, places = rows.clone(), 0
    for (length_B, _, tokens_BLF), encoder in zip(
        config.text_layout.unpack(garbage), config.text_layout.encoders, strict=True
    ):
        padding_BL = torch.arange(encoder.tokens) >= length_B[:, None]
        tokens_BLF[padding_BL] = 30_000
        places += int(padding_BL.sum())
    assert places == 13
    assert torch.equal(run(model, garbage).prediction, expected)

    longer = text_config(most=(16, 70))
    other = text_model(longer).eval()
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "y_embedder.null_row"}
    other.load_state_dict(weights, strict=False)
    assert (run(other, prompt_rows(longer.text_layout)).prediction - expected).abs().max() < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_dropped_prompt_and_the_empty_prompt_are_the_null_condition(dtype):
    config = text_config()
    model, rows = text_model(config).eval(), prompt_rows(config.text_layout)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    empty = padded_row(config.text_layout, features_of(config.text_layout, (1, 2), seed=9))
    null = torch.from_numpy(empty).expand(3, -1)
    drop_B = torch.tensor([True, False, True])
    assert torch.equal(run(model, rows, torch.ones(3, dtype=torch.bool)).prediction, run(model, null).prediction)
    mixed = run(model, torch.where(drop_B[:, None], null, rows)).prediction
    assert torch.equal(run(model, rows, drop_B).prediction, mixed)
    assert not torch.equal(mixed, run(model, rows).prediction)


@torch.no_grad()
def test_every_part_of_the_features_of_both_encoders_matters():
    config = text_config()
    model, rows = text_model(config).eval(), prompt_rows(config.text_layout)
    model.set_inference("per_token")  # otherwise images compete for experts
    expected = run(model, rows).prediction
    for index in range(2):
        for change in (
            lambda text: text.pooled_BP[0].copy_(text.pooled_BP[0].flip(0)),
            lambda text: text.tokens_BLF[0, 0].copy_(text.tokens_BLF[0, 0].flip(0)),
            lambda text: text.length_B[2].sub_(1),
        ):
            changed = rows.clone()
            change(config.text_layout.unpack(changed)[index])
            moved_B = (run(model, changed).prediction - expected).abs().flatten(1).amax(1)
            assert moved_B.max() > 1e-3 and moved_B[1] < 1e-6, "only the image whose text has changed"


def test_lengths_above_256_are_exact_in_bf16():
    """bf16 would round 257 to 256 and 299 to 300."""
    layout = text_config(most=(300, 5)).text_layout
    conditioner = TextConditioner(layout, 16).to(torch.bfloat16)
    lengths = [257, 299, 300]
    rows = [padded_row(layout, features_of(layout, (length, 1))) for length in lengths]
    context = conditioner(torch.from_numpy(np.stack(rows))).context
    assert context.tokens_BLW.dtype is torch.bfloat16
    assert context.valid_BL.sum(1).tolist() == [length + 1 for length in lengths]


def gradients(config: Config) -> dict[str, torch.Tensor]:
    model = text_model(config).train()
    output = run(model, prompt_rows(config.text_layout), torch.tensor([False, True, False]))
    logits = [r.capacity_logits_TE.sum() for r in output.routing if r.capacity_logits_TE is not None]
    (output.prediction.square().sum() + sum(logits)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_gradients_reach_every_weight_and_activation_checkpointing_keeps_them():
    plain = gradients(text_config())
    without = [name for name, grad in plain.items() if grad is None or not grad.any()]
    assert not without
    for part in ("cross_attn.kv", "cross_attn.q_norm", "y_embedder.token_projs.1", "y_embedder.pooled_proj", "gate"):
        assert any(part in name for name in plain)
    again = gradients(text_config("model.activation_checkpointing=true"))
    assert plain.keys() == again.keys() and all(torch.equal(plain[name], again[name]) for name in plain)


@torch.no_grad()
def test_blocks_start_as_the_identity():
    config = text_config()
    model = DiT(config)
    init_weights(model, seed=0)
    condition = model.y_embedder(prompt_rows(config.text_layout))
    inputs = BlockInputs(condition.vector_BD, condition.vector_BD, condition.context)
    x = torch.randn(3, 16, config.size.hidden_size)
    for block in model.blocks:
        assert torch.equal(block(x, inputs)[0], x)
    assert not model.y_embedder.null_row.any()


def test_initial_weights_are_the_same_for_any_number_of_ranks():
    config = text_config()
    whole = DiT(config)
    init_weights(whole, seed=3)
    expected = whole.state_dict()
    for first in (0, 2):
        part = DiT(config, partial(MoELayer, num_local_experts=2))
        init_weights(part, seed=3, first_expert=first)
        for name, tensor in part.state_dict().items():
            same = expected[name][first : first + 2] if ".experts." in name else expected[name]
            assert torch.equal(tensor, same), name
    another = DiT(config)
    init_weights(another, seed=4)
    assert not torch.equal(another.y_embedder.pooled_proj[0].weight, expected["y_embedder.pooled_proj.0.weight"])


@torch.no_grad()
def test_the_null_condition_is_saved_with_the_weights():
    config = text_config()
    model, rows = text_model(config).eval(), prompt_rows(config.text_layout)
    assert "y_embedder.null_row" in saved_buffers(model)
    loaded = allocate(empty_model(config), "cpu").eval()
    loaded.load_state_dict(model.state_dict())
    loaded.reset_positions()
    drop_B = torch.tensor([True, False, True])
    assert torch.equal(run(loaded, rows, drop_B).prediction, run(model, rows, drop_B).prediction)


def test_a_class_model_has_nothing_of_text():
    model = empty_model(load_config("fashion", ["model.name=nano-E4"]))
    names = [name for name in model.state_dict() if "cross" in name or "null_row" in name or "pooled" in name]
    assert not names and all(block.cross_attn is None for block in model.blocks)
