"""What a router has observed since its last update: one tensor for each micro-batch of an optimizer step."""

from __future__ import annotations

from torch import Tensor


class Observed:
    """Base of what is updated once per step from the routing of its micro-batches."""

    def __init__(self) -> None:
        self._observed: list[Tensor] = []

    def retract(self) -> None:
        """Forget the last micro-batch, whose forward pass is repeated."""
        del self._observed[-1:]

    def discard(self) -> None:
        """Discard the micro-batches observed since the last update, for a skipped step."""
        self._observed.clear()
