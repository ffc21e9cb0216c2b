"""Parameter counts of a model: total, and activated per token."""

from __future__ import annotations

from dataclasses import dataclass

from diffmoe_ds.config.schema import Config
from diffmoe_ds.model.dit import empty_model


@dataclass(frozen=True)
class ParameterCounts:
    """Parameter counts of a model."""

    total: int
    """All trained weights, including all experts, routers and capacity predictors."""
    activated: int
    """Weights that an average token uses: C of E experts and everything dense (DiffMoE, eq. 40)."""
    experts: int
    """Weights of all experts of all layers."""
    routers: int
    """Weights of all routers and capacity predictors."""
    ffn: int
    """Weights of all FFNs: dense ones, shared experts and routed experts."""

    @property
    def touched(self) -> int:
        """Weights that an average token's training step computes with: the activated ones, routers and predictors."""
        return self.activated + self.routers


def count_parameters(config: Config) -> ParameterCounts:
    """Count the parameters of a model without allocating it.

    Args:
        config: the run's configuration.
    """
    model = empty_model(config)
    total = sum(p.numel() for p in model.parameters())
    layers = model.moe_layers().values()
    experts = sum(p.numel() for layer in layers for p in layer.experts.parameters())
    routers = sum(layer.gate_weight.numel() for layer in layers)
    routers += sum(
        p.numel() for layer in layers if layer.capacity_predictor for p in layer.capacity_predictor.parameters()
    )
    ffn = sum(p.numel() for name, p in model.named_parameters() if ".mlp." in name and name.startswith("blocks."))
    idle = experts * (1 - config.routing.capacity / config.num_experts)
    return ParameterCounts(total, round(total - routers - idle), experts, routers, ffn - routers)
