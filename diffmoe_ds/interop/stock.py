"""Convert a dense DDPM model to diffusers' own `DiTTransformer2DModel`, and describe it for `DiTPipeline`.

diffusers keeps a copy of the time and label embedders in every block, splits qkv, and computes the frequencies of the
time embedding with a ``downscale_freq_shift`` of 1, which its configuration cannot change; ours, as DiT's, is 0. The
frequencies differ by so much that no weights could undo it. Our pipeline sets the shift; with diffusers' own classes,
users do so after loading (`FREQ_SHIFT_HINT`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from diffmoe_ds.config.schema import Config

FREQ_SHIFT_HINT = """\
for block in pipe.transformer.transformer_blocks:
    block.norm1.emb.time_proj.downscale_freq_shift = 0"""
"""What makes diffusers' model compute the same time embedding."""
EMBEDDERS = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}
"""Our embedders, and diffusers' names in ``norm1.emb`` of every block."""
BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
"""Our layers in a block, and diffusers' names."""
OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
"""Our layers outside the blocks, and diffusers' names."""


def stock_problems(config: Config) -> list[str]:
    """Return why `DiTTransformer2DModel` cannot represent a model, as phrases; an empty list if it can."""
    model = config.model
    problems = [
        f"{key} is {value}" for key, value, expected in (
            ("model.conditioning", config.size.conditioning, "class"),
            ("objective.kind", config.objective.kind, "ddpm"),
            ("routing.kind", "dense" if config.num_experts == 1 else config.routing.kind, "dense"),
            ("model.mlp", model.mlp, "gelu"),
            ("model.mlp_ratio", model.mlp_ratio, 4),
        ) if value != expected
    ]  # fmt: skip
    if model.label_dropout == 0 and not config.is_text:
        problems.append("model.label_dropout is 0")
    return problems


def transformer_config(config: Config) -> dict[str, Any]:
    """Return ``transformer/config.json`` of a model without `stock_problems`."""
    size, model = config.size, config.model
    return {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": size.num_heads,
        "attention_head_dim": size.hidden_size // size.num_heads,
        "in_channels": model.in_channels,
        "out_channels": 2 * model.in_channels,
        "num_layers": size.depth,
        "attention_bias": True,
        "sample_size": model.input_size,
        "patch_size": model.patch_size,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": model.num_classes,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
    }


def scheduler_config() -> dict[str, Any]:
    """Return ``scheduler/scheduler_config.json``: the process of `diffusion.ddpm`, sampled with DDIM."""
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "prediction_type": "epsilon",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "timestep_spacing": "trailing",  # starts at pure noise, however few the steps
    }


def transformer_weights(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield diffusers' names and weights.

    Args:
        state: our ``state_dict`` of a model without `stock_problems`.
    """
    for name, tensor in state.items():
        layer, _, leaf = name.rpartition(".")
        if layer in OUTSIDE:
            yield f"{OUTSIDE[layer]}.{leaf}", tensor
        elif layer in EMBEDDERS:
            depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
            for block in range(depth):
                yield f"transformer_blocks.{block}.norm1.emb.{EMBEDDERS[layer]}.{leaf}", tensor
        else:
            _, number, inside = layer.split(".", 2)
            prefix = f"transformer_blocks.{number}"
            if inside == "attn.qkv":
                for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                    yield f"{prefix}.attn1.to_{part}.{leaf}", piece
            else:
                yield f"{prefix}.{BLOCK[inside]}.{leaf}", tensor
