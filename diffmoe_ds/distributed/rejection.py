"""Tell a configuration that DeepSpeed rejects from other failures of `deepspeed.initialize`."""

from __future__ import annotations

import re

from diffmoe_ds.errors import ConfigError

NO_COMPILER = ("MissingCUDAException", "CUDAMismatchException")
"""DeepSpeed's exceptions if nvcc is missing or belongs to another version of CUDA than torch."""
NOT_BUILT = re.compile(
    "JIT load|failed to build/load|error building extension|ninja is required|CUDA_HOME", re.IGNORECASE
)
"""What DeepSpeed and `torch.utils.cpp_extension` say if they cannot compile or load an operator."""


def rejection(error: Exception, optimizer: str) -> ConfigError | None:
    """Return the error to report to the user, or None if the configuration is not to blame.

    Args:
        error: raised by `deepspeed.initialize`. A RuntimeError about anything but compiling is not a rejection, because
            failed collectives raise it.
        optimizer: type of the optimizer.
    """
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    not_built = isinstance(error, (RuntimeError, OSError)) and NOT_BUILT.search(str(error))
    if not_built or isinstance(error, ImportError) or type(error).__name__ in NO_COMPILER:
        must = "optimizer.type in the DeepSpeed JSON must be AdamW"
        if optimizer != "Lion":
            must = "optimizer.params.torch_adam in the DeepSpeed JSON must be true"
        found = ConfigError(f"{must} on this host, which cannot compile or load DeepSpeed's own optimizer: {reason}")
        found.same_on_all_ranks = False  # hosts may have different compilers
        return found
    if isinstance(error, (AssertionError, TypeError, ValueError)):
        return ConfigError(f"DeepSpeed rejected the configuration: {reason}")
    return None
