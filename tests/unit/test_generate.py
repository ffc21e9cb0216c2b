"""Generation with a model: guidance in one batch, precision, expert placement, synchronizations, and previews."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from diffmoe_ds.cli.sampling_options import check_sharded_sampler
from diffmoe_ds.cli.sampling_plan import default_dtype, place_experts
from diffmoe_ds.config.load import config_from_dict
from diffmoe_ds.config.schema import Config
from diffmoe_ds.diffusion.objective import SAMPLERS, make_objective
from diffmoe_ds.distributed.launch import Launch
from diffmoe_ds.errors import ConfigError, TopologyError
from diffmoe_ds.model.dit import DiT, allocate, empty_model
from diffmoe_ds.moe import expert_ffn, top_k
from diffmoe_ds.moe.plan import LocalDispatcher
from diffmoe_ds.sampling.generate import SamplingSettings, generate
from diffmoe_ds.sampling.labels import cycle_labels
from diffmoe_ds.sampling.samplers import ADAPTIVE, STOCHASTIC
from diffmoe_ds.training import averaged, preview
from diffmoe_ds.training.plan import check_adaptive_previews
from tests.helpers.syncs import SyncCounter


def config_of(kind: str, objective: str = "flow", **model: object) -> Config:
    tree = {
        "model": {"name": "nano-E4", "patch_size": 8, "num_classes": 1000, **model},
        "routing": {"kind": kind},
        "objective": {"kind": objective},
    }
    return config_from_dict(tree, "a test")


@torch.no_grad()
def model_of(config: Config, dtype: torch.dtype = torch.float32) -> DiT:
    """Return a model whose weights are all random: `init_weights` would zero its output."""
    torch.manual_seed(0)
    model = allocate(empty_model(config), "cpu", dtype)
    model.reset_positions()
    for parameter in model.parameters():
        parameter.copy_(0.1 * torch.randn(parameter.shape))
    for layer in model.moe_layers().values():
        if layer.capacity_predictor is not None:
            layer.expert_threshold.fill_(0.5)
    return model.eval()


def images_of(
    model: DiT, sampler: str = "euler", steps: int = 2, cfg_scale: float = 2.0, **settings: object
) -> torch.Tensor:
    seeds = range(3)
    labels = cycle_labels(seeds, range(model.config.model.num_classes))
    return generate(model, labels, seeds, SamplingSettings(sampler, steps, cfg_scale, **settings))


RULES = [
    ("dense", "static", False),
    ("token_choice", "static", False),
    ("expert_choice", "static", False),
    ("expert_choice", "dynamic", False),
    ("batch_pool", "per_token", False),
    ("batch_pool", "dynamic", True),
    ("batch_pool", "static", True),
]


@pytest.mark.parametrize(("kind", "rule", "compete"), RULES)
def test_guidance_takes_one_forward_pass_where_images_do_not_compete(monkeypatch, kind, rule, compete):
    model, sizes = model_of(config_of(kind)), []
    model.set_inference(rule)
    assert model.images_compete is compete
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    images = images_of(model, steps=1)
    assert sizes == ([3, 3] if compete else [6])
    monkeypatch.setattr(DiT, "images_compete", True)
    torch.testing.assert_close(images, images_of(model, steps=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rule", "predicts"), (("static", False), ("dynamic", True), ("per_token", True)))
def test_capacities_are_predicted_only_for_rules_that_need_them(rule, predicts):
    model, calls = model_of(config_of("batch_pool")), []
    model.set_inference(rule)
    for layer in model.moe_layers().values():
        layer.capacity_predictor[0].register_forward_hook(lambda *_: calls.append(1))
    images_of(model, steps=1)
    assert bool(calls) is predicts


def test_bf16_keeps_positions_thresholds_and_the_samplers_state_in_fp32():
    config = config_of("batch_pool")
    exact, rough = images_of(model_of(config)), images_of(model_of(config, torch.bfloat16))
    model = model_of(config, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in model.buffers()} == {torch.float32}
    assert rough.dtype == torch.float32 and not torch.equal(rough, rough.bfloat16().float())
    assert not torch.equal(exact, rough) and (exact - rough).abs().mean() < 0.05 * exact.abs().mean()
    assert default_dtype(torch.device("cpu")) == torch.float32


@pytest.mark.parametrize("interval", (None, (0.3, 0.7)))
@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name not in ADAPTIVE])
def test_no_step_waits_for_the_device(sampler, interval):
    """More steps cause no further synchronizations; a stochastic step copies its noise from the host."""
    model = model_of(config_of("dense", SAMPLERS[sampler]))
    counts = {}
    for steps in (2, 5):
        with SyncCounter() as counter:
            images_of(model, sampler, steps, guidance_interval=interval)
        counts[steps] = counter.counts
    more = counts[5] - counts[2]
    assert more == ({"tensor from the host": 3} if sampler in STOCHASTIC else {})


@pytest.mark.parametrize(("kind", "rule", "compete"), RULES[1:])
def test_no_layer_waits_for_the_device_where_products_are_grouped(monkeypatch, kind, rule, compete):
    """As in bf16 on a GPU; the images are those of exact counts, also where the assumed bound is too low."""
    model = model_of(config_of(kind))
    model.set_inference(rule)
    expected = images_of(model)
    monkeypatch.setattr(expert_ffn, "GROUPED", {("cpu", torch.float32)})
    monkeypatch.setattr(top_k, "_local_kth_key", top_k.sorted_kth_key)  # the CPU's selection reads each K
    model.assumed_capacities = 4.0
    for steps in (5, 2):
        with SyncCounter() as counter:
            images = images_of(model, steps=steps)
        counter.counts.pop("tensor from the host")  # copied without waiting
        assert counter.counts == {"__bool__": 1}, "rows lost or not, after the last step"
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)
    redone = []
    model.assumed_capacities = 0.1
    monkeypatch.setattr(LocalDispatcher, "count", counting(LocalDispatcher.count, redone))
    torch.testing.assert_close(images_of(model), expected, rtol=1e-4, atol=1e-4)
    assert (redone and model.assumed_capacities == 0.2) or rule == "static"


def counting(function: Callable[..., object], calls: list[str]) -> Callable[..., object]:
    """Return a function that also notes its calls."""

    def counted(*arguments: object) -> object:
        calls.append(function.__name__)
        return function(*arguments)

    return counted


def test_the_counter_counts():
    x = torch.arange(4.0)
    with torch.inference_mode(), SyncCounter() as counter:
        assert x[0].item() == 0 and bool(x[1] > 0) and x.tolist()
        x[x > 2], x.nonzero(), torch.tensor([1.0])
    assert counter.counts == {"item": 1, "__bool__": 1, "tolist": 1, "nonzero": 2, "tensor from the host": 1}


def test_experts_are_split_over_as_many_ranks_as_possible():
    def place(choice: str, world: int, num_experts: int) -> tuple[int, int]:
        topology = place_experts(choice, Launch(world - 1, world, 0, 1, "a test"), num_experts)
        return topology.ep_size, topology.first_expert

    assert place("gathered", 4, 8) == (1, 0)
    assert place("sharded", 4, 8) == (4, 6) and place("sharded", 12, 8) == (4, 6) and place("sharded", 32, 8) == (8, 7)
    assert place("sharded", 1, 8) == (1, 0) and place("sharded", 4, 1) == (1, 0)
    with pytest.raises(TopologyError, match="common divisor with the 8 experts, got 3; use 8 ranks"):
        place("sharded", 3, 8)


def test_a_sampler_of_adaptive_steps_is_refused_where_ranks_must_stay_in_step():
    settings, shown = SamplingSettings("dopri5", 1), {"sampler": "dopri5"}
    check_sharded_sampler(settings, ep_size=1)
    check_sharded_sampler(SamplingSettings("heun", 1), ep_size=2)
    with pytest.raises(ConfigError, match="--sampler dopri5 needs --experts gathered"):
        check_sharded_sampler(settings, ep_size=2)

    def config(**routing: object) -> Config:
        run = {"sample_every_images": 64}
        return config_from_dict({"routing": {"kind": "batch_pool", **routing}, "sample": shown, "run": run}, "a test")

    check_adaptive_previews(config(), ep_size=1, world=2)
    check_adaptive_previews(config(capacity_predictor=False), ep_size=1, world=1)
    online = config().model_copy(update={"run": config().run.model_copy(update={"sample_every_images": 0})})
    check_adaptive_previews(online, ep_size=2, world=2)
    online = online.model_copy(update={"eval": online.eval.model_copy(update={"metrics": ("frechet",)})})
    with pytest.raises(ConfigError, match=r"sample\.sampler dopri5 .* use heun"):
        check_adaptive_previews(online, ep_size=2, world=2)
    for routing, ep_size in (({}, 2), ({"capacity_predictor": False}, 1)):
        with pytest.raises(ConfigError, match=r"sample\.sampler dopri5 .* use heun"):
            check_adaptive_previews(config(**routing), ep_size, world=2)


def test_nothing_of_a_preview_stays_alive(monkeypatch):
    """A grid's model is in the dtype of training and is freed by its reference count, without the garbage collector."""
    config, built = config_of("batch_pool", in_channels=1), []

    def build_model(config, topology, device, dtype):
        model = model_of(config, dtype)
        built.extend(weakref.ref(tensor) for tensor in (model, *model.parameters(), *model.buffers()))
        assert dtype == torch.bfloat16
        return model

    monkeypatch.setattr(averaged, "build_model", build_model)
    monkeypatch.setattr(preview, "all_gather", lambda images: [images])
    run = SimpleNamespace(
        config=config,
        class_names=None,
        prompts=None,
        topology=SimpleNamespace(rank=0, world=1),
        device=torch.device("cpu"),
        objective=make_objective("flow"),
        model=model_of(config, torch.bfloat16),
        ema=SimpleNamespace(copy_to=lambda model, trained: None),
        is_main=True,
    )
    shown = preview.Preview(run, SimpleNamespace(alive=lambda: None))
    gc.collect()
    gc.disable()
    try:
        assert shown.generate() is not None
        assert built and all(reference() is None for reference in built)
    finally:
        gc.enable()
