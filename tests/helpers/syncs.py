"""Count what makes the host wait for a GPU, or may, without a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

OPERATORS = {
    "aten.nonzero": "nonzero",
    "aten.masked_select": "nonzero",
    "aten.lift_fresh": "tensor from the host",
}
"""Operators that count: the shape of the output depends on values, or the data comes from Python or NumPy."""
METHODS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "repeat_interleave")
"""Methods of tensors that count; in inference mode a dispatch mode does not see them."""


class SyncCounter(TorchDispatchMode):
    """Counts synchronizations by kind while it is active, in `counts`."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._methods: dict[str, Any] = {}

    def __enter__(self) -> SyncCounter:
        for name in METHODS:
            self._methods[name] = getattr(torch.Tensor, name)
            setattr(torch.Tensor, name, self._counted(name, self._methods[name]))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for name, method in self._methods.items():
            setattr(torch.Tensor, name, method)

    def record(self, kind: str) -> None:
        """Count a synchronization."""
        self.counts[kind] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).rpartition(".")[0]
        if name in OPERATORS:
            self.record(OPERATORS[name])
        elif name == "aten.index" and any(index is not None and index.dtype == torch.bool for index in args[1]):
            self.record("nonzero")
        return func(*args, **(kwargs or {}))

    def _counted(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if name != "repeat_interleave" or kwargs.get("output_size") is None:
                self.record(name)
            return method(tensor, *args, **kwargs)

        return call
