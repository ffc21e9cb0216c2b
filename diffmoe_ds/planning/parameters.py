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
    idle = experts * (1 - config.routing.capacity / config.num_experts)
    return ParameterCounts(total, round(total - routers - idle), experts, routers)
