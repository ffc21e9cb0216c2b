"""Recipes of routers: which combinations load, which are refused, and what follows from them."""

from __future__ import annotations

import pytest

from diffmoe_ds.config.load import load_config, recipes
from diffmoe_ds.config.routing import AUXILIARY, ROUTER_OPTIONS, RoutingConfig
from diffmoe_ds.config.schema import Config
from diffmoe_ds.errors import ConfigError

TOKEN_CHOICE = "kind=token_choice"


def load(*routing: str, model: tuple[str, ...] = ()) -> Config:
    """The default recipe, with 8 experts and 4 blocks, and these keys of its sections."""
    return load_config("fashion", [f"routing.{key}" for key in routing] + [f"model.{key}" for key in model])


@pytest.mark.parametrize(
    ("overrides", "message"),
    (
        (
            ("kind=batch_pool", "groups=2"),
            r"routing\.groups must be unset for the router batch_pool, got 2; only token_choice has it\.$",
        ),
        (
            ("kind=expert_choice", "groups=4", "bias_rate=0.1"),
            r"routing\.groups must be unset for the router expert_choice, got 4; only token_choice has it\.$",
        ),
        (
            ("kind=expert_choice", "bias_rate=0.001"),
            r"routing\.bias_rate must be unset for the router expert_choice, got 0\.001; only token_choice has it\.$",
        ),
        (
            ("kind=batch_pool", "bias_rate=0"),
            r"routing\.bias_rate must be unset for the router batch_pool, got 0; only token_choice has it\.$",
        ),
        (
            ("kind=expert_race", "groups=2"),
            r"routing\.groups must be unset for the router expert_race, got 2; only token_choice has it\.$",
        ),
        (
            (TOKEN_CHOICE, "groups=3"),
            r"routing\.groups must divide the 8 experts into groups of two or more, got 3\.$",
        ),
        (
            (TOKEN_CHOICE, "groups=8", "groups_kept=4"),
            r"routing\.groups must divide the 8 experts into groups of two or more, got 8\.$",
        ),
        (
            (TOKEN_CHOICE, "groups=16"),
            r"routing\.groups must divide the 8 experts into groups of two or more, got 16\.$",
        ),
        (
            (TOKEN_CHOICE, "groups=4", "groups_kept=5"),
            r"routing\.groups_kept must be at most routing\.groups \(4\) and leave enough experts for "
            r"routing\.capacity \(1\), got 5\.$",
        ),
        (
            (TOKEN_CHOICE, "groups=4", "groups_kept=1", "capacity=3"),
            r"routing\.groups_kept must be at most routing\.groups \(4\) and leave enough experts for "
            r"routing\.capacity \(3\), got 1\.$",
        ),
        (
            (TOKEN_CHOICE, "renormalize=true", "score=identity"),
            r"routing\.score must be softmax or sigmoid for routing\.renormalize, got identity\.$",
        ),
        (
            ("kind=expert_race", "unconditional_expert=true"),
            r"routing\.unconditional_expert needs routing\.kind token_choice, .* got expert_race\.$",
        ),
        (
            ("kind=batch_pool", "unconditional_expert=true"),
            r"routing\.unconditional_expert needs routing\.kind token_choice, or expert_choice with "
            r"routing\.capacity_predictor false; got batch_pool with a capacity predictor\.$",
        ),
        (
            ("kind=batch_pool", "unconditional_expert=true", "capacity_predictor=false"),
            r"routing\.unconditional_expert needs routing\.kind token_choice, .* got batch_pool\.$",
        ),
        (
            ("kind=expert_choice", "unconditional_expert=true"),
            r"routing\.unconditional_expert needs .*routing\.capacity_predictor false; got expert_choice with a .*$",
        ),
    ),
)
def test_keys_that_do_not_fit_the_router_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load(*overrides)


@pytest.mark.parametrize(
    ("overrides", "model", "message"),
    (
        (
            (),
            ("positions=rope", "hidden_size=24", "num_heads=4"),
            r"model\.positions rope needs a head width divisible by 4, got 6; change model\.num_heads\.$",
        ),
        (
            ("kind=dense",),
            ("positions=rope", "hidden_size=8", "num_heads=8"),
            r"model\.positions rope needs a head width divisible by 4, got 1; change model\.num_heads\.$",
        ),
        (
            (),
            ("mlp=silu",),
            r"routing\.expert_mlp must be gelu or swiglu if model\.mlp is silu, which experts cannot be\.$",
        ),
        (
            (TOKEN_CHOICE, "unconditional_expert=true"),
            ("label_dropout=0",),
            r"model\.label_dropout must be positive for routing\.unconditional_expert, which takes the images whose "
            r"label is dropped, got 0\.$",
        ),
    ),
)
def test_layers_that_do_not_fit_each_other_are_refused(overrides, model, message):
    with pytest.raises(ConfigError, match=message):
        load(*overrides, model=model)


