"""DiffMoE diffusion transformers trained with expert parallelism on DeepSpeed."""

from typing import Any

__all__ = ["load_official"]


def __getattr__(name: str) -> Any:
    """Import torch and the model lazily so that typos in a ``diffmoe`` command fail fast."""
    if name == "load_official":
        from diffmoe_ds.checkpoint.reference import load_official

        return load_official
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
