"""DeepSpeed's own MoE layers, the opponents of ours.

This is the one place outside `diffmoe_ds/distributed/deepspeed_seam.py` that uses DeepSpeed's internals: only these
benchmarks build an AutoEP layer by hand.
"""

from __future__ import annotations

import torch
from torch import nn

from diffmoe_ds.distributed import deepspeed_seam as seam  # first: it chooses the accelerator
from diffmoe_ds.distributed.quiet import quiet_deepspeed
from diffmoe_ds.model.layers import Mlp

from deepspeed.module_inject.auto_ep_config import AutoEPConfig, MoELayerSpec  # isort: skip
from deepspeed.moe.layer import MoE  # isort: skip

quiet_deepspeed()


def native_moe(width: int, experts: int) -> nn.Module:
    """Return DeepSpeed's ``MoE`` with top-1 gating, capacity factor 1 and its defaults otherwise.

    Its experts compute as many rows as there are tokens: those above an expert's capacity are dropped, and slots that
    stay empty are computed as well.

    Args:
        width: D.
        experts: number of experts, all in this process.
    """
    layer: nn.Module = MoE(width, Mlp(width, 4 * width), experts, k=1)
    return layer


def autoep(width: int, experts: int) -> nn.Module:
    """Return the layer of DeepSpeed's AutoEP with top-1 routing and its default configuration.

    Its experts are SwiGLU FFNs with three matrices; their hidden width is chosen so that a row costs as many operations
    as in a GELU expert of hidden width 4 D.

    Args:
        width: D.
        experts: number of experts, all in this process.
    """
    hidden = round(width / 3) * 8
    source = nn.Module()
    source.gate = nn.Linear(width, experts, bias=False)
    source.experts = nn.Module()
    for name, shape in (("w1", (hidden, width)), ("w2", (width, hidden)), ("w3", (hidden, width))):
        source.experts.register_parameter(name, nn.Parameter(torch.randn(experts, *shape) * 0.02))
    spec = MoELayerSpec(
        moe_module_name="moe", model_family="benchmark", router_name="gate", experts_name="experts",
        expert_storage="fused_3d", expert_w1_name="w1", expert_w2_name="w2", expert_w3_name="w3",
        num_experts=experts, top_k=1, hidden_size=width, ffn_hidden_size=hidden, score_func="softmax",
        score_apply="post", route_norm=False, gate_bias=False, return_router_logits=False,
        router_logits_capture_target="none", router_logits_capture_index=None, router_logits_capture_layer_name=None,
        has_shared_experts=False, shared_experts_name="",
    )  # fmt: skip
    layer: nn.Module = seam.AutoEPMoELayer(spec, source, 1, 0, AutoEPConfig())
    return layer
