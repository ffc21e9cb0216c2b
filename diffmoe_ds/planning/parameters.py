"""Parameter counts of a model: total, and activated per token."""

from __future__ import annotations

from dataclasses import dataclass

from diffmoe_ds.config.schema import Config
from diffmoe_ds.model.dit import empty_model


@dataclass(frozen=True)
class ParameterCounts:
    """Parameter counts of a model."""

    total: int
    """All trained weights, including all experts, routers, capacity predictors and heads of the per-layer loss."""
    activated: int
    """Weights that an average token uses: C of E experts and everything dense (DiffMoE, eq. 40)."""
    experts: int
    """Weights of all experts of all layers."""
    routers: int
    """Weights of all routers, capacity predictors and heads of the per-layer loss."""
    ffn: int
    """Weights of all FFNs: dense ones, shared experts and routed experts."""

    projector: int
    """Weights of REPA's projector, which only training uses."""

    @property
    def touched(self) -> int:
        """Weights that an average token's training step computes with: those activated and what training adds."""
        return self.activated + self.routers + self.projector


def count_parameters(config: Config) -> ParameterCounts:
    """Count the parameters of a model without allocating it.

    Args:
        config: the run's configuration.
    """
    model = empty_model(config)
    total = sum(p.numel() for p in model.parameters())
    layers = model.moe_layers().values()
    experts = sum(p.numel() for layer in layers for p in layer.experts.parameters())
    parts = (".mlp.gate_", ".mlp.capacity_predictor.", ".mlp.target_head.")
    routers = sum(p.numel() for name, p in model.named_parameters() if any(part in name for part in parts))
    ffn = sum(p.numel() for name, p in model.named_parameters() if ".mlp." in name and name.startswith("blocks."))
    projector = sum(p.numel() for p in model.repa_projector.parameters()) if model.repa_projector else 0
    idle = experts * (1 - config.routing.capacity / config.num_experts)
    idle += sum(
        p.numel() for layer in layers if layer.unconditional_expert for p in layer.unconditional_expert.parameters()
    )
    return ParameterCounts(total, round(total - routers - projector - idle), experts, routers, ffn - routers, projector)
