"""The error message for an unknown name."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from diffmoe_ds.text import shortened

MAX_SHOWN = 400
"""Most characters of a key or an unknown value in an error message."""


def did_you_mean(name: object, valid: Collection[str]) -> str:
    """Return a "did you mean" fragment with the nearest valid value; empty if none is close."""
    folded = {str(value).casefold(): value for value in valid}  # adamw is AdamW, not Adam
    nearest = difflib.get_close_matches(str(name).casefold(), folded, n=1, cutoff=0.5)
    return f"did you mean {folded[nearest[0]]!r}? " if nearest else ""


def unknown(where: str, name: object, valid: Collection[str], *, lists_valid: bool = True) -> str:
    """Return one sentence with the key, the value found, the nearest valid value and, unless switched off, all."""
    listed = f"valid: {', '.join(sorted(valid))}." if lists_valid else ""
    return f"{where}: {shortened(repr(name), MAX_SHOWN)} is not known; {did_you_mean(name, valid)}{listed}".rstrip("; ")