@pytest.mark.parametrize("key", ("groups", "groups_kept"))
def test_there_is_at_least_one_group(key):
    with pytest.raises(ConfigError, match=rf"routing\.{key} must be .*, got 0"):
        load(TOKEN_CHOICE, f"{key}=0")


@pytest.mark.parametrize(
    ("overrides", "model"),
    (
        ((TOKEN_CHOICE, "groups=4"), ()),
        ((TOKEN_CHOICE, "groups=4", "groups_kept=4", "capacity=8"), ()),
        ((TOKEN_CHOICE, "groups=8"), ()),  # all are kept, so their worth does not matter
        ((TOKEN_CHOICE, "groups=4", "groups_kept=1", "capacity=2"), ()),
        ((TOKEN_CHOICE, "groups=2", "groups_kept=1", "capacity=4", "bias_rate=0.001", "score=sigmoid"), ()),
        ((TOKEN_CHOICE, "bias_rate=0"), ()),
        ((TOKEN_CHOICE, "unconditional_expert=true", "affinity=cosine", "score=identity"), ()),
        (("kind=expert_choice", "unconditional_expert=true", "capacity_predictor=false"), ("label_dropout=0.2",)),
        (("kind=batch_pool", "groups=1"), ("label_dropout=0",)),
        ((), ("positions=rope", "qk_norm=rms", "norm=rms")),
        (("expert_mlp=swiglu",), ("mlp=silu",)),
        (("expert_mlp=gelu", "shared_experts=1"), ("mlp=silu",)),
        (("kind=dense",), ("mlp=silu",)),
        (("kind=dense", "groups=3", "bias_rate=1", "groups_kept=5"), ()),  # without experts, they have no effect
        ((TOKEN_CHOICE, "num_experts=1", "groups=2"), ()),
    ),
)
def test_combinations_that_fit_load(overrides, model):
    routing = load(*overrides, model=model).routing
    for override in overrides:
        key, _, value = override.partition("=")
        assert str(getattr(routing, key)).lower() in (value, f"{value}.0")


@pytest.mark.parametrize(
    ("overrides", "depth", "blocks"),
    (
        ((), 6, (1, 3, 5)),
        ((), 5, (1, 3)),
        (("interleave=false",), 4, (0, 1, 2, 3)),
        (("dense_blocks=1",), 6, (1, 3, 5)),
        (("dense_blocks=2",), 6, (3, 5)),
        (("dense_blocks=3",), 6, (3, 5)),
        (("interleave=false", "dense_blocks=2"), 5, (2, 3, 4)),
        ((), 1, ()),
        (("num_experts=1",), 6, ()),
        (("kind=dense", "interleave=false"), 6, ()),
    ),
)
def test_blocks_with_experts(overrides, depth, blocks):
    assert load(*overrides, model=(f"depth={depth}",)).moe_blocks == blocks


@pytest.mark.parametrize(
    ("overrides", "expert", "shared"),
    (
        ((), 256, 0),  # a token has a width of 128, and the FFN twice that
        (("shared_experts=1",), 256, 256),
        (("shared_experts=3",), 256, 768),
        (("expert_width=96",), 96, 0),
        (("expert_width=96", "shared_experts=2"), 96, 192),
        (("shared_experts=2", "shared_width=40"), 256, 80),
        (("expert_width=96", "shared_experts=2", "shared_width=40"), 96, 80),
        (("shared_width=40",), 256, 0),
    ),
)
def test_hidden_widths_of_experts(overrides, expert, shared):
    config = load(*overrides)
    assert (config.expert_hidden, config.shared_hidden, config.ffn_hidden) == (expert, shared, 256)


def test_experts_have_the_type_of_the_ffn_by_default():
    assert load().expert_mlp == "gelu" and load(model=("mlp=swiglu",)).expert_mlp == "swiglu"
    assert load("expert_mlp=swiglu").expert_mlp == "swiglu"
    assert load("expert_mlp=gelu", model=("mlp=silu",)).expert_mlp == "gelu"


