"""DiffMoE diffusion transformers trained with expert parallelism on DeepSpeed.

>>> model = diffmoe_ds.load("runs/demo")
>>> samples = model.sample(classes=["bag", 3], seeds=range(8), steps=2)
>>> samples.images.shape
(8, 32, 32, 1)
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffmoe_ds.api import Model, fit, load
    from diffmoe_ds.api_samples import Samples
    from diffmoe_ds.checkpoint.reference import load_official

__version__ = version("diffmoe_ds")
__all__ = ["Model", "Samples", "__version__", "fit", "load", "load_official"]

_MODULES = {
    **dict.fromkeys(("Model", "fit", "load"), "diffmoe_ds.api"),
    "Samples": "diffmoe_ds.api_samples",
    "load_official": "diffmoe_ds.checkpoint.reference",
}


def __getattr__(name: str) -> Any:
    """Import torch and the model lazily so that typos in a ``diffmoe`` command fail fast."""
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the names that are imported lazily, too."""
    return sorted({*globals(), *__all__})
