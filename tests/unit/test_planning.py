"""What `diffmoe plan` computes: operations, memory, bytes and time of a layout."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffmoe_ds.cli import main
from diffmoe_ds.config.load import load_config
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.model.dit import DiT
from diffmoe_ds.model.init import init_weights
from diffmoe_ds.model.layers import time_frequencies
from diffmoe_ds.planning.advice import best_choice, ep_choices, scaling
from diffmoe_ds.planning.cost import latency
from diffmoe_ds.planning.devices import DEVICES, device_named, device_reported
from diffmoe_ds.planning.flops import flops_per_image
from diffmoe_ds.planning.layout import LayoutRequest, resolve_layout
from diffmoe_ds.planning.memory import step_memory
from diffmoe_ds.planning.messages import messages_of_passes
from diffmoe_ds.planning.parameters import count_parameters
from diffmoe_ds.planning.simulate import Passes, estimate_passes, simulate
from diffmoe_ds.planning.traffic import size_text

DSMOE = (
    "model.name=tiny-E8", "routing.kind=token_choice", "routing.capacity=2", "routing.expert_mlp=swiglu",
    "routing.expert_width=40", "routing.shared_experts=1", "routing.shared_width=24", "routing.dense_blocks=2",
    "routing.router_input=time", "routing.score=sigmoid", "routing.renormalize=true", "routing.bias_rate=0.001",
    "model.mlp=silu", "model.positions=rope", "model.norm=rms", "model.qk_norm=rms",
)  # fmt: skip
RACE = (
    "model.name=tiny-E8", "routing.kind=expert_race", "routing.capacity=2", "routing.affinity=mlp",
    "routing.score=identity", "routing.similarity_weight=0.1", "routing.per_layer_weight=0.1",
)  # fmt: skip
PROMOE = (
    "routing.affinity=cosine", "routing.score=identity", "routing.unconditional_expert=true",
    "routing.capacity_predictor=false", "routing.contrastive_weight=1", "model.label_dropout=0.5",
)  # fmt: skip


@pytest.mark.parametrize(
    "overrides",
    (
        ("model.name=Dense-S", "routing.kind=dense", "model.depth=2"),
        ("model.name=tiny-E4", "model.mlp=swiglu", "routing.shared_experts=1", "objective.kind=ddpm"),
        ("model.name=tiny-E8", "routing.kind=token_choice", "routing.capacity=2"),
        ("model.name=tiny-E8", "routing.kind=expert_choice", "routing.interleave=false"),
        ("model.name=tiny-E4", "model.conditioning=text", "model.text_encoders=[[5,12,9],[3,200,16]]"),
        DSMOE,
        (*RACE, "routing.similarity_weight=0"),
    ),
)
def test_flops_equal_those_that_torch_counts(overrides):
    config = load_config("imagenet-256", overrides)
    model = DiT(config).train()
    init_weights(model, seed=0)
    images = torch.randn(1, 4, 32, 32)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the fused kernel is not counted
        label = torch.zeros(1, dtype=torch.int64)
        condition = torch.ones(1, config.text_layout.values, dtype=torch.float16) if config.is_text else label
        out = model(images, torch.rand(1), condition)
        without = flops_per_image(load_config("imagenet-256", [*overrides, "routing.per_layer_weight=0"]))
        heads = (flops_per_image(config).training - without.training) / 3  # of the per-layer loss, in training only
        assert counter.get_total_flops() == flops_per_image(config).forward + heads
        logits = [r.capacity_logits_TE.sum() for r in out.routing if r.capacity_logits_TE is not None]
        logits += [r.target_TP.sum() for r in out.routing if r.target_TP is not None]
        (out.prediction.sum() + sum(logits)).backward()
    assert counter.get_total_flops() == flops_per_image(config).training


def test_dit_flops_agree_with_the_dit_paper():
    """GMACs of DiT at patch 2 in latents of 256-pixel images (arXiv 2212.09748, table 1); ours are twice as many."""
    for name, gmacs in (("S", 6.06), ("B", 23.01), ("L", 80.71), ("XL", 118.64)):
        config = load_config("imagenet-256", [f"model.name=Dense-{name}", "routing.kind=dense", "objective.kind=ddpm"])
        assert flops_per_image(config).forward / 2e9 == pytest.approx(gmacs, rel=0.002)


def test_the_paper_s_text_to_image_model_has_its_size():
    """1.2 B activated of 4.6 B."""
    counts = count_parameters(load_config("imagenet-256", ["model.name=T2I-E16", "model.text_encoders=[[77,768,768]]"]))
    assert counts.total == pytest.approx(4.6e9, rel=0.01) and counts.activated == pytest.approx(1.2e9, rel=0.01)


def test_gpus_are_found_by_our_name_and_by_the_driver_s():
    assert device_named("h200") is DEVICES["H200"]
    for reported, name in (
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H100 NVL", "H100-NVL"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
    ):
        assert device_reported(reported) is DEVICES[name]
    assert device_reported("Tesla V100") is None
    with pytest.raises(ConfigError, match="did you mean 'H100'"):
        device_named("H10")


def test_sizes_have_a_unit_and_three_digits():
    sizes = {0: "0 bytes", 1: "1 byte", 2: "2 bytes", 999: "999 bytes", 1000: "1 kB", 999_600: "1 MB", 2**40: "1.1 TB"}
    assert {size: size_text(size) for size in sizes} == sizes


def layout(*overrides, world=8, ep=8, zero=2, micro_batch=2, bf16=True, recipe="imagenet-256", deepspeed=None):
    config = load_config(recipe, overrides)
    request = LayoutRequest(world, 8, ep, zero, micro_batch, 1, bf16)
    return resolve_layout(request, config, deepspeed or config.deepspeed, recipe)


@pytest.mark.parametrize(
    ("overrides", "world", "ep"),
    (
        (("routing.pool=world",), 8, 4),
        (("routing.pool=world", "model.activation_checkpointing=true"), 1024, 8),
        (("routing.pool=ep",), 8, 8),
        (("routing.pool_images=1",), 8, 4),
        (("routing.pool_images=8",), 8, 2),
        (("routing.pool_images=4",), 8, 4),
        (("routing.pool=rank", "model.activation_checkpointing=true"), 8, 2),
        (("routing.kind=token_choice",), 8, 2),
        (("routing.pool=world", "routing.padded_dispatch=1.25"), 8, 4),
        (("routing.kind=token_choice", "routing.padded_dispatch=1.5"), 8, 2),
        (("routing.kind=expert_choice", "routing.interleave=false"), 4, 4),
        (("model.name=Dense-S", "model.depth=2", "routing.kind=dense"), 4, 1),
        (("model.conditioning=text", "model.text_encoders=[[5,12,9]]"), 8, 4),
        (DSMOE, 8, 4),
        (RACE, 8, 4),
        ((*RACE, "routing.pool=ep"), 8, 8),
        (("routing.kind=token_choice", *PROMOE, "routing.similarity_weight=0.1", "routing.z_weight=0.1"), 8, 4),
        (("routing.kind=expert_choice", *PROMOE), 8, 4),
    ),
)
def test_planned_messages_of_the_passes_equal_simulated_ones(overrides, world, ep):
    planned = layout("model.name=tiny-E8", *overrides, world=world, ep=ep)
    counted = simulate(planned.config, planned.topology, 2, planned.dtype)
    sums = Counter()
    for message in messages_of_passes(planned):
        sums[message.collective, "calls"] += message.calls
        sums[message.collective, "bytes"] += message.bytes
    for collective, size in counted.messages:
        sums[collective, "calls"] -= 1
        sums[collective, "bytes"] -= size
    assert not any(sums.values()), sums
    assert time_frequencies(torch.device("cpu"))[0].item() == 1, "no fake tensor may stay in a cache"


def test_activations_of_a_deep_model_follow_from_two_shallow_ones():
    repa = ("loss.repa_weight=0.5", "loss.repa_features=[4,10]", "loss.repa_block=7")
    for depth, overrides in ((6, ()), (7, repa), (7, DSMOE[1:])):
        deep = layout("model.name=tiny-E8", f"model.depth={depth}", *overrides)
        counted = simulate(deep.config, deep.topology, 2, deep.dtype)
        passes = estimate_passes(deep)
        assert passes.saved == counted.saved
        assert passes.operators == counted.operators
        peak = max(counted.forward_peak, counted.backward_peak)
        assert passes.saved + passes.temporary == pytest.approx(peak, rel=0.01)


def test_parameters_of_a_rank_and_groups():
    """L-E16 without expert parallelism: DeepSpeed splits 1.6 G expert elements into groups of at most 179 M."""
    whole, sharded = (layout("model.name=L-E16", ep=ep) for ep in (1, 8))
    counts = count_parameters(whole.config)
    assert whole.elements(True) == counts.experts == 8 * sharded.elements(True)
    assert whole.elements(False) == sharded.elements(False) == counts.total - counts.experts
    assert counts.touched == counts.activated + counts.routers
    assert sum(p.numel for group in whole.groups for p in group.parameters) == counts.total
    assert max(sum(p.numel for p in group.parameters) for group in whole.groups[1:]) <= 178_956_971
    assert [group.ranks for group in sharded.groups] == [8, 1, 1]


def test_zero_stages_partition_the_state():
    """Bytes per parameter that a rank keeps: weights 2, master 4, moments 8, EMA 4 (bf16)."""
    passes = Passes(saved=0, temporary=0, operators=0)
    dense = ("model.name=Dense-S", "routing.kind=dense")
    found = {zero: step_memory(layout(*dense, ep=1, zero=zero), passes) for zero in range(4)}
    held = layout(*dense, ep=1).elements(False)
    assert found[0].master == found[0].ema == 4 * held and found[0].moments == 8 * held
    for zero in (1, 2, 3):
        assert found[zero].moments == pytest.approx(held, rel=0.001)  # an eighth
    assert found[2].weights == pytest.approx(2 * held, rel=0.02)
    assert found[3].weights < found[2].weights / 2


def test_lion_has_one_moment():
    passes = Passes(saved=0, temporary=0, operators=0)
    section = {"zero_optimization": {"stage": 2}, "train_batch_size": "auto"}
    adam, lion = (
        step_memory(layout("model.name=S-E8", deepspeed={**section, "optimizer": {"type": kind}}), passes)
        for kind in ("AdamW", "Lion")
    )
    assert lion.moments == adam.moments / 2 and lion.host_checkpoint == adam.host_checkpoint * 3 / 4


def test_a_model_that_does_not_fit_is_reported_with_the_reason():
    found = layout("model.name=XL-E16", ep=1, zero=0, world=8, micro_batch=8)
    choices = ep_choices(found, device_named("A100-40GB"), Passes(10**9, 10**8, 5000))
    assert [choice.fits for choice in choices] == [False, False, True, True]
    best, reason = best_choice(choices, local_world=8)
    assert best.ep_size in (4, 8) and "ep 1, 2 would not fit" in reason


def test_latency_is_interpolated_between_known_sizes():
    assert [latency(ranks) for ranks in (1, 8, 64, 1024)] == [0.0, 18e-6, 45e-6, 95e-6]
    assert 45e-6 < latency(256) < 95e-6 < latency(4096)


def test_more_nodes_take_longer_and_one_part_is_named():
    device = device_named("H100")
    times = scaling(layout("model.name=L-E16", micro_batch=4), device, operators=4000)
    assert times[8].total < times[64].total < times[1024].total
    assert all(time.dominant in time.parts for time in times.values())


def test_the_command_prints_one_object_or_a_page(capsys):
    command = ["plan", "--model", "tiny-E8", "--world", "8", "--ep", "4", "--zero", "1", "--micro-batch", "2"]
    assert main([*command, "--simulate", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    contract = "params_total params_activated params_ffn flops_per_image memory_per_rank_gb bytes_per_step fits"
    assert set(contract.split()) <= set(plan)
    assert plan["memory_per_rank_gb"] == pytest.approx(sum(plan["memory_parts_gb"].values()))
    assert plan["bytes_per_step"] == sum(message["bytes"] for message in plan["collectives"])
    assert plan["fits"] is True and plan["gpus"]["H100"]["fits"] is True
    assert plan["model"] == "tiny-E8"
    assert all(plan[f"resume_{name}"] > 0 for name in ("opens", "read_gb", "exchanged_gb", "host_gb"))
    assert main([*command, "--set", "model.depth=6", "routing.num_experts=4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "custom-E4"
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("resume ") for line in lines)
    assert any(line.startswith("verdict") for line in lines) and max(map(len, lines)) <= 120


def test_memory_of_a_text_model_includes_its_features_and_null_condition():
    """Tokens that are twice as many take more activations; all else is the same but for the null condition, fp32."""
    short, long = (
        layout("model.name=tiny-E8", "model.conditioning=text", f"model.text_encoders=[[{tokens},12,8]]")
        for tokens in (8, 16)
    )
    passes = Passes(saved=0, temporary=0, operators=0)
    assert step_memory(long, passes).weights - step_memory(short, passes).weights == 4 * 8 * 12
    rows_bytes = 2 * 2 * 8 * 12
    assert estimate_passes(long).saved - estimate_passes(short).saved > rows_bytes


def test_what_a_training_set_would_decide_is_assumed_and_said(capsys):
    command = ["plan", "--model", "tiny-E8", "--world", "2", "--micro-batch", "2"]
    text = ["--set", "model.conditioning=text"]
    assert main([*command, *text, "--simulate", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["assumed"] == {"model.text_encoders": [[77, 768, 768]]} and plan["text_encoders"] == [[77, 768, 768]]
    assert main([*command, *text]) == 0
    page = capsys.readouterr().out
    assert "assumed       model.text_encoders=[[77, 768, 768]]; a run takes these from the training" in page
    assert "text          77 tokens of width 768, pooled 768\n" in page
    assert main([*command, *text, "model.text_encoders=[[8,12,8]]", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["assumed"] == {} and plan["text_encoders"] == [[8, 12, 8]]
    assert main([*command, "--set", "model.num_classes=auto"]) == 0
    assert "model.num_classes=1000; a run takes these from the training set" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (["--model", "L-E9"], "--model: 'L-E9' is not known; did you mean 'L-E8'?"),
        (["--gpu", "H1000"], "did you mean 'H100'"),
        (["--world", "0"], "--world must be positive"),
        (["--world", "1024"], "train_batch_size must be a multiple of the 1024 GPUs, got 256"),
        (["--world", "6", "--micro-batch", "1", "--ep", "4"], "autoep_size must divide"),
        (["--deepspeed_config", "nowhere.json"], "nowhere.json: cannot be read"),
    ),
)
def test_mistakes_are_one_sentence(capsys, arguments, message):
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
