"""DiffMoE diffusion transformers trained with expert parallelism on DeepSpeed."""

from diffmoe_ds.checkpoint.official import load_official

__all__ = ["load_official"]
