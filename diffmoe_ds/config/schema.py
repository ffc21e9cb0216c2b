"""The configuration of a run, `Config`: what a recipe and ``--set`` resolve to.

`sections` documents every key, `fields` the types. Batch sizes, precision, ZeRO and the expert-parallel size are not
here: they come from the DeepSpeed JSON (`diffmoe_ds.config.deepspeed`), where DeepSpeed users look for them.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from diffmoe_ds.config.checks import (
    check_aligned_block,
    check_blocks,
    check_captions,
    check_experts,
    check_no_text,
    check_router,
    check_shapes,
)
from diffmoe_ds.config.fields import Mapping, Section
from diffmoe_ds.config.presets import SIZES, Size, parse_name
from diffmoe_ds.config.routing import AUXILIARY, ROUTER_OPTIONS, PoolScope, RoutingConfig, RoutingKind
from diffmoe_ds.config.sections import (
    CheckpointConfig,
    DataConfig,
    EMAConfig,
    EvalConfig,
    ExpertParallelConfig,
    LossConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RunConfig,
    SampleConfig,
)
from diffmoe_ds.text_layout import EncoderShape, TextLayout

__all__ = [
    "INFERENCE_CHOICES",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EMAConfig",
    "EvalConfig",
    "ExpertParallelConfig",
    "LossConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PoolScope",
    "RoutingConfig",
    "RoutingKind",
    "RunConfig",
    "SampleConfig",
]

INFERENCE_CHOICES: dict[str, tuple[str, ...]] = {
    "dense": ("static",),
    "token_choice": ("static",),
    "expert_choice": ("static", "dynamic"),
    "batch_pool": ("per_token", "dynamic", "static"),
    "expert_race": ("per_token", "static"),
}
"""Inference rules of each router; the first is the default."""


class Config(Section):
    """The configuration of a run."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    """The diffusion transformer."""
    routing: RoutingConfig = Field(default_factory=RoutingConfig)
    """Which tokens go to which expert."""
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    """The diffusion process."""
    loss: LossConfig = Field(default_factory=LossConfig)
    """Additional losses."""
    data: DataConfig = Field(default_factory=DataConfig)
    """The training images."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """Values for `"auto"` in the optimizer section of the DeepSpeed JSON."""
    ema: EMAConfig = Field(default_factory=EMAConfig)
    """The averaged weights."""
    run: RunConfig = Field(default_factory=RunConfig)
    """Length and intervals."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """Writing and keeping checkpoints."""
    sample: SampleConfig = Field(default_factory=SampleConfig)
    """Sample grids during training."""
    eval: EvalConfig = Field(default_factory=EvalConfig)
    """Validation loss and metrics during training."""
    expert_parallel: ExpertParallelConfig = Field(default_factory=ExpertParallelConfig)
    """A cross-check of the DeepSpeed JSON."""
    deepspeed: Mapping = Field(default_factory=dict)
    """DeepSpeed configuration for runs without `--deepspeed_config`, in the format of the DeepSpeed JSON."""

    @model_validator(mode="after")
    def _check_across_fields(self) -> Config:
        """Run the checks that involve several fields."""
        check_shapes(self.model, self.routing, self.size, self.tokens_per_image, self.num_experts)
        check_experts(self.routing, self.num_experts, self.tokens_per_image)
        check_router(self.routing, self.num_experts, self.has_capacity_predictor)
        check_blocks(self.model, self.routing, self.size, self.num_experts)
        check_aligned_block(self.loss, self.size.depth)
        if not self.is_text:
            check_no_text(self.model, self.data, self.sample)
        check_captions(self.data)
        return self

    @property
    def size(self) -> Size:
        """Size of the transformer: the preset with the recipe's overrides."""
        named, model = parse_name(self.model.name)[0], self.model
        return Size(
            depth=named.depth if model.depth is None else model.depth,
            hidden_size=named.hidden_size if model.hidden_size is None else model.hidden_size,
            num_heads=named.num_heads if model.num_heads is None else model.num_heads,
            conditioning=named.conditioning if model.conditioning is None else model.conditioning,
        )

    @property
    def is_text(self) -> bool:
        """Whether images are generated from prompts; otherwise, from class labels."""
        return self.size.conditioning == "text"

    @property
    def text_layout(self) -> TextLayout:
        """Layout of the text features of a text model; its shapes must be known (`model.text_encoders`)."""
        assert self.is_text and self.model.text_encoders, "class models have no text features"
        return TextLayout(tuple(EncoderShape(*shape) for shape in self.model.text_encoders))

    @property
    def model_name(self) -> str:
        """What the model is: ``model.name``, or ``SIZE-E<experts>`` if other keys change the size or the experts, where
        SIZE is ``custom`` if no size in the table has this depth, width and number of heads."""
        named, experts = parse_name(self.model.name)
        if (self.size.shape, self.num_experts) == (named.shape, experts):
            return self.model.name
        size = next((name for name, size in SIZES.items() if size.shape == self.size.shape), "custom")
        return f"{size}-E{self.num_experts}"

    @property
    def num_experts(self) -> int:
        """Number of experts E per MoE layer; 1 for a dense model."""
        if self.routing.kind == "dense":
            return 1
        return parse_name(self.model.name)[1] if self.routing.num_experts is None else self.routing.num_experts

    @property
    def experts_kept(self) -> int:
        """Experts in the groups that a token may use."""
        return self.num_experts // self.routing.groups * self.routing.used_groups

    @property
    def moe_blocks(self) -> tuple[int, ...]:
        """Indices of the blocks with experts."""
        if self.num_experts == 1:
            return ()
        blocks = range(self.size.depth)[1::2] if self.routing.interleave else range(self.size.depth)
        return tuple(block for block in blocks if block >= self.routing.dense_blocks)

    @property
    def ffn_hidden(self) -> int:
        """Hidden width of the FFN of a block without experts."""
        return int(self.size.hidden_size * self.model.mlp_ratio)

    @property
    def expert_mlp(self) -> str:
        """Type of the experts, ``gelu`` or ``swiglu``."""
        return self.routing.expert_mlp or self.model.mlp

    @property
    def expert_hidden(self) -> int:
        """Hidden width H of an expert."""
        return self.routing.expert_width or self.ffn_hidden

    @property
    def shared_hidden(self) -> int:
        """Hidden width of all shared experts of a layer together; 0 without."""
        return self.routing.shared_experts * (self.routing.shared_width or self.expert_hidden)

    @property
    def inference_choices(self) -> tuple[str, ...]:
        """Routing choices at inference, the default first."""
        kind = self.routing.kind
        return INFERENCE_CHOICES[kind] if self.has_capacity_predictor or kind == "expert_race" else ("static",)

    @property
    def has_capacity_predictor(self) -> bool:
        """Whether the MoE layers have a capacity predictor."""
        return self.routing.kind in ("expert_choice", "batch_pool") and self.routing.capacity_predictor

    @property
    def router_options(self) -> tuple[str, ...]:
        """Keys of the router that are not at their defaults, with their values, for people."""
        routing, default = self.routing, RoutingConfig()
        changed = (key for key in ROUTER_OPTIONS if getattr(routing, key) != getattr(default, key))
        return tuple(f"{key} {getattr(routing, key)}" for key in changed) if self.num_experts > 1 else ()

    @property
    def unused_routing(self) -> tuple[str, ...]:
        """Keys of `routing` that differ from their defaults without an effect."""
        routing, default = self.routing, RoutingConfig()
        without_effect = {
            "groups_kept": routing.groups == 1,
            "shared_width": routing.shared_experts == 0,
            "balance_weight": routing.kind != "token_choice" and routing.balance_weight > 0,
            "contrastive_temperature": routing.contrastive_weight == 0,
            "renormalize": routing.kind == "token_choice" and routing.capacity == 1,
        }
        if self.num_experts == 1:
            without_effect |= dict.fromkeys((*ROUTER_OPTIONS, *(f"{name}_weight" for name in AUXILIARY)), True)
            without_effect["balance_weight"] = routing.balance_weight > 0
        changed = (key for key, unused in without_effect.items() if unused)
        return tuple(key for key in changed if getattr(routing, key) != getattr(default, key))

    @property
    def null_fraction(self) -> float:
        """Fraction of the training images whose tokens an expert of their own takes."""
        return self.model.label_dropout if self.has_unconditional_expert else 0.0

    @property
    def has_unconditional_expert(self) -> bool:
        """Whether images whose label or prompt is dropped have an expert of their own."""
        return self.num_experts > 1 and self.routing.unconditional_expert

    @property
    def auxiliary_losses(self) -> tuple[str, ...]:
        """Names, in `AUXILIARY`, of the losses that the MoE layers add."""
        if self.num_experts == 1:
            return ()
        names = AUXILIARY if self.routing.kind == "token_choice" else AUXILIARY[1:]  # only it has a balance loss
        return tuple(name for name in names if getattr(self.routing, f"{name}_weight"))

    @property
    def has_pool(self) -> bool:
        """Whether the tokens of several images, possibly on several ranks, compete in training."""
        return self.num_experts > 1 and self.routing.kind in ("batch_pool", "expert_race")

    @property
    def aligned_block(self) -> int | None:
        """Index of the block whose output is aligned with image features; None without REPA."""
        if not self.loss.repa_weight:
            return None
        return (self.loss.repa_block or max(1, self.size.depth // 3)) - 1

    @property
    def tokens_per_image(self) -> int:
        """Tokens S per image."""
        return (self.model.input_size // self.model.patch_size) ** 2
