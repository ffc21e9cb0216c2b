"""The section `routing` of a recipe: which tokens go to which expert, and with which weight.

The string below a field documents it; see `sections`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator

from diffmoe_ds.config.fields import (
    Count,
    Dimension,
    Flag,
    Fraction,
    NonNegativeNumber,
    PositiveInteger,
    PositiveNumber,
    Section,
    Slack,
    SmallInteger,
    router,
)

RoutingKind = Annotated[
    Literal["dense", "token_choice", "expert_choice", "batch_pool", "expert_race"], BeforeValidator(router)
]
PoolScope = Literal["rank", "ep", "world"]
AUXILIARY = ("balance", "z", "orthogonality", "contrastive", "similarity", "per_layer")
"""Auxiliary losses of the MoE layers; the key of each one's weight is its name with `_weight`."""
ROUTER_OPTIONS = (
    "affinity", "score", "router_input", "renormalize", "weight_scale", "groups", "groups_kept", "bias_rate",
    "unconditional_expert", "shared_experts", "dense_blocks",
)  # fmt: skip
"""Keys by which routers of one kind differ."""


class RoutingConfig(Section):
    """Which tokens go to which expert, and with which weight."""

    kind: RoutingKind = "batch_pool"
    """Who chooses: in `token_choice` (TC-DiT, also ProMoE and DSMoE), a token its best experts; in `expert_choice`
    (EC-DiT), an expert its best tokens of an image; in `batch_pool` (DiffMoE), an expert its best tokens of a pool; in
    `expert_race`, all pairs of a token and an expert of a pool compete with each other. `dense` has no experts. The
    short names `diffmoe`, `ec`, `race` and `tc` are also valid."""
    pool: PoolScope = "world"
    """Tokens that compete under `batch_pool` and `expert_race`: those of one micro-batch on this rank (`rank`), in its
    expert-parallel group (`ep`) or on all ranks (`world`)."""
    pool_images: PositiveInteger | None = None
    """Split the `batch_pool` pool into pools of this many consecutive images in training; by default it is not split.
    With 1, experts choose tokens within each image, as in `expert_choice`. Must divide the micro-batch size, or be a
    multiple of it that divides the number of images in the pool. Thresholds still track the whole pool."""
    num_experts: Count | None = None
    """Number of experts E per MoE layer; defaults to that of the named model."""
    capacity: PositiveNumber = 1.0
    """Capacity C, the average number of experts per token; at most E, and an integer for `token_choice`."""
    interleave: Flag = True
    """Use experts in every second block only (1, 3, ...); `false` uses them in every block."""
    dense_blocks: SmallInteger = 0
    """Number of first blocks that have no experts."""
    expert_mlp: Literal["gelu", "swiglu"] | None = None
    """Type of the experts, shared ones included; defaults to `model.mlp`."""
    expert_width: Dimension | None = None
    """Hidden width H of an expert; defaults to that of an FFN."""
    shared_experts: SmallInteger = 0
    """Number of shared experts, applied to every token in addition to the routed ones; implemented as one wider FFN."""
    shared_width: Dimension | None = None
    """Hidden width of a shared expert; defaults to that of a routed one."""
    unconditional_expert: Flag = False
    """Add an expert that takes all tokens of images whose label or prompt is dropped, and no others, with a weight of 1
    (ProMoE, arXiv 2510.24711). Every rank holds it. Needs `token_choice`, or `expert_choice` without capacity
    predictor."""
    affinity: Literal["linear", "cosine", "mlp"] = "linear"
    """Logits of the router: a product of tokens and weights (`linear`), the cosine of the angle between a token and the
    prototype of each expert (`cosine`, ProMoE), or a network with a hidden layer, GELU and biases (`mlp`, Expert
    Race)."""
    score: Literal["softmax", "sigmoid", "identity"] = "softmax"
    """Function that turns logits into scores, by which tokens are chosen and outputs weighted: `softmax` over experts;
    `sigmoid` (DeepSeek-V3, arXiv 2412.19437; DSMoE, arXiv 2512.01252); or `identity` (ProMoE and Expert Race), with
    which weights can be negative."""
    router_input: Literal["modulated", "time"] = "modulated"
    """What the router reads: the same tokens as the experts (`modulated`), or tokens before the modulation by adaLN
    with the time embedding appended (`time`; Nucleus-Image, arXiv 2604.12163), so that magnitudes do not depend on the
    noise level."""
    renormalize: Flag = False
    """Divide the weights of a token's experts by their sum (DeepSeek-V3). No effect on a `token_choice` router with a
    capacity of 1, where a weight would always be 1."""
    weight_scale: PositiveNumber = 1.0
    """Factor of the weights."""
    groups: Count = 1
    """Divide the experts of a `token_choice` router into this many groups of consecutive experts, of which a token uses
    `groups_kept` (DeepSeek-V3, DSMoE). A group is worth the sum of its two largest scores."""
    groups_kept: Count | None = None
    """Groups that a token may use; defaults to all."""
    bias_rate: NonNegativeNumber | None = None
    """Add a bias to the scores of a `token_choice` router when experts are chosen, but not to weights, and after each
    optimizer step raise that of experts with less than the mean load over all ranks by this much, and lower that of
    experts with more (arXiv 2408.15664; DeepSeek-V3 uses 0.001). 0 keeps biases at their values, as DSMoE's code
    does; unset, there is none."""
    capacity_predictor: Flag = True
    """Train the capacity predictor, which sampling with `dynamic` or `per_token` routing needs. Only `expert_choice`
    and `batch_pool` have one."""
    capacity_weight: NonNegativeNumber = 1.0
    """Weight of the capacity predictor's loss. Its input is detached, so this scales only its own gradient."""
    balance_weight: NonNegativeNumber = 0.01
    """Weight of the load-balance loss of `token_choice` (arXiv 2101.03961)."""
    z_weight: NonNegativeNumber = 0.0
    """Weight of the mean square of the logits' logsumexp, which keeps logits small (z-loss, arXiv 2202.08906)."""
    orthogonality_weight: NonNegativeNumber = 0.0
    """Weight of the sum of squared cosines between the router's vectors of different experts, which keeps them apart
    (ERNIE 4.5)."""
    contrastive_weight: NonNegativeNumber = 0.0
    """Weight of ProMoE's routing contrastive loss, which pulls an expert's vector towards the mean of its tokens and
    away from those of other experts. Means are those of the pool; of each image, for `expert_choice`."""
    contrastive_temperature: PositiveNumber = 0.07
    """Temperature of the routing contrastive loss."""
    similarity_weight: NonNegativeNumber = 0.0
    """Weight of Expert Race's router similarity loss (arXiv 2503.16057), which balances experts and pairs of them; the
    paper uses 1e-4."""
    per_layer_weight: NonNegativeNumber = 0.0
    """Weight of Expert Race's per-layer regularization: in each MoE layer, a linear head predicts the model's target
    from what the last layer of the router reads, with the mean squared error as its loss. The paper uses 1e-2. With
    0, there are no heads; sampling never uses them."""
    threshold_decay: Fraction = 0.95
    """Decay per optimizer step of the moving average that sets the thresholds of `dynamic` and `per_token` routing."""
    padded_dispatch: Slack | None = None
    """Slots that every rank sends to each expert in training, as a multiple of the expected number of tokens; unused
    ones are padding. It avoids waiting for the GPU in every layer to learn the exact number; 1.25 is a good start. It
    affects `token_choice` and pools that span several ranks, and pays on GPUs. If a rank has more tokens for an expert,
    all ranks repeat the forward pass with exact numbers; see `redone` in the metrics."""

    @property
    def used_groups(self) -> int:
        """Groups that a token may use."""
        return self.groups if self.groups_kept is None else self.groups_kept