@pytest.mark.parametrize(
    ("overrides", "options"),
    (
        ((), ()),
        ((TOKEN_CHOICE,), ()),  # kinds are not options
        ((TOKEN_CHOICE, "bias_rate=0"), ("bias_rate 0.0",)),
        (
            (TOKEN_CHOICE, "score=sigmoid", "groups=4", "groups_kept=2", "renormalize=true", "weight_scale=2.5"),
            ("score sigmoid", "renormalize True", "weight_scale 2.5", "groups 4", "groups_kept 2"),
        ),
        (
            ("dense_blocks=1", "shared_experts=2", "router_input=time", "affinity=cosine"),
            ("affinity cosine", "router_input time", "shared_experts 2", "dense_blocks 1"),
        ),
        (("affinity=linear", "groups=1"), ()),
        ((TOKEN_CHOICE, "unconditional_expert=true"), ("unconditional_expert True",)),
        (("kind=dense", "affinity=cosine"), ()),
    ),
)
def test_router_options_are_the_keys_that_differ(overrides, options):
    assert load(*overrides).router_options == options


def test_router_options_and_losses_are_keys():
    fields = RoutingConfig.model_fields
    assert set(ROUTER_OPTIONS) <= set(fields) and len(set(ROUTER_OPTIONS)) == len(ROUTER_OPTIONS)
    weights = {key for key in fields if key.endswith("_weight")} - {"capacity_weight"}
    assert weights == {f"{loss}_weight" for loss in AUXILIARY}


@pytest.mark.parametrize(
    ("overrides", "names"),
    (
        ((), ()),
        ((TOKEN_CHOICE,), ("balance",)),
        ((TOKEN_CHOICE, "balance_weight=0"), ()),
        ((TOKEN_CHOICE, "similarity_weight=1e-4", "z_weight=1e-3"), ("balance", "z", "similarity")),
        (("kind=expert_choice", "contrastive_weight=1", "balance_weight=1"), ("contrastive",)),
        (("kind=batch_pool", "orthogonality_weight=0.1"), ("orthogonality",)),
        (("kind=dense", "z_weight=1"), ()),
    ),
)
def test_auxiliary_losses_of_a_router(overrides, names):
    assert load(*overrides).auxiliary_losses == names


def test_the_unconditional_expert_takes_the_dropped_labels():
    dropped = ("label_dropout=0.25",)
    assert load(TOKEN_CHOICE, "unconditional_expert=true", model=dropped).null_fraction == 0.25
    assert load(TOKEN_CHOICE, model=dropped).null_fraction == 0
    dense = load("kind=dense", "unconditional_expert=true", model=("label_dropout=0",))
    assert dense.null_fraction == 0, "a dense model has none"


@pytest.mark.parametrize("name", sorted(recipes()))
def test_routers_of_packaged_recipes_are_consistent(name):
    config = load_config(name)
    routing, experts = config.routing, config.num_experts
    assert (experts == 1) == (not config.moe_blocks)
    assert routing.capacity <= experts and experts % routing.groups == 0
    assert all(0 <= block < config.size.depth for block in config.moe_blocks)


def test_some_block_has_experts():
    for interleave, most in (("true", 3), ("false", 3)):
        load(TOKEN_CHOICE, f"interleave={interleave}", f"dense_blocks={most}", model=("depth=4",))
        with pytest.raises(ConfigError, match=r"routing\.dense_blocks must leave .* be at most 3, got 4\.$"):
            load(TOKEN_CHOICE, f"interleave={interleave}", "dense_blocks=4", model=("depth=4",))


@pytest.mark.parametrize(
    ("overrides", "unused"),
    (
        ((TOKEN_CHOICE,), ()),
        ((TOKEN_CHOICE, "groups_kept=1"), ("groups_kept",)),
        ((TOKEN_CHOICE, "shared_width=64"), ("shared_width",)),
        ((TOKEN_CHOICE, "shared_width=64", "shared_experts=1"), ()),
        ((TOKEN_CHOICE, "renormalize=true"), ("renormalize",)),
        ((TOKEN_CHOICE, "contrastive_temperature=0.1"), ("contrastive_temperature",)),
        (("kind=race", "balance_weight=0.1"), ("balance_weight",)),
        (("kind=race", "balance_weight=0"), ()),
        (("kind=dense", "affinity=cosine", "groups=3", "z_weight=1"), ("affinity", "groups", "z_weight")),
    ),
)
def test_keys_without_effect(overrides, unused):
    assert load(*overrides).unused_routing == unused
