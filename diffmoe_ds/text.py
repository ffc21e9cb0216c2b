"""Wording shared by messages and reports."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """Return a number with its noun, such as ``1 image`` or ``1,000 images``.

    Args:
        count: the number.
        noun: in the singular, with a plural in -s.
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def reason(error: Exception) -> str:
    """Return the message of another library's error without its full stop, to continue a sentence."""
    return str(error).strip().rstrip(".")
