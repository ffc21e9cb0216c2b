"""The model sizes, as one table. A model is named ``SIZE-E<experts>``, for example ``L-E8`` or ``tiny-E8``.

S, B, L and XL are the sizes of DiT (arXiv 2212.09748, table 1); the expert counts are DiffMoE's (arXiv 2503.14487).
``E1`` is the dense transformer, which is also called ``Dense-L`` and so on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from diffmoe_ds.config.nearest import unknown
from diffmoe_ds.errors import ConfigError


@dataclass(frozen=True)
class Size:
    """Depth, width and heads of one transformer size."""

    depth: int
    """Number of blocks."""
    hidden_size: int
    """Width D of a token."""
    num_heads: int
    """Attention heads; must divide the width."""
    conditioning: str = "class"
    """Default of ``model.conditioning``."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return depth, width and heads."""
        return self.depth, self.hidden_size, self.num_heads


SIZES: dict[str, Size] = {
    #             depth  hidden  heads
    "nano":  Size(    4,     32,     4),  # for tests: a step takes milliseconds
    "tiny":  Size(    4,     96,     4),  # learns Fashion-MNIST on two CPU cores in minutes
    "mini":  Size(    4,    128,     4),  # so does this one, better and at 1.3 times the cost
    "S":     Size(   12,    384,     6),
    "B":     Size(   12,    768,    12),
    "L":     Size(   24,   1024,    16),
    "XL":    Size(   28,   1152,    16),
    "T2I":   Size(   24,   1536,    24, "text"),  # our reading of the paper's text-to-image model, see docs/text.md
}  # fmt: skip
EXPERTS = (1, 2, 4, 8, 16)
NAMES = tuple(f"{size}-E{experts}" for size in SIZES for experts in EXPERTS)

_NAME = re.compile(r"(?P<dense>Dense-)?(?P<size>[A-Za-z0-9]+)(-E(?P<experts>[1-9][0-9]*))?")


def parse_name(name: str) -> tuple[Size, int]:
    """Return the size and the number of experts of a model name.

    Args:
        name: ``S-E16``, ``Dense-L`` (the same as ``L-E1``), ...

    Raises:
        ConfigError: the name is not in the table.
    """
    match = _NAME.fullmatch(name)
    if match and bool(match["dense"]) != bool(match["experts"]) and match["size"] in SIZES:
        experts = int(match["experts"] or 1)
        if experts in EXPERTS:
            return SIZES[match["size"]], experts
    raise ConfigError(unknown("model.name", name, NAMES))
